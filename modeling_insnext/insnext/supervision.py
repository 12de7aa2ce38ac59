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


def check_supervision(
    supervision: Supervision,
    shift_labels: torch.Tensor | None,
    given: torch.Tensor,
    left_to_right: bool,
    num_items: torch.Tensor | int | None,
) -> None:
    """Raise a `ValueError` for fields that would have no effect or have another shape than the tokens.

    Args:
        supervision: What is trained on.
        shift_labels: Labels of next tokens.
        given: Ids `[B, N]` or embeddings `[B, N, D]`.
        left_to_right: Whether the tokens stand in the order of the text.
        num_items: Divisor of the loss.
    """
    fields = {"shift_labels": shift_labels, "num_items_in_batch": num_items, **supervision._asdict()}
    sent = [name for name, value in fields.items() if value is not None]
    labels = "labels" in sent or "shift_labels" in sent
    if left_to_right:
        steps = [name for name in sent if name in Supervision._fields and name != "labels"]
        if steps:
            raise ValueError(f"{', '.join(steps)} need positions, got None")
    elif shift_labels is not None:
        raise ValueError("shift_labels are for text from left to right, got positions too")
    if sent and not labels:
        raise ValueError(
            f"{', '.join(sent)} need labels, got None; label_smoothing_factor, which takes them away, must be 0, as "
            "some ids have probability 0; for a compute_loss_func set model.accepts_loss_kwargs = False"
        )
    for name, tensor in fields.items():
        if name != "num_items_in_batch" and tensor is not None and tensor.shape != given.shape[:2]:
            raise ValueError(f"{name} must be {list(given.shape[:2])}, one for each token, got {list(tensor.shape)}")
    if labels and given.ndim == 3 and not left_to_right:
        raise ValueError("labels of an insertion sequence need input_ids, got inputs_embeds")


def next_tokens(labels_BN: torch.Tensor, start_BN: torch.Tensor) -> torch.Tensor:
    """Return for every token the label of the next one in its text, -100 for the last one and on padding.

    Args:
        labels_BN: Label of each token, -100 for none.
        start_BN: First entry of each entry's text; padding is a text of its own.
    """
    goes_on_BN = start_BN[:, 1:] == start_BN[:, :-1]
    return torch.nn.functional.pad(torch.where(goes_on_BN, labels_BN[:, 1:], -100), (0, 1), value=-100)


__all__ = ["Supervision", "TargetKind", "check_supervision", "next_tokens"]
