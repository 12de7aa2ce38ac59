"""Triton kernel of the forward pass.

A program holds 64 queries of one head and streams the blocks of keys they see; the softmax is kept in powers of two.
Edge blocks, which some query sees in part, are masked; the blocks between are not.
"""

import torch
import triton
import triton.language as tl

from ...common import empty
from ...language import LOG2_E, contiguous_rows, matrices, widened
from ..ops import OffsetTable
from .tiles import (
    QUERY_FIELDS,
    TILE_FIELDS,
    block_index,
    block_offsets,
    block_ranges,
    config_for,
    constants,
    load_query,
    load_rows,
    log2_slopes,
    store_rows,
    within,
)


@triton.jit
def attend(
    b_acc, b_max, b_sum, b_q, p_k, p_v, o_j, i_lo, i_hi, k_row, v_row, b_offset, m_seen, b_left, b_right, scale,
    D: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into the running softmax of one head."""
    b_k = load_rows(p_k, o_j, i_lo, i_hi, k_row, D, BD, MASK, UP)
    b_v = load_rows(p_v, o_j, i_lo, i_hi, v_row, D, BD, MASK, UP)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    b_s += tl.where(b_offset < 0, b_left, -b_right) * b_offset
    if MASK:
        b_s = tl.where(m_seen, b_s, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # a query that has seen nothing yet needs a finite pivot
    b_pivot = tl.where(b_new == -float("inf"), 0.0, b_new) if MASK else b_new
    b_p = tl.exp2(b_s - b_pivot[:, None])
    b_fade = tl.exp2(b_max - b_pivot)
    b_sum = b_sum * b_fade + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_fade[:, None], input_precision="ieee")
    return b_acc, b_new, b_sum


@triton.jit(do_not_specialize=["H", "Q", "T"])
def _forward_kernel(
    q, k, v, out, lse, table, left, right, scale, H, Q, K, T,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    TABLE: tl.constexpr, LAST: tl.constexpr, UP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # long tiles first
    i_t = T - 1 - tl.program_id(0)
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_i = i_t * W + tl.arange(0, W)
    m_i = o_i < Q
    keys, p_row = table.keys_BK + i_b * K, table.rows_BT2K + (i_b * T + i_t) * 2 * K
    seen = block_ranges(table.tiles_BT6 + (i_b * T + i_t) * TILE_FIELDS, BN)
    query = load_query(table.queries_B5Q + i_b * QUERY_FIELDS * Q, o_i, Q, m_i, W)
    if TABLE:
        b_within = within(query.first, query.last, W)
        b_window = tl.load(table.windows_BTW + (i_b * T + i_t) * W + tl.arange(0, W))

    k_row, v_row = widened(k.row, WIDE), widened(v.row, WIDE)
    p_k = k.data + i_b * k.batch + (i_h // GROUP) * k.head
    p_v = v.data + i_b * v.batch + (i_h // GROUP) * v.head
    b_q = load_rows(q.data + i_b * q.batch + i_h * q.head, o_i, 0, Q, widened(q.row, WIDE), D, BD, True, UP)
    b_left, b_right = log2_slopes(left, right, i_h)
    b_acc = tl.zeros([W, BD], tl.float32)
    b_max, b_sum = tl.full([W], -float("inf"), tl.float32), tl.zeros([W], tl.float32)

    # 0: edge blocks, 1: full blocks, 2: every block of a tile with a wide window
    for KIND in tl.static_range(3 if TABLE else 2):
        n_blocks = seen.n_full if KIND == 1 else tl.where((seen.w1 - seen.w0 > W) == (KIND == 2), seen.n_edge, 0)
        for i_n in range(0, n_blocks):
            o_j = block_index(i_n, seen.first, seen.full, seen.n_full, KIND) * BN + tl.arange(0, BN)
            if TABLE:
                b_offset = block_offsets(
                    query, keys, p_row, o_j, K, b_within, b_window, seen.w0, seen.w1,
                    2 if KIND == 2 else 1, KIND != 1, W, LAST,
                )  # fmt: skip
            else:
                b_offset = o_j.to(tl.float32)[None, :] - query.own[:, None]
            m_seen = (o_j[None, :] >= query.start[:, None]) & (o_j[None, :] <= query.horizon[:, None])
            b_acc, b_max, b_sum = attend(
                b_acc, b_max, b_sum, b_q, p_k, p_v, o_j, seen.lo, seen.hi, k_row, v_row, b_offset, m_seen,
                b_left, b_right, scale, D, BD, KIND != 1, UP,
            )  # fmt: skip

    # a query that saw nothing gets 0 and the normaliser +inf
    b_safe = tl.where(b_sum == 0, 1.0, b_sum)
    p_out = out.data + i_b * out.batch + i_h * out.head
    store_rows(p_out, b_acc / b_safe[:, None], o_i, Q, widened(out.row, WIDE), D, BD)
    b_lse = tl.where(b_sum == 0, float("inf"), b_max + tl.log2(b_safe))
    tl.store(lse + (i_b * H + i_h) * Q + o_i, b_lse, mask=m_i)


def launch_forward(q, k, v, table: OffsetTable, left, right, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, which lies in memory as `[B, Q, H, D]`, and log2 of the normalisers, `[B, H, Q]`."""
    (B, H, Q, D), K, T = q.shape, k.shape[2], table.tiles_BT6.shape[1]
    q, k, v = contiguous_rows(q, k, v)
    out, lse = empty(B, Q, H, D, like=q).transpose(1, 2), empty(B, H, Q, like=q, dtype=torch.float32)
    keys, warps, stages = config_for(D, q.dtype).forward
    _forward_kernel[(T, H, B)](
        *map(matrices, (q, k, v, out)), lse, table, left, right, scale * LOG2_E.value, H, Q, K, T,
        **constants(q, k, table, v, out), BN=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse
