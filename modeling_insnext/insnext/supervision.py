"""What training says about the steps of an insertion sequence: which count, and what each is to choose."""

from enum import IntEnum
from typing import NamedTuple

import torch


class TargetKind(IntEnum):
    """What the state that decides about a token's place is trained on; the entries of `target_kinds`.

    The soft kinds are the distribution of an order's next choice given what is written: the expected loss is that of
    the slot drawn, its variance smaller.

    Attributes:
        HARD: The slot where the token goes.
        PROPORTIONAL: Every live slot, in proportion to the units missing in it; exact for uniform orders.
        EQUAL: Every live slot with something missing, alike; exact where a gap begins in gap-wise orders.
    """

    HARD = 0
    PROPORTIONAL = 1
    EQUAL = 2


class Supervision(NamedTuple):
    """What is trained on, each `[B, N]` by entry of the insertion sequence; arguments of the model's `forward`."""

    labels: torch.Tensor
    stop_targets: torch.Tensor | None = None
    target_kinds: torch.Tensor | None = None
    unit_starts: torch.Tensor | None = None
    step_weights: torch.Tensor | None = None


__all__ = ["Supervision", "TargetKind"]
