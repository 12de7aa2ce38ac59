"""`insertion_attention` as PyTorch operators: memory, shapes for `torch.compile`, and the rule for gradients.

Triton is imported where a launch happens, so this module needs torch only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import empty, operator


# queries of a tile, and the longest window counted in one product; part of the table's format
TILE = 64
# so many queries decode: keys are divided among programs, and a key's place is not worth a sort
FEW_QUERIES = 16
# float32 holds so many whole numbers
EXACT = 2**24


class OffsetTable(NamedTuple):
    """What the kernels need to know about positions and intervals; see triton.table for `left`, window and `right`.

    Attributes:
        keys_BK: Numbers in the order of the text; `[B, K, 0]` if positions are those of storage.
        queries_B5Q: int32, start, horizon, keys left of the query itself, and the ends of its interval in the window.
        tiles_BT6: int32, keys that a tile of 64 queries sees, its window, keys that all its queries see.
        windows_BTW: The keys of each window; empty likewise.
        rows_BT2K: int16, or int32 from 32768 keys on: `left` and `right`; empty likewise.
        blocks_BN6: int32, tiles that see a block of 64 keys, those that see it in full, those with a long window;
            empty for few queries.
    """

    keys_BK: Tensor
    queries_B5Q: Tensor
    tiles_BT6: Tensor
    windows_BTW: Tensor
    rows_BT2K: Tensor
    blocks_BN6: Tensor

    @property
    def made_for(self) -> tuple[int, int, int]:
        """B, Q and K."""
        return len(self.queries_B5Q), self.queries_B5Q.shape[2], self.keys_BK.shape[1]


def ranks(keys_BK: Tensor, sorted_BK: Tensor) -> Tensor:
    """Return how many keys stand left of each."""
    return torch.searchsorted(sorted_BK, keys_BK)


def text_order(positions_BK: Tensor, num_queries: int) -> Tensor:
    """Return numbers in the order of positions: fast to compare, float32, unless there are few queries."""
    positions_BK = positions_BK.contiguous()
    if num_queries <= FEW_QUERIES:
        return positions_BK
    rank_BK = ranks(positions_BK, positions_BK.sort(1).values)
    return rank_BK.float() if rank_BK.shape[1] <= EXACT else rank_BK


def table_outputs(keys: Tensor | None, horizon: Tensor, num_keys: int) -> tuple[Tensor, ...]:
    """Return memory for a table, all but its keys."""
    (B, Q), K = horizon.shape, num_keys
    n_tiles, n_blocks = -(-Q // TILE), -(-K // TILE)
    ints = {"like": horizon, "dtype": torch.int32}
    windows, rows = (0,), (0,)
    if keys is not None:
        windows, rows = (B, n_tiles, TILE), (B, n_tiles, 2, K)
    return (
        empty(B, 5, Q, **ints),
        empty(B, n_tiles, 6, **ints),
        empty(*windows, like=horizon, dtype=torch.float32 if keys is None else keys.dtype),
        empty(*rows, like=horizon, dtype=torch.int16 if K < 2**15 else torch.int32),
        empty(*((B, n_blocks, 6) if Q > FEW_QUERIES else (0,)), **ints),
    )


@operator("insertion_table")
def insertion_table(
    keys: Tensor | None, horizon: Tensor, start: Tensor, entries: Tensor, num_keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton.table import launch_table

    outputs = table_outputs(keys, horizon, num_keys)
    launch_table(keys, horizon, start, entries, num_keys, outputs)
    return outputs


@insertion_table.register_fake
def _(keys, horizon, start, entries, num_keys):
    return table_outputs(keys, horizon, num_keys)


def make_table(
    positions_BK: Tensor | None, horizon_BQ: Tensor, start_BQ: Tensor, entries_BQ: Tensor, num_keys: int
) -> OffsetTable:
    keys_BK = None if positions_BK is None else text_order(positions_BK, horizon_BQ.shape[1])
    intervals = (x.contiguous() for x in (horizon_BQ, start_BQ, entries_BQ))
    table = insertion_table(keys_BK, *intervals, num_keys)
    return OffsetTable(horizon_BQ.new_empty(len(horizon_BQ), num_keys, 0) if keys_BK is None else keys_BK, *table)


@operator("insertion_attention")
def insertion_forward(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, queries: Tensor, tiles: Tensor, windows: Tensor, rows: Tensor,
    blocks: Tensor, left: Tensor, right: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .triton.forward import launch_forward

    table = OffsetTable(keys, queries, tiles, windows, rows, blocks)
    return launch_forward(q, k, v, table, left, right, scale)


@insertion_forward.register_fake
def _(q, k, v, keys, queries, tiles, windows, rows, blocks, left, right, scale):
    B, H, Q, D = q.shape
    return q.new_empty(B, Q, H, D).transpose(1, 2), q.new_empty(B, H, Q, dtype=torch.float32)


@operator("insertion_attention_backward")
def insertion_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, keys: Tensor, queries: Tensor,
    tiles: Tensor, windows: Tensor, rows: Tensor, blocks: Tensor, left: Tensor, right: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .triton.backward import launch_backward

    table = OffsetTable(keys, queries, tiles, windows, rows, blocks)
    return launch_backward(dout, q, k, v, out, lse, table, left, right, scale)


@insertion_backward.register_fake
def _(dout, q, k, v, out, lse, keys, queries, tiles, windows, rows, blocks, left, right, scale):
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *others, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, *others)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _dlse):
    dq, dk, dv = insertion_backward(dout, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, *[None] * 9


insertion_forward.register_autograd(_backward, setup_context=_setup_context)


@operator("insertion_attention_decode")
def insertion_decode(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, queries: Tensor, tiles: Tensor, windows: Tensor, rows: Tensor,
    blocks: Tensor, left: Tensor, right: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    from .triton.decode import launch_decode

    table = OffsetTable(keys, queries, tiles, windows, rows, blocks)
    return launch_decode(q, k, v, table, left, right, scale)


@insertion_decode.register_fake
def _(q, k, v, keys, queries, tiles, windows, rows, blocks, left, right, scale):
    B, H, Q, D = q.shape
    return q.new_empty(B, Q, H, D).transpose(1, 2)
