"""The canvas: given tokens and the slots between them where the model may write.

Shape suffixes: B rows, T tokens of the longest row, G gaps of the row with most gaps, V vocabulary; K pending keywords
of a row, F forms of a keyword, L tokens of a form, each of the row, keyword or form with most.
A canvas holds tensors in text order, padded on the right. Slot i is the place right of token i; the canvas starts with
BOS, so text can grow before the first given word too:

    text              "___ fox ran ___{2,5} ."
    input_ids_BT      <s>   fox  ran   .
    slot_mask_BT       x     .    x    .       x: open
    gap_ids_BT         0    -1    1   -1
    min_gap_tokens_BG  0 2      max_gap_tokens_BG  -1 5      (-1: no bound)
    word_end_mask_BT   .     .    x    .       no piece may be written here that would glue to "ran"

Keywords that have no place yet are pending: each is a list of forms, of which one is to be written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from transformers.utils import ModelOutput


# what a field holds where a row has nothing, if not 0
PADDING = {"gap_ids": -1, "max_gap_tokens": -1, "pending_ids": -1}


@dataclass
class Canvas(ModelOutput):
    """Given tokens in text order, padded on the right, and the slots between them that are open.

    A mapping as well: `generate(**canvas)`. Slot i is the place right of token i.

    Attributes:
        input_ids: int64 `[B, T]`, the given tokens.
        attention_mask: int64 `[B, T]`, 1 on tokens.
        slot_mask: bool `[B, T]`, slots that are open.
        gap_ids: int64 `[B, T]`, the gap that an open slot belongs to, -1 where it is closed.
        min_gap_tokens: int64 `[B, G]`, least number of tokens in each gap.
        max_gap_tokens: int64 `[B, G]`, largest number of tokens, -1 for no bound.
        word_end_mask: bool `[B, T]`, tokens right of which no piece may be written that would glue to them.
        continuation_mask: bool `[V]`, the pieces that glue; None where no word is protected.
        pending_ids: int64 `[B, K, F, L]`, tokens of the forms of keywords that are to be written, each keyword in one
            form, -1 behind the end of a form and where there is none; None where nothing is pending.
    """

    input_ids: torch.LongTensor = None
    attention_mask: torch.LongTensor = None
    slot_mask: torch.BoolTensor = None
    gap_ids: torch.LongTensor = None
    min_gap_tokens: torch.LongTensor = None
    max_gap_tokens: torch.LongTensor = None
    word_end_mask: torch.BoolTensor = None
    continuation_mask: torch.BoolTensor | None = None
    pending_ids: torch.LongTensor | None = None

    @classmethod
    def field_names(cls) -> set[str]:
        """Return the names of all fields."""
        return {field.name for field in fields(cls)}

    @property
    def rows(self) -> int:
        """Number of texts."""
        return len(self.input_ids)

    @property
    def lengths(self) -> torch.Tensor:
        """Given tokens of each row, int64 `[B]`."""
        return self.attention_mask.sum(1)

    def to(self, device: torch.device | str) -> "Canvas":
        """Return the canvas with all tensors on `device`."""
        return Canvas(**{name: tensor.to(device) for name, tensor in self.items()})

    def repeat(self, times: int) -> "Canvas":
        """Return the canvas with each row `times` times, one after the other."""
        repeated = {name: tensor.repeat_interleave(times, 0) for name, tensor in self.items()}
        return Canvas(**{**repeated, "continuation_mask": self.continuation_mask})

    @classmethod
    def stack(cls, canvases: Sequence["Canvas"]) -> "Canvas":
        """Return the rows of canvases as one batch; all are of one vocabulary, that of the first one's mask."""
        fields = {}
        for name in cls.field_names() - {"continuation_mask"}:
            held = [getattr(canvas, name) for canvas in canvases]
            if any(tensor is not None for tensor in held):
                fields[name] = _stacked(held, [canvas.rows for canvas in canvases], PADDING.get(name, 0))
        return cls(**fields, continuation_mask=canvases[0].continuation_mask)

    @classmethod
    def from_ids(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        slot_mask: torch.Tensor | None = None,
        gap_ids: torch.Tensor | None = None,
        min_gap_tokens: torch.Tensor | int | None = None,
        max_gap_tokens: torch.Tensor | int | None = None,
        word_end_mask: torch.Tensor | None = None,
        continuation_mask: torch.Tensor | None = None,
        pending_ids: torch.Tensor | None = None,
    ) -> "Canvas":
        """Return a complete canvas, padded on the right, from token ids and whatever is known of the slots.

        Args:
            input_ids: `[B, T]`, text order, padded on either side.
            attention_mask: `[B, T]`, 1 on tokens; None: no pads.
            slot_mask: `[B, T]` bool, slots that are open; None: only the one right of the last token.
            gap_ids: `[B, T]`; None: the open slots are numbered from the left.
            min_gap_tokens: `[B, G]` or one number for all gaps of each row; None: 0.
            max_gap_tokens: `[B, G]` or one number for all gaps, -1 for no bound; None: -1.
            word_end_mask: `[B, T]` bool; None: nothing is protected.
            continuation_mask: `[V]` bool; passed on.
            pending_ids: `[B, K, F, L]`; passed on.

        Raises:
            ValueError: If a row is empty, its tokens are not contiguous, shapes disagree or bounds are no integers.
        """
        if not torch.is_tensor(input_ids) or input_ids.ndim != 2:
            raise ValueError(
                f"input_ids must be a tensor [B, T], got {getattr(input_ids, 'shape', type(input_ids).__name__)}"
            )
        B, T = input_ids.shape
        device = input_ids.device
        if attention_mask is None:
            attention_mask = torch.ones(B, T, dtype=torch.long, device=device)
        _check_shape("attention_mask", attention_mask, (B, T))
        _check_shape("slot_mask", slot_mask, (B, T))
        _check_shape("gap_ids", gap_ids, (B, T))
        _check_shape("word_end_mask", word_end_mask, (B, T))
        start_B1, length_B = _runs(attention_mask.bool())
        # gather moves each row to the left edge, its pads behind it
        index_BT = (torch.arange(T, device=device) + start_B1) % max(T, 1)

        def aligned(tensor_BT):
            return None if tensor_BT is None else tensor_BT.to(device).gather(1, index_BT)

        present_BT = torch.arange(T, device=device) < length_B[:, None]
        if slot_mask is None and gap_ids is not None:
            slot_mask_BT = aligned(gap_ids) >= 0
        elif slot_mask is None:
            slot_mask_BT = torch.arange(T, device=device) == length_B[:, None] - 1
        else:
            slot_mask_BT = aligned(slot_mask).bool()
        if gap_ids is None:
            gap_ids_BT = torch.where(slot_mask_BT, slot_mask_BT.long().cumsum(1) - 1, -1)
        else:
            gap_ids_BT = aligned(gap_ids).long()
        G = max(int(gap_ids_BT.max()) + 1, 1)
        if isinstance(min_gap_tokens, int) and not isinstance(min_gap_tokens, bool):
            exists_BG = (gap_ids_BT[..., None] == torch.arange(G, device=device)).any(1)
            min_gap_tokens = min_gap_tokens * exists_BG.long()
        return cls(
            input_ids=aligned(input_ids),
            attention_mask=present_BT.long(),
            slot_mask=slot_mask_BT,
            gap_ids=gap_ids_BT,
            min_gap_tokens=_bounds_tensor("min_gap_tokens", min_gap_tokens, 0, (B, G), device),
            max_gap_tokens=_bounds_tensor("max_gap_tokens", max_gap_tokens, -1, (B, G), device),
            word_end_mask=torch.zeros_like(present_BT) if word_end_mask is None else aligned(word_end_mask).bool(),
            continuation_mask=None if continuation_mask is None else continuation_mask.to(device),
            pending_ids=None if pending_ids is None else pending_ids.to(device),
        )

    def validate(
        self,
        vocab_size: int | None = None,
        max_new_tokens: int | None = None,
        max_position_embeddings: int | None = None,
    ) -> None:
        """Check the canvas before any work is done; one without an open slot is allowed, nothing is then written.

        Args:
            vocab_size: Number of embeddings of the model.
            max_new_tokens: Most tokens that may be written in a row.
            max_position_embeddings: Longest text of the model.

        Raises:
            ValueError: If a rule is broken; the message names the rule, the row or gap and the value.
        """
        ids_BT = self.input_ids
        if ids_BT.ndim != 2 or ids_BT.dtype.is_floating_point or ids_BT.dtype == torch.bool:
            raise ValueError(f"input_ids must be integers [B, T], got {ids_BT.dtype} {list(ids_BT.shape)}")
        for name in ("attention_mask", "slot_mask", "gap_ids", "word_end_mask"):
            _check_shape(name, self[name], tuple(ids_BT.shape))
        for name in ("slot_mask", "word_end_mask"):
            if self[name].dtype != torch.bool:
                raise ValueError(f"{name} must be bool, got {self[name].dtype}")
        start_B1, length_B = _runs(self.attention_mask.bool())
        if start_B1.any():
            row = int(start_B1.squeeze(1).nonzero()[0])
            raise ValueError(f"a canvas is padded on the right, row {row} on the left")
        self._check_slots()
        self._check_pending()
        self._check_vocabulary(vocab_size)
        self._check_bounds(max_new_tokens)
        # a text cannot be finished within the model's length if its minima alone exceed it
        needed_B = length_B + self.min_gap_tokens.sum(1)
        if max_position_embeddings is not None and int(needed_B.max()) > max_position_embeddings:
            row = int(needed_B.argmax())
            raise ValueError(
                f"row {row} has {int(length_B[row])} given tokens and minima of "
                f"{int(needed_B[row] - length_B[row])} more, the model's longest text is {max_position_embeddings}"
            )

    def _check_slots(self) -> None:
        slot_mask_BT, gap_ids_BT = self.slot_mask, self.gap_ids
        on_pad_BT = slot_mask_BT & ~self.attention_mask.bool()
        if on_pad_BT.any():
            raise ValueError(f"slot_mask opens a slot right of a pad, (row, column) {on_pad_BT.nonzero()[0].tolist()}")
        wrong_BT = slot_mask_BT != (gap_ids_BT >= 0)
        if wrong_BT.any():
            row, column = wrong_BT.nonzero()[0].tolist()
            raise ValueError(
                "gap_ids must be at least 0 exactly where slot_mask is open, got "
                f"{int(gap_ids_BT[row, column])} and {bool(slot_mask_BT[row, column])} in row {row}, column {column}"
            )
        for row, gap_ids_T in enumerate(gap_ids_BT):
            used = gap_ids_T[gap_ids_T >= 0]
            if len(used.unique()) != len(used):
                raise ValueError(f"each gap of a canvas has one slot, gap_ids of row {row} are {used.tolist()}")

    def _check_pending(self) -> None:
        forms_BKFL = self.pending_ids
        if forms_BKFL is None:
            return
        if forms_BKFL.ndim != 4 or forms_BKFL.dtype != torch.long or len(forms_BKFL) != self.rows:
            raise ValueError(
                f"pending_ids must be int64 [B, K, F, L] for {self.rows} rows, got {forms_BKFL.dtype} "
                f"{list(forms_BKFL.shape)}"
            )
        if not forms_BKFL.numel() or bool((forms_BKFL < -1).any()):
            raise ValueError(
                "pending_ids must hold tokens and -1 where there is none, got "
                f"{int(forms_BKFL.min()) if forms_BKFL.numel() else 'no entry'}"
            )
        broken_BKF = ((forms_BKFL[..., :-1] < 0) & (forms_BKFL[..., 1:] >= 0)).any(3)
        if broken_BKF.any():
            row, keyword, form = broken_BKF.nonzero()[0].tolist()
            raise ValueError(
                f"pending_ids must have -1 behind the end of a form only, got "
                f"{forms_BKFL[row, keyword, form].tolist()} in row {row}"
            )

    def _check_vocabulary(self, vocab_size: int | None) -> None:
        continuation_mask = self.continuation_mask
        if continuation_mask is None and self.word_end_mask.any():
            raise ValueError("word_end_mask protects words, which needs continuation_mask [V]")
        if continuation_mask is not None and (continuation_mask.ndim != 1 or continuation_mask.dtype != torch.bool):
            raise ValueError(
                f"continuation_mask must be bool [V], got {continuation_mask.dtype} {list(continuation_mask.shape)}"
            )
        if vocab_size is None:
            return
        ids = self.input_ids[self.attention_mask.bool()]
        if self.pending_ids is not None:
            ids = torch.cat([ids, self.pending_ids[self.pending_ids >= 0]])
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise ValueError(f"vocabulary mismatch: token id {int(outside[0])} in a vocabulary of {vocab_size}")
        if continuation_mask is not None and len(continuation_mask) != vocab_size:
            raise ValueError(
                f"vocabulary mismatch: continuation_mask has {len(continuation_mask)} entries, "
                f"the vocabulary {vocab_size}"
            )

    def _check_bounds(self, max_new_tokens: int | None) -> None:
        minima_BG, maxima_BG, gap_ids_BT = self.min_gap_tokens, self.max_gap_tokens, self.gap_ids
        rows = len(gap_ids_BT)
        if minima_BG.ndim != 2 or minima_BG.shape != maxima_BG.shape or len(minima_BG) != rows:
            raise ValueError(
                "min_gap_tokens and max_gap_tokens must have one shape [B, G], got "
                f"{list(minima_BG.shape)} and {list(maxima_BG.shape)} for {rows} rows"
            )
        if int(gap_ids_BT.max()) >= minima_BG.shape[1]:
            raise ValueError(f"gap {int(gap_ids_BT.max())} has no bounds, there are {minima_BG.shape[1]} columns")
        wrong_BG = (minima_BG < 0) | (maxima_BG < -1) | ((maxima_BG >= 0) & (maxima_BG < minima_BG))
        if wrong_BG.any():
            row, index = wrong_BG.nonzero()[0].tolist()
            raise ValueError(
                f"bounds of gap {index} in row {row} contradict: minimum {int(minima_BG[row, index])}, "
                f"maximum {int(maxima_BG[row, index])}"
            )
        exists_BG = (gap_ids_BT[..., None] == torch.arange(minima_BG.shape[1], device=gap_ids_BT.device)).any(1)
        missing_BG = (minima_BG > 0) & ~exists_BG
        if missing_BG.any():
            row, index = missing_BG.nonzero()[0].tolist()
            raise ValueError(f"gap {index} of row {row} has the minimum {int(minima_BG[row, index])} but no open slot")
        sums_B = minima_BG.sum(1)
        if max_new_tokens is not None and int(sums_B.max()) > max_new_tokens:
            raise ValueError(
                f"the minima of the gaps of row {int(sums_B.argmax())} add up to {int(sums_B.max())}, "
                f"max_new_tokens is {max_new_tokens}"
            )


def _runs(mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the tokens of each row start `[B, 1]` and how many they are `[B]`; they must be contiguous."""
    length_B = mask_BT.sum(1)
    if mask_BT.numel() == 0 or not length_B.all():
        row = int((length_B == 0).nonzero()[0]) if len(length_B) else 0
        raise ValueError(f"empty canvas: row {row} has no token")
    start_B1 = mask_BT.int().argmax(1, keepdim=True)
    column_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    inside_BT = (column_T >= start_B1) & (column_T < start_B1 + length_B[:, None])
    broken_B = (inside_BT != mask_BT).any(1)
    if broken_B.any():
        row = int(broken_B.nonzero()[0])
        raise ValueError(
            f"the tokens of a row must be contiguous, attention_mask of row {row} is {mask_BT[row].int().tolist()}"
        )
    return start_B1, length_B


def _check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} as input_ids, got {list(tensor.shape)}")


def padded_forms(rows: list[list[list[list[int]]]]) -> torch.Tensor:
    """Return the token ids of the forms of the keywords of each row as one tensor, -1 where there is none."""
    K = max(len(row) for row in rows)
    F = max(len(forms) for row in rows for forms in row)
    L = max(len(form) for row in rows for forms in row for form in forms)
    ids_BKFL = torch.full((len(rows), K, F, L), -1)
    for b, row in enumerate(rows):
        for k, forms in enumerate(row):
            for f, form in enumerate(forms):
                ids_BKFL[b, k, f, : len(form)] = torch.tensor(form)
    return ids_BKFL


def _stacked(tensors: list[torch.Tensor | None], rows: list[int], fill: int) -> torch.Tensor:
    """Return tensors `[rows, ...]` one below the other, each padded to the largest; None is nothing but padding."""
    some = [tensor for tensor in tensors if tensor is not None]
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in some), strict=True)]
    whole = some[0].new_full((sum(rows), *shape), fill)
    for tensor, part in zip(tensors, whole.split(rows), strict=True):
        if tensor is not None:
            part[tuple(map(slice, tensor.shape))] = tensor
    return whole


def _bounds_tensor(name: str, bounds, default: int, shape: tuple[int, int], device) -> torch.Tensor:
    if bounds is None or (isinstance(bounds, int) and not isinstance(bounds, bool)):
        return torch.full(shape, default if bounds is None else bounds, dtype=torch.long, device=device)
    given, bounds = bounds, torch.as_tensor(bounds, device=device)
    if bounds.is_floating_point() or bounds.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {given}")
    if bounds.ndim != 2 or bounds.shape[0] != shape[0] or bounds.shape[1] < shape[1]:
        raise ValueError(f"{name} must have shape {list(shape)}, [B, G], got {list(bounds.shape)}")
    return bounds.long()


__all__ = ["Canvas", "padded_forms"]
