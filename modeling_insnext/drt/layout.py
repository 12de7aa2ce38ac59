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

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """The slots of one forward pass."""

    column_BL: torch.Tensor
    is_token_BL: torch.Tensor
    is_landmark_BL: torch.Tensor
    slot_BQ: torch.Tensor
    real_BQ: torch.Tensor | None
    first: list[int]
    lengths: list[int]
    width: int
    chunk_length: int

    @property
    def ends(self) -> list[int]:
        return [first + length for first, length in zip(self.first, self.lengths, strict=True)]

    @property
    def is_ragged(self) -> bool:
        """Whether rows bring different numbers of slots, or stand at different places of a chunk."""
        phases = {first % self.chunk_length for first in self.first}
        return len(set(self.lengths)) > 1 or len(phases) > 1

    @property
    def chunks_begun(self) -> list[int]:
        """Number of the chunk that holds slot 0 of each row."""
        return [first // self.chunk_length for first in self.first]

    @property
    def chunks_completed(self) -> list[int]:
        """How many chunks each row completes in this forward pass."""
        P = self.chunk_length
        return [end // P - first // P for first, end in zip(self.first, self.ends, strict=True)]


def decoder_length(tokens: int, chunk_size: int, has_landmarks: bool) -> int:
    """Return how many positions the first `tokens` tokens of a text take, landmarks of complete chunks included."""
    return tokens + tokens // chunk_size if has_landmarks else tokens


def token_count(position: int, chunk_size: int, has_landmarks: bool) -> int:
    """Return how many tokens stand before `position`: the inverse of :func:`decoder_length`."""
    return position - position // (chunk_size + 1) if has_landmarks else position


def build_layout(
    shape: tuple[int, int],
    device: torch.device,
    chunk_size: int,
    has_landmarks: bool,
    seen: list[int] | None = None,
    real_BQ: torch.Tensor | None = None,
) -> Layout:
    """Return the slots of `shape` = (B, Q) columns behind `seen` tokens of each row.

    Args:
        seen: Tokens of each row that went before, none by default.
        real_BQ: True on tokens, False on padding; `None`: all are tokens.
    """
    B, Q = shape
    seen = [0] * B if seen is None else seen
    new = [Q] * B if real_BQ is None else real_BQ.sum(1).tolist()
    first = [decoder_length(n, chunk_size, has_landmarks) for n in seen]
    ends = [decoder_length(n + m, chunk_size, has_landmarks) for n, m in zip(seen, new, strict=True)]
    lengths = [end - start for start, end in zip(first, ends, strict=True)]
    width = max(lengths)
    column_Q = torch.arange(Q, device=device)
    rank_BQ = column_Q.expand(B, Q) if real_BQ is None else real_BQ.long().cumsum(1) - 1
    seen_B1 = torch.tensor(seen, device=device)[:, None]
    first_B1 = torch.tensor(first, device=device)[:, None]
    index_BQ = seen_B1 + rank_BQ
    slot_BQ = index_BQ + (index_BQ // chunk_size if has_landmarks else 0) - first_B1
    if real_BQ is not None:
        slot_BQ = torch.where(real_BQ, slot_BQ, width)
    column_BL = torch.full((B, width + 1), -1, device=device).scatter(1, slot_BQ, column_Q.expand(B, Q))[:, :width]
    is_token_BL = column_BL >= 0
    position_BL = first_B1 + torch.arange(width, device=device)
    is_landmark_BL = torch.zeros_like(is_token_BL)
    if has_landmarks:
        end_B1 = torch.tensor(ends, device=device)[:, None]
        is_landmark_BL = (position_BL % (chunk_size + 1) == chunk_size) & (position_BL < end_B1)
    return Layout(
        column_BL.clamp_min(0),
        is_token_BL,
        is_landmark_BL,
        slot_BQ if real_BQ is None else slot_BQ.masked_fill(~real_BQ, 0),
        real_BQ,
        first,
        lengths,
        width,
        chunk_size + has_landmarks,
    )


def put_in(layout: Layout, tokens_BQD: torch.Tensor, landmark_D: torch.Tensor | None) -> torch.Tensor:
    """Return `[B, L, D]`: tokens at their slots, `landmark_D` at the landmarks, zero on padding."""
    index_BLD = layout.column_BL[..., None].expand(-1, -1, tokens_BQD.shape[-1])
    slots_BLD = tokens_BQD.gather(1, index_BLD) * layout.is_token_BL[..., None]
    if landmark_D is None:
        return slots_BLD
    return torch.where(layout.is_landmark_BL[..., None], landmark_D.to(slots_BLD.dtype), slots_BLD)


def take_out(layout: Layout, slots_BLD: torch.Tensor) -> torch.Tensor:
    """Return `[B, Q, D]`: what stands at the tokens, zero on padding."""
    tokens_BQD = slots_BLD.gather(1, layout.slot_BQ[..., None].expand(-1, -1, slots_BLD.shape[-1]))
    return tokens_BQD if layout.real_BQ is None else tokens_BQD * layout.real_BQ[..., None]


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
