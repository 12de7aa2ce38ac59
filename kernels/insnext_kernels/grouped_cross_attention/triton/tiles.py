"""What the kernels share: rows of a tile, masked loads, and the one fixed configuration of each kernel.

The query heads of one key head are stacked: row r of a query chunk is query r % M of head r // M, so that a chunk read
once serves all of them. A chunk of 65 queries, 64 tokens and a landmark, is a tile of 64 rows and a tail of 16: a
second tile of 64 would double the work for one row.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...common import interpreting
from ...language import block, is_wide


TAIL_ROWS = 16


class Chunks(NamedTuple):
    """Keys or values `[B, G, N, S, D]` for a kernel; strides count elements, that of the last dimension is 1."""

    data: torch.Tensor
    batch: int
    head: int
    chunk: int
    row: int


def chunks(x: torch.Tensor) -> Chunks:
    return Chunks(x, *x.stride()[:4])


class Tiles(NamedTuple):
    """Shape of a launch: rows of a tile, tiles of a query chunk, rows behind the only tile, and compiler options."""

    block_m: int
    count: int
    tail: int
    num_warps: int
    num_stages: int


def tiles(kernel: str, rows: int, S: int, D: int, dtype: torch.dtype) -> Tiles:
    """Return the configuration of `kernel` ("forward", "backward_q" or "backward_kv").

    `INSNEXT_GCA_FORWARD=128,8,3` (rows, warps, stages; `_BACKWARD_Q`, `_BACKWARD_KV` likewise) overrides it.
    """
    wide = max(block(S), block(D)) > 64
    block_m, num_warps, num_stages = _default(kernel, rows, S, D, dtype)
    override = os.environ.get(f"INSNEXT_GCA_{kernel.upper()}")
    if override:
        block_m, num_warps, num_stages = (int(x) for x in override.split(","))
    # backward with a tail and wide tiles has more than the registers hold
    has_tail = 64 <= block_m < rows <= block_m + TAIL_ROWS and (kernel == "forward" or not wide)
    return Tiles(
        block_m, 1 if has_tail else triton.cdiv(rows, block_m), TAIL_ROWS if has_tail else 0, num_warps, num_stages
    )


def _default(kernel: str, rows: int, S: int, D: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Choose by what fits into registers: the tests compile every choice for sm_90 and bound what spills."""
    needed = block(rows)
    wide, both_wide = max(block(S), block(D)) > 64, min(block(S), block(D)) > 64
    few_more = 64 < rows <= 64 + TAIL_ROWS
    if dtype == torch.float32:
        # full precision has no tensor cores: both operands of a product lie in registers; the interpreter pays by tile
        return min(64, needed) if interpreting() else 16, 16 if wide else 8, 1
    if kernel == "backward_kv":
        return min(32 if both_wide or wide and few_more else 64, needed), 8 if wide else 4, 2
    if rows > 64 + TAIL_ROWS and not wide:
        # two warp groups of 64 rows share a chunk
        return 128, 8, 3
    eight_warps = both_wide and kernel == "backward_q" or wide and few_more and kernel == "forward"
    return min(64, needed), 8 if eight_warps else 4, 2 if wide else 3


def constants(q: torch.Tensor, k: torch.Tensor, *others: torch.Tensor) -> dict:
    """Return the compile-time constants that all kernels take; `others` are read or written by row as well."""
    S, D = k.shape[3:]
    # the interpreter computes bfloat16 wrongly, and says nothing
    upcast = interpreting() and q.dtype == torch.bfloat16
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "S": S,
        "D": D,
        "BLOCK_S": block(S),
        "BLOCK_D": block(D),
        "UPCAST": upcast,
        "WIDE": is_wide(q, k, *others),
    }


@triton.jit
def row_offsets(i_first, M, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Return head, query and mask of the stacked rows from `i_first` on."""
    o_r = i_first + tl.arange(0, BLOCK)
    if GROUP == 1:
        o_h = tl.zeros([BLOCK], dtype=tl.int64)
        o_m = o_r
    else:
        o_h = (o_r // M).to(tl.int64)
        o_m = o_r % M
    return o_h, o_m, o_r < GROUP * M


@triton.jit
def load_tile(pointer, o_rows, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Load rows at offsets `o_rows`; what the mask or the width leaves out is 0."""
    o_d = tl.arange(0, BLOCK_D)
    m_tile = m_rows[:, None]
    if D != BLOCK_D:
        m_tile = m_tile & (o_d < D)[None, :]
    b_x = tl.load(pointer + o_rows[:, None] + o_d[None, :], mask=m_tile, other=0.0)
    if UPCAST:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def store_tile(pointer, o_rows, m_rows, b_x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    m_tile = m_rows[:, None]
    if D != BLOCK_D:
        m_tile = m_tile & (o_d < D)[None, :]
    tl.store(pointer + o_rows[:, None] + o_d[None, :], b_x.to(pointer.dtype.element_ty), mask=m_tile)


@triton.jit
def load_slot(indices, weights, i_slot, N, S: tl.constexpr):
    """Return chunk, number of keys (0 without a chunk) and weight of a slot (NaN if the index is too large)."""
    i_n = tl.load(indices + i_slot).to(tl.int64)
    b_w = tl.load(weights + i_slot).to(tl.float32)
    b_w = tl.where(i_n < 0, 0.0, tl.where(i_n < N, b_w, float("nan")))
    return i_n, tl.where((i_n >= 0) & (i_n < N), S, 0), b_w
