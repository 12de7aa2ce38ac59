"""What a state is trained to choose. Models have an enum of their own: the numbers are the contract."""

from enum import IntEnum


class Kind(IntEnum):
    """Kind of target of a state of `slot_cross_entropy`."""

    ITS_TARGET = 0
    # every slot alive, in proportion to its weight
    BY_WEIGHT = 1
    # every slot alive that weighs something, alike
    ALIKE = 2


__all__ = ["Kind"]
