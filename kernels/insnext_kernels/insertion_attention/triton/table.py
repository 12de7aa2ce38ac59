"""Triton kernels of the offset table: everything about intervals and distances that heads and layers share.

Queries come in tiles of W = 64. A count over an interval, #{k in [start_i, horizon_i] : p_k < p_j}, is cut in three:

    keys         lo ......... w0 ............ w1 ......... hi
    counted by   row "left"   window          row "right"

`left` serves the queries that start at lo, the others start inside the window or behind it; `right` serves those that
end at hi, the others end inside the window or before it. So the two rows hold one number a key, whatever the
intervals are, and only the window is counted query by query. With one text in sight the window is the tile itself: at
most 64 keys, since only one block can reach beyond its end. A longer window (starts that slide, several far horizons)
is right too, it only costs more.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from ...common import empty
from ..ops import FEW_QUERIES, TILE, ranks
from .tiles import (
    BLOCK_FIELDS,
    FULL_END,
    FULL_FIRST,
    FULL_HI,
    FULL_LO,
    HI,
    HORIZON,
    LO,
    OWN,
    QUERY_FIELDS,
    SEEN_END,
    SEEN_FIRST,
    START,
    TILE_FIELDS,
    WIDE_END,
    WIDE_FIRST,
    WINDOW_FIRST,
    WINDOW_HI,
    WINDOW_LAST,
    WINDOW_LO,
    last_key,
)


# tiles that a program of the rows goes through
TABLE_STEPS = 32
# comparisons of a few queries' rows from which a sort is to cost less; an estimate, no GPU was at hand
SORTED_FROM = 2**29
# more than any index, and room to add 1
NONE = tl.constexpr(1 << 30)


@triton.jit(do_not_specialize=["Q"])
def _plan_kernel(
    keys, start, horizon, entries, queries, tiles, windows, Q, K,
    W: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, TABLE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # M queries of a tile of W, where there are no more; behind the last query it is repeated
    o_i = tl.minimum(i_t * W + tl.arange(0, M), Q - 1)
    # both ends are bounded on both sides before anything is narrowed
    b_start = tl.minimum(tl.maximum(tl.load(start + i_b * Q + o_i), 0), K).to(tl.int32)
    b_horizon = tl.minimum(tl.maximum(tl.load(horizon + i_b * Q + o_i), -1), K - 1).to(tl.int32)
    b_entry = tl.minimum(tl.maximum(tl.load(entries + i_b * Q + o_i), 0), K - 1).to(tl.int32)
    m_i = b_start <= b_horizon

    i_lo = tl.min(tl.where(m_i, b_start, NONE), 0)
    i_hi = tl.max(tl.where(m_i, b_horizon, -1), 0) + 1
    i_full_lo = tl.max(tl.where(m_i, b_start, -1), 0)
    i_full_hi = tl.min(tl.where(m_i, b_horizon, NONE), 0) + 1
    i_second = tl.min(tl.where(m_i & (b_start > i_lo), b_start, NONE), 0)
    i_w0 = tl.minimum(i_second, i_full_hi)
    i_w1 = tl.max(tl.where(m_i & (b_horizon + 1 < i_hi), b_horizon, -1), 0) + 1
    i_w1 = tl.maximum(tl.maximum(i_w1, i_full_lo), i_w0)
    # what the window can hold needs no row of its own
    i_w1 = tl.where(i_hi - i_w0 <= W, i_hi, i_w1)
    if i_hi == 0:
        i_lo, i_w0, i_w1 = 0, 0, 0
    if not TABLE:
        i_w0, i_w1 = 0, 0
    # a query that sees nothing sees no key in full
    is_plain = tl.min(m_i.to(tl.int32), 0) == 1
    if TABLE:
        # nor is a tile in full view unless its queries all need `left` and none needs `right`: one text, causal
        is_plain = is_plain & (i_second == NONE) & (i_w1 == i_hi) & (i_w1 - i_w0 <= W)
    i_full_hi = tl.where(is_plain, i_full_hi, 0)

    p_tile = tiles + (i_b * tl.num_programs(0) + i_t) * TILE_FIELDS
    tl.store(p_tile + LO, i_lo)
    tl.store(p_tile + HI, i_hi)
    tl.store(p_tile + WINDOW_LO, i_w0)
    tl.store(p_tile + WINDOW_HI, i_w1)
    tl.store(p_tile + FULL_LO, i_full_lo)
    tl.store(p_tile + FULL_HI, i_full_hi)

    if TABLE:
        b_key = tl.load(keys + i_b * K + b_entry)
        b_own = tl.zeros([M], dtype=tl.int32)
        for i_k in range(i_lo, i_hi, BK):
            o_k = i_k + tl.arange(0, BK)
            b_k = tl.load(keys + i_b * K + o_k, mask=o_k < i_hi, other=LAST)
            m_k = (o_k[None, :] >= b_start[:, None]) & (o_k[None, :] <= b_horizon[:, None])
            b_own += tl.sum((m_k & (b_k[None, :] < b_key[:, None])).to(tl.int32), 1)
        o_w = tl.arange(0, W)
        b_window = tl.load(keys + i_b * K + i_w0 + o_w, mask=i_w0 + o_w < i_w1, other=LAST)
        tl.store(windows + (i_b * tl.num_programs(0) + i_t) * W + o_w, b_window)
    else:
        b_own = tl.minimum(tl.maximum(b_entry, b_start), b_horizon + 1)

    p_query = queries + i_b * QUERY_FIELDS * Q + o_i
    tl.store(p_query + START * Q, b_start)
    tl.store(p_query + HORIZON * Q, b_horizon)
    tl.store(p_query + OWN * Q, b_own)
    # inside the window; -1 is left, W right of it
    tl.store(p_query + WINDOW_FIRST * Q, tl.where(b_start < i_w0, -1, tl.minimum(b_start - i_w0, W)))
    b_last = tl.minimum(tl.maximum(b_horizon - i_w0, -1), W - 1)
    tl.store(p_query + WINDOW_LAST * Q, tl.where(b_horizon >= i_w1, W, b_last))


@triton.jit
def _count(keys, b_key, i_from, i_to, BK: tl.constexpr, LAST: tl.constexpr):
    """Return #{k in [i_from, i_to) : p_k < p_j} for every key j of a block; 0 if i_to <= i_from."""
    b_count = tl.zeros_like(b_key).to(tl.int32)
    for i_k in range(i_from, i_to, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = tl.load(keys + o_k, mask=o_k < i_to, other=LAST)
        b_count += tl.sum((b_k[:, None] < b_key[None, :]).to(tl.int32), 0)
    return b_count


@triton.jit(do_not_specialize=["T"])
def _rows_kernel(
    keys, tiles, rows, K, T,
    STEPS: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    i_j, i_part, i_b = tl.program_id(0) * BJ, tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys += i_b * K
    o_j = i_j + tl.arange(0, BJ)
    b_key = tl.load(keys + o_j, mask=o_j < K, other=LAST)
    # b_left counts the keys in [i_from, i_to); from tile to tile only the ends move
    b_left = tl.zeros([BJ], dtype=tl.int32)
    i_from, i_to = 0, 0
    for i_t in range(i_part * STEPS, tl.minimum(T, (i_part + 1) * STEPS)):
        p_tile = tiles + (i_b * T + i_t) * TILE_FIELDS
        i_lo, i_hi = tl.load(p_tile + LO), tl.load(p_tile + HI)
        i_w0, i_w1 = tl.load(p_tile + WINDOW_LO), tl.load(p_tile + WINDOW_HI)
        if (i_lo < i_j + BJ) & (i_hi > i_j):
            if tl.abs(i_lo - i_from) + tl.abs(i_w0 - i_to) > i_w0 - i_lo:
                b_left = tl.zeros([BJ], dtype=tl.int32)
                i_from, i_to = i_lo, i_lo
            b_left += _count(keys, b_key, i_to, i_w0, BK, LAST) - _count(keys, b_key, i_w0, i_to, BK, LAST)
            b_left += _count(keys, b_key, i_lo, i_from, BK, LAST) - _count(keys, b_key, i_from, i_lo, BK, LAST)
            i_from, i_to = i_lo, i_w0
            p_row = rows + (i_b * T + i_t) * 2 * K + o_j
            tl.store(p_row, b_left.to(rows.dtype.element_ty), mask=o_j < K)
            b_right = _count(keys, b_key, i_w1, i_hi, BK, LAST)
            tl.store(p_row + K, b_right.to(rows.dtype.element_ty), mask=o_j < K)


@triton.jit(do_not_specialize=["T"])
def _blocks_kernel(tiles, blocks, T, W: tl.constexpr, BT: tl.constexpr):
    i_n, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_j = i_n * W
    b_first, b_last = tl.zeros([BT], tl.int32) + T, tl.zeros([BT], tl.int32)
    b_full_first, b_full_last, b_full = b_first, b_last, b_last
    b_wide_first, b_wide_last = b_first, b_last
    for i_t in range(0, T, BT):
        o_t = i_t + tl.arange(0, BT)
        p_tile, m_t = tiles + (i_b * T + o_t) * TILE_FIELDS, o_t < T
        b_lo, b_hi = tl.load(p_tile + LO, mask=m_t, other=0), tl.load(p_tile + HI, mask=m_t, other=0)
        b_w0, b_w1 = tl.load(p_tile + WINDOW_LO, mask=m_t, other=0), tl.load(p_tile + WINDOW_HI, mask=m_t, other=0)
        b_full_lo = tl.load(p_tile + FULL_LO, mask=m_t, other=0)
        b_full_hi = tl.load(p_tile + FULL_HI, mask=m_t, other=0)
        m_seen = (b_lo < i_j + W) & (b_hi > i_j)
        m_wide = m_seen & (b_w1 - b_w0 > W)
        m_narrow = m_seen & (b_w1 - b_w0 <= W)
        m_full = m_narrow & (b_full_lo <= i_j) & (b_full_hi >= i_j + W)
        b_first, b_last = _stretch(b_first, b_last, m_narrow, o_t)
        b_full_first, b_full_last = _stretch(b_full_first, b_full_last, m_full, o_t)
        b_wide_first, b_wide_last = _stretch(b_wide_first, b_wide_last, m_wide, o_t)
        b_full += m_full.to(tl.int32)
    i_last = tl.max(b_last, 0)
    i_full_first, i_full_last = tl.min(b_full_first, 0), tl.max(b_full_last, 0)
    # intervals that do not ascend may leave holes
    if tl.sum(b_full, 0) != i_full_last - i_full_first:
        i_full_first, i_full_last = i_last, i_last
    p_block = blocks + (i_b * tl.num_programs(0) + i_n) * BLOCK_FIELDS
    tl.store(p_block + SEEN_FIRST, tl.min(b_first, 0))
    tl.store(p_block + SEEN_END, i_last)
    tl.store(p_block + FULL_FIRST, i_full_first)
    tl.store(p_block + FULL_END, i_full_last)
    tl.store(p_block + WIDE_FIRST, tl.min(b_wide_first, 0))
    tl.store(p_block + WIDE_END, tl.max(b_wide_last, 0))


@triton.jit
def _stretch(b_first, b_last, m_t, o_t):
    return tl.where(m_t, tl.minimum(b_first, o_t), b_first), tl.where(m_t, tl.maximum(b_last, o_t + 1), b_last)


def launch_table(keys, horizon, start, entries, num_keys: int, outputs: tuple[torch.Tensor, ...]) -> None:
    """Fill the tensors that `ops.table_outputs` made, in their order."""
    (B, Q), K = horizon.shape, num_keys
    queries, tiles, windows, rows, blocks = outputs
    T, few, in_text = tiles.shape[1], Q <= FEW_QUERIES, keys is not None
    last = last_key(keys) if in_text else 0
    _plan_kernel[(T, B)](
        keys if in_text else tiles, start, horizon, entries, queries, tiles, windows if in_text else tiles, Q, K,
        W=TILE, M=FEW_QUERIES if few else TILE, BK=256 if few else 128, TABLE=in_text, LAST=last, num_warps=8,
    )  # fmt: skip
    if in_text and few and B * K**2 >= SORTED_FROM:
        sorted_rows(keys, tiles, rows)
    elif in_text:
        # one step waits for this: few long strides, and many programs
        block, stride, warps = (32, 256, 8) if few else (64, 64, 4)
        _rows_kernel[(triton.cdiv(K, block), triton.cdiv(T, TABLE_STEPS), B)](
            keys, tiles, rows, K, T, STEPS=TABLE_STEPS, BJ=block, BK=stride, LAST=last, num_warps=warps
        )
    if not few:
        launch_blocks(tiles, K, blocks)


def launch_blocks(tiles: torch.Tensor, num_keys: int, blocks: torch.Tensor | None = None) -> torch.Tensor:
    """Return which tiles see each block of keys, written into `blocks` where given."""
    B, T = tiles.shape[:2]
    n_blocks = triton.cdiv(num_keys, TILE)
    blocks = empty(B, n_blocks, 6, like=tiles) if blocks is None else blocks
    _blocks_kernel[(n_blocks, B)](tiles, blocks, T, W=TILE, BT=128, num_warps=4)
    return blocks


def sorted_rows(keys_BK: torch.Tensor, tiles_B16: torch.Tensor, rows_B12K: torch.Tensor) -> None:
    """Write the rows of one tile of queries in O(K log K), where `_rows_kernel` makes O(K^2) comparisons."""
    sorted_BK, order_BK = keys_BK.sort(1)
    rank_BK = ranks(keys_BK, sorted_BK)
    lo_B1, hi_B1, w0_B1, w1_B1, _, _ = tiles_B16[:, 0, :, None].unbind(1)
    for row, (first_B1, end_B1) in enumerate(((lo_B1, w0_B1), (w1_B1, hi_B1))):
        counted_BK = (order_BK >= first_B1) & (order_BK < end_B1)
        before_BK = pad(counted_BK.cumsum(1), (1, 0))
        rows_B12K[:, 0, row] = before_BK.gather(1, rank_BK)
