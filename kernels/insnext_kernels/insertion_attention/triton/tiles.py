"""What the forward, backward and decode kernels share: records of the table, tiles, counts, launch parameters."""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...common import interpreting
from ...language import LOG2_E, block, is_wide
from ..ops import TILE, OffsetTable


# a record of `OffsetTable.queries`: interval, keys left of the query itself, ends of the interval in the window
START, HORIZON, OWN, WINDOW_FIRST, WINDOW_LAST, QUERY_FIELDS = (tl.constexpr(i) for i in range(6))
# a record of `OffsetTable.tiles`: keys that some query sees, the window, keys that all queries see
LO, HI, WINDOW_LO, WINDOW_HI, FULL_LO, FULL_HI, TILE_FIELDS = (tl.constexpr(i) for i in range(7))
# a record of `OffsetTable.blocks`: tiles that see the block, those that see it in full, those with a long window
SEEN_FIRST, SEEN_END, FULL_FIRST, FULL_END, WIDE_FIRST, WIDE_END, BLOCK_FIELDS = (tl.constexpr(i) for i in range(7))


class Launch(NamedTuple):
    """Keys of a block, warps and pipeline stages."""

    keys: int
    warps: int
    stages: int


class Config(NamedTuple):
    forward: Launch
    backward_queries: Launch
    backward_keys: Launch
    decode: Launch


def config_for(head_dim: int, dtype: torch.dtype) -> Config:
    """Return the launch parameters; `INSNEXT_INSERTION_TILES`, the 12 numbers in this order, sets others."""
    chosen = os.environ.get("INSNEXT_INSERTION_TILES")
    if chosen:
        numbers = [int(x) for x in chosen.split(",")]
        return Config(*(Launch(*numbers[i : i + 3]) for i in (0, 3, 6, 9)))
    if dtype == torch.float32:
        # products in full precision run on ordinary units, whose operands lie in registers
        return Config(Launch(32, 8, 1), Launch(32, 8, 1), Launch(64, 8, 1), Launch(32, 4, 2))
    if head_dim <= 64:
        return Config(Launch(64, 4, 3), Launch(64, 4, 2), Launch(128, 8, 2), Launch(64, 4, 3))
    return Config(Launch(64, 8, 2), Launch(32, 4, 2), Launch(64, 8, 2), Launch(64, 4, 2))


def last_key(keys: torch.Tensor) -> float | int:
    """Return what stands right of every key."""
    return float("inf") if keys.is_floating_point() else torch.iinfo(keys.dtype).max


def constants(q: torch.Tensor, k: torch.Tensor, table: OffsetTable, *others: torch.Tensor) -> dict:
    """Return the compile-time constants that all kernels take; `others` are read or written by row as well."""
    in_text = table.keys_BK.numel() > 0
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[-1],
        "BD": block(q.shape[-1]),
        "W": TILE,
        "TABLE": in_text,
        "LAST": last_key(table.keys_BK) if in_text else 0,
        # the interpreter cannot compute in bfloat16
        "UP": interpreting() and q.dtype == torch.bfloat16,
        "WIDE": is_wide(q, k, *others),
    }


class Query(NamedTuple):
    """What a tile knows of its queries, each `[queries]`; the last four matter with a table only."""

    start: tl.tensor
    horizon: tl.tensor
    own: tl.tensor
    first: tl.tensor
    last: tl.tensor
    from_left: tl.tensor
    to_right: tl.tensor


class Ranges(NamedTuple):
    """What a tile of queries sees, in keys and in blocks of keys.

    Keys [lo, hi) and the window [w0, w1); the first block; the first of the `n_full` blocks that need no mask; the
    number of edge blocks around those, or of all blocks if the window is wide.
    """

    lo: tl.tensor
    hi: tl.tensor
    w0: tl.tensor
    w1: tl.tensor
    first: tl.tensor
    full: tl.tensor
    n_full: tl.tensor
    n_edge: tl.tensor


@triton.jit
def load_rows(p_x, o_n, i_lo, i_hi, stride, D: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr, UP: tl.constexpr):
    """Return rows o_n of a matrix `[*, D]`; with MASK 0 where a row lies outside [i_lo, i_hi)."""
    o_d = tl.arange(0, BD)
    p_x += o_n[:, None] * stride + o_d[None, :]
    if MASK:
        m_x = (o_n >= i_lo) & (o_n < i_hi)
        b_x = tl.load(p_x, mask=m_x[:, None] & (o_d[None, :] < D), other=0.0)
    elif BD != D:
        b_x = tl.load(p_x, mask=o_d[None, :] < D, other=0.0)
    else:
        b_x = tl.load(p_x)
    return b_x.to(tl.float32) if UP else b_x


@triton.jit
def store_rows(p_x, b_x, o_n, N, stride, D: tl.constexpr, BD: tl.constexpr):
    """Store rows o_n of a matrix `[N, D]`."""
    o_d = tl.arange(0, BD)
    m_x = (o_n < N)[:, None] & (o_d[None, :] < D)
    tl.store(p_x + o_n[:, None] * stride + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def block_ranges(p_tile, BN: tl.constexpr):
    i_lo, i_hi = tl.load(p_tile + LO), tl.load(p_tile + HI)
    i_first, i_last = i_lo // BN, tl.cdiv(i_hi, BN)
    i_full, i_part = tl.cdiv(tl.load(p_tile + FULL_LO), BN), tl.load(p_tile + FULL_HI) // BN
    n_full = tl.maximum(i_part - i_full, 0)
    i_full = tl.where(n_full > 0, i_full, i_last)
    i_w0, i_w1 = tl.load(p_tile + WINDOW_LO), tl.load(p_tile + WINDOW_HI)
    return Ranges(i_lo, i_hi, i_w0, i_w1, i_first, i_full, n_full, i_last - i_first - n_full)


@triton.jit
def block_index(i_n, i_first, i_full, n_full, KIND: tl.constexpr):
    """Return the i_n-th block (or tile) of a kind: 1 is full; the others lie on both sides of the full ones."""
    return i_full + i_n if KIND == 1 else i_first + i_n + tl.where(i_first + i_n < i_full, 0, n_full)


@triton.jit
def load_bounds(p_query, o_i, Q, m_i):
    """Return start, horizon and own count of queries; those beyond the last one see nothing."""
    b_start = tl.load(p_query + START * Q + o_i, mask=m_i, other=0)
    b_horizon = tl.load(p_query + HORIZON * Q + o_i, mask=m_i, other=-1)
    return b_start, b_horizon, tl.load(p_query + OWN * Q + o_i, mask=m_i, other=0).to(tl.float32)


@triton.jit
def load_window_bounds(p_query, o_i, Q, m_i, W: tl.constexpr):
    """Return first and last key of the window that queries see, and whether they need the left and the right row."""
    b_first = tl.load(p_query + WINDOW_FIRST * Q + o_i, mask=m_i, other=0)
    b_last = tl.load(p_query + WINDOW_LAST * Q + o_i, mask=m_i, other=0)
    return b_first, b_last, (b_first < 0).to(tl.float32), (b_last == W).to(tl.float32)


@triton.jit
def load_query(p_query, o_i, Q, m_i, W: tl.constexpr):
    return Query(*load_bounds(p_query, o_i, Q, m_i), *load_window_bounds(p_query, o_i, Q, m_i, W))


@triton.jit
def within(b_first, b_last, W: tl.constexpr, FLIP: tl.constexpr = False):
    """Return `[queries, W]`, flipped `[W, queries]`: 1 where a query sees a key of the window."""
    o_w = tl.arange(0, W)
    if FLIP:
        m_w = (o_w[:, None] >= b_first[None, :]) & (o_w[:, None] <= b_last[None, :])
    else:
        m_w = (o_w[None, :] >= b_first[:, None]) & (o_w[None, :] <= b_last[:, None])
    return m_w.to(tl.float16)


@triton.jit
def left_of(b_window, p_key, m_key, W: tl.constexpr, LAST: tl.constexpr, MASK: tl.constexpr):
    """Return `[W, keys]`: 1 where a key of the window stands left of a key of the block.

    The keys are loaded once for each row: threads then hold four neighbours, and store what they find in one go.
    """
    p_keys = p_key[None, :] + tl.zeros([W, 1], tl.int32)
    b_keys = tl.load(p_keys, mask=m_key[None, :], other=LAST) if MASK else tl.load(p_keys)
    return (b_window[:, None] < b_keys).to(tl.float16)


@triton.jit
def stands_left(b_window, b_key, FLIP: tl.constexpr):
    """Return the same for keys in registers, `[W, keys]`, flipped `[keys, W]`."""
    # compared the other way round and transposed: a thread then keeps few of the values that the loop keeps
    m_w = b_window[:, None] < b_key[None, :] if FLIP else b_window[None, :] < b_key[:, None]
    return tl.trans(m_w.to(tl.float16))


@triton.jit
def add_wide_window(
    b_offset, keys, b_key, b_start, b_horizon, i_w0, i_w1,
    W: tl.constexpr, LAST: tl.constexpr, FLIP: tl.constexpr = False,
):  # fmt: skip
    """Return offsets `[queries, keys]`, flipped `[keys, queries]`, plus the counts of a window of any length."""
    for i_w in range(i_w0, i_w1, W):
        o_w = i_w + tl.arange(0, W)
        b_window = tl.load(keys + o_w, mask=o_w < i_w1, other=LAST)
        b_within = within(b_start - i_w, b_horizon - i_w, W, FLIP)
        b_left_of = stands_left(b_window, b_key, FLIP)
        b_offset = tl.dot(b_left_of, b_within, b_offset) if FLIP else tl.dot(b_within, b_left_of, b_offset)
    return b_offset


@triton.jit
def block_offsets(
    query, keys, p_row, o_j, K, b_within, b_window, i_w0, i_w1,
    WINDOW: tl.constexpr, MASK: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Return offset(i, j), float32 `[queries, keys]`. WINDOW is 0 if it is empty, 1 up to W keys, 2 for any number."""
    if MASK:
        b_left = tl.load(p_row + o_j, mask=o_j < K, other=0).to(tl.float32)
        b_right = tl.load(p_row + K + o_j, mask=o_j < K, other=0).to(tl.float32)
        b_offset = query.to_right[:, None] * b_right[None, :] - query.own[:, None]
        b_offset = query.from_left[:, None] * b_left[None, :] + b_offset
    else:
        b_offset = tl.load(p_row + o_j).to(tl.float32)[None, :] - query.own[:, None]
    if WINDOW == 1:
        b_offset = tl.dot(b_within, left_of(b_window, keys + o_j, o_j < K, W, LAST, MASK), b_offset)
    elif WINDOW == 2:
        b_key = tl.load(keys + o_j, mask=o_j < K, other=LAST)
        b_offset = add_wide_window(b_offset, keys, b_key, query.start, query.horizon, i_w0, i_w1, W, LAST)
    return b_offset


@triton.jit
def log2_slopes(left, right, i_h):
    """Return the slopes of a head for scores in powers of two."""
    return tl.load(left + i_h) * LOG2_E, tl.load(right + i_h) * LOG2_E
