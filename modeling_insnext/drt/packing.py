"""Rows that hold several texts are refused: chunks, memory and retrieval are a row's own."""

import torch


# how collators without padding describe packed texts, beside position ids
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def check_one_text(
    position_ids: torch.Tensor | None,
    said: dict,
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    first: int | None = None,
) -> None:
    """Check that what is said of positions is what the model counts by itself.

    Args:
        position_ids: Integers `[B, Q]`, or `[1, Q]` for all rows; what stands on padding does not matter.
        said: The fields of `BOUNDARIES` that a collator sent.
        shape: Rows and columns.
        attention_mask: 1 on tokens, 0 on padding, `[B, Q]`; behind a cache with the columns before.
        first: What a row's first token must have, where more than distances counts.

    Raises:
        ValueError: If texts are packed, or `position_ids` have another shape, begin elsewhere or do not rise by one
            from token to token.
    """
    sent = sorted(name for name, value in said.items() if value is not None)
    if sent:
        raise ValueError(
            f"a row must be one text, got packed ones ({', '.join(sent)}); packing=False, padding_free=False pads them"
        )
    if position_ids is None or torch.compiler.is_compiling():
        return
    B, Q = shape
    if position_ids.shape not in ((B, Q), (1, Q)):
        raise ValueError(f"position_ids must be [{B}, {Q}] or [1, {Q}], got {list(position_ids.shape)}")
    if Q == 1:
        # a step of decoding has nothing to compare, and must not wait for the device
        return
    for row, ids_Q in enumerate(position_ids.expand(B, Q)):
        own = ids_Q if attention_mask is None else ids_Q[attention_mask[row, -Q:].bool()]
        if first is not None and len(own) and int(own[0]) != first:
            raise ValueError(f"position_ids must begin at {first} where positions are learned, got {int(own[0])}")
        wrong = (own.diff() != 1).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                "a row must be one text, whose position_ids rise by one from token to token, got "
                f"{own[i : i + 2].tolist()} after {i + 1} tokens of row {row}; packing=False pads packed texts"
            )


__all__ = ["BOUNDARIES", "check_one_text"]
