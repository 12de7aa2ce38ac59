"""Several texts in one row, as collators without padding say it: position ids that begin anew, and what follows from
them.

Offsets are counted in the text, so that the ids' values mean nothing here: where they rise by one a text goes on,
where they begin anew the next one begins. Shape suffixes: B rows, Q columns.
"""

import torch


# what FlashAttention and short convolutions would read, said by the position ids already
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
LONGEST = ("max_length_q", "max_length_k")


def packed_starts(
    shape: tuple[int, int],
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    may_begin_anew: bool = True,
) -> torch.Tensor:
    """Return the first column of the text that each column belongs to, int64 `[B, Q]`.

    Args:
        shape: Rows and columns.
        position_ids: Integers `[B, Q]`, or `[1, Q]` for all rows; what stands on padding does not matter.
        attention_mask: 1 on tokens, 0 on padding, `[B, Q]`.
        may_begin_anew: Whether a row may hold several texts.

    Raises:
        ValueError: If `position_ids` have another shape or type, or neither rise by one nor begin anew, where they
            may, at the first token's.
    """
    B, Q = shape
    if position_ids.shape not in ((B, Q), (1, Q)) or position_ids.is_floating_point():
        found = f"{position_ids.dtype} {list(position_ids.shape)}"
        raise ValueError(f"position_ids must be integers [{B}, {Q}] or [1, {Q}], got {found}")
    ids_BQ = position_ids.expand(B, Q)
    real_BQ = torch.ones_like(ids_BQ, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    goes_on_BQ = torch.zeros_like(real_BQ)
    goes_on_BQ[:, 1:] = real_BQ[:, :-1] & real_BQ[:, 1:] & (ids_BQ.diff(dim=1) == 1)
    if not torch.compiler.is_compiling():
        first_B1 = ids_BQ.gather(1, real_BQ.long().argmax(1, keepdim=True))
        anew_BQ = (ids_BQ == first_B1) & (may_begin_anew or real_BQ.long().cumsum(1) == 1)
        wrong_BQ = real_BQ & ~goes_on_BQ & ~anew_BQ
        if wrong_BQ.any():
            b, i = wrong_BQ.nonzero()[0].tolist()
            anew = f" or begin anew, at {int(first_B1[b])}, with the next one" if may_begin_anew else ""
            found = ids_BQ[b, max(i - 1, 0) : i + 1].tolist()
            raise ValueError(f"position_ids must rise by one along a text{anew}, got {found} at column {i} of row {b}")
    column_BQ = torch.arange(Q, device=position_ids.device).expand(B, Q)
    return torch.where(goes_on_BQ, 0, column_BQ).cummax(1).values


def packed_ends(start_BQ: torch.Tensor) -> torch.Tensor:
    """Return the last column of the text that each column belongs to, int64 `[B, Q]`, from the first ones."""
    column_BQ = torch.arange(start_BQ.shape[1], device=start_BQ.device).expand_as(start_BQ)
    return torch.zeros_like(start_BQ).scatter_reduce(1, start_BQ, column_BQ, "amax").gather(1, start_BQ)


def with_packed_texts(shape: tuple[int, int], position_ids: torch.Tensor | None, said: dict, fields: dict) -> dict:
    """Return the fields of `build_interval` with those that keep packed texts apart.

    Args:
        shape: Rows and columns of the new tokens.
        position_ids: See :func:`packed_starts`.
        said: The fields of `BOUNDARIES` and `LONGEST` that a collator sent.
        fields: Arguments of `build_interval`.

    Raises:
        ValueError: If `position_ids` come with fields that say the same or with texts behind a cache, or `said` says
            something else or comes alone.
    """
    said = {name: value for name, value in said.items() if value is not None}
    if position_ids is None:
        if said:
            raise ValueError(
                f"packed texts need position_ids that begin anew with each of them, got {sorted(said)} alone"
            )
        return fields
    other = [name for name in ("positions", "start", "horizon") if fields.get(name) is not None]
    if other:
        raise ValueError(f"position_ids are for text from left to right and exclude {', '.join(other)}, got both")
    mask, past = fields.get("attention_mask"), fields.get("past")
    if past is not None and torch.compiler.is_compiling():
        return fields
    new_mask = None if mask is None else mask[:, -shape[1] :]
    # what a cache holds is one text, which the new tokens go on with
    start_BQ = packed_starts(shape, position_ids, new_mask, may_begin_anew=past is None)
    if past is not None:
        return fields
    if not torch.compiler.is_compiling():
        _check_boundaries(said, start_BQ)
    whole = not fields.get("is_causal") and fields.get("context_length") is None
    return {**fields, "start": start_BQ, "horizon": packed_ends(start_BQ) if whole else None}


def _check_boundaries(said: dict, start_BQ: torch.Tensor) -> None:
    column_BQ = torch.arange(start_BQ.shape[1], device=start_BQ.device).expand_as(start_BQ)
    begins_BQ = start_BQ == column_BQ
    edges = [*begins_BQ.flatten().nonzero().flatten().tolist(), begins_BQ.numel()]
    for name, value in said.items():
        if name in LONGEST:
            agrees = int(value) == max(last - first for first, last in zip(edges, edges[1:], strict=False))
        elif name == "seq_idx":
            agrees = bool(((value.diff(dim=1) != 0) == begins_BQ[:, 1:]).all())
        else:
            agrees = value.tolist() == edges
        if not agrees:
            shown = value.tolist() if isinstance(value, torch.Tensor) else value
            raise ValueError(f"{name} must say what position_ids say, texts from columns {edges[:-1]}, got {shown}")


__all__ = ["BOUNDARIES", "LONGEST", "packed_starts", "with_packed_texts"]
