"""Loss of where the next token goes: cross-entropy over the slots alive at each step, and STOP. Needs torch only."""

from .api import slot_cross_entropy
from .kinds import Kind
from .reference import slot_cross_entropy_reference


__all__ = ["Kind", "slot_cross_entropy", "slot_cross_entropy_reference"]
