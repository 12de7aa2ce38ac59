"""Where tokens and landmarks stand: ordinary text in, chunks with their landmarks inside.

Shape suffixes: B rows, Q columns of the input, L slots of the decoder, C chunks. S tokens a chunk, P positions a
chunk: S + 1 with a landmark in the text, else S. A row's tokens are counted from its own first one, whatever padding
surrounds them. S = 3, P = 4, eight tokens `a` to `h`, `^` a landmark, left padding `.`:

    columns     .  .  a  b  c  d  e  f  g  h
    slots       a  b  c  ^  d  e  f  ^  g  h
    position    0  1  2  3  4  5  6  7  8  9
    chunk       0  0  0  0  1  1  1  1  2  2

A landmark stands behind the last token of its chunk as soon as that token is there. Behind a cache, slot 0 of row b
has position `first_B[b]`; rows that bring fewer tokens than others are padded on the right.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .grid import ChunkGrid


class Slots(NamedTuple):
    """Which column each slot holds, and the other way round."""

    column_BL: torch.Tensor
    is_token_BL: torch.Tensor
    is_landmark_BL: torch.Tensor
    slot_BQ: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """The slots of one forward pass.

    `first` are the positions of slot 0 and `lengths` the numbers of slots, one a row, or one for all rows where no
    cache asks for each. `slots` is `None` where every column is the slot of its number: no padding, no landmark.
    """

    grid: ChunkGrid
    first: list[int]
    lengths: list[int]
    real_BQ: torch.Tensor | None
    slots: Slots | None

    @property
    def width(self) -> int:
        return max(self.lengths)

    @property
    def ends(self) -> list[int]:
        return [first + length for first, length in zip(self.first, self.lengths, strict=True)]

    @property
    def phases(self) -> list[int]:
        """Place in its chunk of slot 0 of each row."""
        return [first % self.grid.length for first in self.first]

    @property
    def chunks_begun(self) -> list[int]:
        """Number of the chunk that holds slot 0 of each row."""
        return [first // self.grid.length for first in self.first]

    @property
    def chunks_completed(self) -> list[int]:
        """How many chunks each row completes in this forward pass."""
        return [end // self.grid.length - begun for begun, end in zip(self.chunks_begun, self.ends, strict=True)]

    @property
    def chunks_spanned(self) -> int:
        """In how many chunks the slots of a row stand, the most of all rows."""
        spans = zip(self.phases, self.lengths, strict=True)
        return max(-(-(phase + length) // self.grid.length) for phase, length in spans)


def build_layout(
    shape: tuple[int, int],
    device: torch.device,
    grid: ChunkGrid,
    seen: list[int],
    new: list[int],
    real_BQ: torch.Tensor | None = None,
) -> Layout:
    """Return the slots of `shape` = (B, Q) columns behind what each row has read.

    Args:
        seen: Tokens of each row that went before; one number if it is the same for all.
        new: Tokens that each row brings, as many numbers. Without a cache more than there are do no harm: what stands
            behind a row's last token is seen by no token.
        real_BQ: True on tokens, False on padding; `None`: all are tokens.
    """
    first = [grid.positions(n) for n in seen]
    ends = [grid.positions(n + m) for n, m in zip(seen, new, strict=True)]
    layout = Layout(grid, first, [end - start for start, end in zip(first, ends, strict=True)], real_BQ, None)
    if real_BQ is None and layout.lengths == new:
        return layout
    return replace(layout, slots=_slots(shape, device, layout, seen, ends))


def _slots(shape, device, layout: Layout, seen: list[int], ends: list[int]) -> Slots:
    (B, Q), grid, width, real_BQ = shape, layout.grid, layout.width, layout.real_BQ
    seen_B1, first_B1, end_B1 = torch.tensor([seen, layout.first, ends], device=device)[..., None]
    column_BQ = torch.arange(Q, device=device).expand(B, Q)
    index_BQ = seen_B1 + (column_BQ if real_BQ is None else real_BQ.long().cumsum(1) - 1)
    slot_BQ = index_BQ + (index_BQ // grid.chunk_size if grid.has_landmarks else 0) - first_B1
    if real_BQ is not None:
        slot_BQ = torch.where(real_BQ, slot_BQ, width)
    column_BL = torch.full((B, width + 1), -1, device=device).scatter(1, slot_BQ, column_BQ)[:, :width]
    position_BL = first_B1 + torch.arange(width, device=device)
    ends_chunk_BL = position_BL % grid.length == grid.chunk_size
    return Slots(
        column_BL.clamp_min(0),
        column_BL >= 0,
        # without landmarks no place of a chunk has the number of its size
        ends_chunk_BL & (position_BL < end_B1),
        slot_BQ if real_BQ is None else slot_BQ.masked_fill(~real_BQ, 0),
    )


def put_in(layout: Layout, tokens_BQD: torch.Tensor, landmark_D: torch.Tensor | None) -> torch.Tensor:
    """Return `[B, L, D]`: tokens at their slots, `landmark_D` at the landmarks, zero on padding."""
    slots = layout.slots
    if slots is None:
        return tokens_BQD
    index_BLD = slots.column_BL[..., None].expand(-1, -1, tokens_BQD.shape[-1])
    slots_BLD = tokens_BQD.gather(1, index_BLD) * slots.is_token_BL[..., None]
    if landmark_D is None:
        return slots_BLD
    return torch.where(slots.is_landmark_BL[..., None], landmark_D.to(slots_BLD.dtype), slots_BLD)


def take_out(layout: Layout, slots_BLD: torch.Tensor) -> torch.Tensor:
    """Return `[B, Q, D]`: what stands at the tokens, zero on padding."""
    if layout.slots is None:
        return slots_BLD
    tokens_BQD = slots_BLD.gather(1, layout.slots.slot_BQ[..., None].expand(-1, -1, slots_BLD.shape[-1]))
    return tokens_BQD if layout.real_BQ is None else tokens_BQD * layout.real_BQ[..., None]


def first_slots(held: torch.Tensor | None, new: torch.Tensor, first: list[int], count: int, dim: int) -> torch.Tensor:
    """Return what stands at positions 0 to `count` - 1 of each row: held if it was read before, else among the new.

    What was not read yet is anything.
    """
    taken = shift_rows(new, [-n for n in first], count, dim)
    if held is None:
        return taken
    first_B1 = torch.tensor(first, device=new.device)[:, None]
    shape = [1] * new.ndim
    shape[0], shape[dim] = len(first), count
    return torch.where((torch.arange(count, device=new.device) < first_B1).view(shape), held, taken)


def shift_rows(source: torch.Tensor, starts: list[int], length: int, dim: int = 1) -> torch.Tensor:
    """Return `length` entries of each row along `dim` from `starts[b]` on; entries outside `source` hold anything.

    Rows that start alike are sliced, others gathered.
    """
    size = source.shape[dim]
    if len(set(starts)) == 1 and 0 <= starts[0] and starts[0] + length <= size:
        return source.narrow(dim, starts[0], length)
    start_B1 = torch.tensor(starts, device=source.device)[:, None]
    index_BL = (start_B1 + torch.arange(length, device=source.device)).clamp(0, size - 1)
    view = [1] * source.ndim
    view[0], view[dim] = index_BL.shape
    shape = list(source.shape)
    shape[dim] = length
    return source.gather(dim, index_BL.view(view).expand(shape))
