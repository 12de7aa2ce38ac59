"""Triton kernel of the forward pass.

A program holds 64 queries of one head, or of two that share the counts, and streams the blocks of keys they see; the
softmax is kept in powers of two. Edge blocks, which some query sees in part, are masked; the blocks between are not.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    block_index,
    block_offsets,
    block_ranges,
    load_bounds,
    load_rows,
    load_window_bounds,
    log2_slopes,
    within,
)


@triton.jit
def attend(
    b_acc, b_max, b_sum, b_q, p_k, p_v, o_j, i_lo, i_hi, stride_kn, stride_vn, b_offset, m_seen, b_left, b_right,
    scale, D: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into the running softmax of one head."""
    b_k = load_rows(p_k, o_j, i_lo, i_hi, stride_kn, D, BD, MASK, UP)
    b_v = load_rows(p_v, o_j, i_lo, i_hi, stride_vn, D, BD, MASK, UP)
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
    q, k, v, out, lse, keys, queries, tiles, windows, rows, left, right, scale, H, Q, K, T, stride_f,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    TABLE: tl.constexpr, LAST: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    # long tiles first
    i_t, i_h, i_b = T - 1 - tl.program_id(0), tl.program_id(1) * HEADS, tl.program_id(2).to(tl.int64)
    o_i = i_t * W + tl.arange(0, W)
    m_i = o_i < Q
    queries, keys, p_row = queries + i_b * Q, keys + i_b * K, rows + (i_b * T + i_t) * 2 * K
    b_start, b_horizon, b_own = load_bounds(queries, o_i, m_i, stride_f)
    ranges = block_ranges(tiles + (i_b * T + i_t) * 6, BN, W)
    i_lo, i_hi, i_w0, i_w1, i_first, i_full, n_full, n_edge = ranges
    if TABLE:
        b_first, b_last, b_from_left, b_to_right = load_window_bounds(queries, o_i, m_i, stride_f, W)
        b_within = within(b_first, b_last, W)
        b_window = tl.load(windows + (i_b * T + i_t) * W + tl.arange(0, W))

    q += i_b * stride_qb + i_h * stride_qh
    p_k, p_v = k + i_b * stride_kb + (i_h // GROUP) * stride_kg, v + i_b * stride_vb + (i_h // GROUP) * stride_vg
    b_q = load_rows(q, o_i, 0, Q, stride_qn, D, BD, True, UP)
    b_left, b_right = log2_slopes(left, right, i_h)
    b_acc = tl.zeros([W, BD], tl.float32)
    b_max, b_sum = tl.full([W], -float("inf"), tl.float32), tl.zeros([W], tl.float32)
    b_acc2, b_max2, b_sum2 = b_acc, b_max, b_sum
    if HEADS == 2:
        i_g2 = (i_h + 1) // GROUP
        p_k2, p_v2 = k + i_b * stride_kb + i_g2 * stride_kg, v + i_b * stride_vb + i_g2 * stride_vg
        b_q2 = load_rows(q + stride_qh, o_i, 0, Q, stride_qn, D, BD, True, UP)
        b_left2, b_right2 = log2_slopes(left, right, i_h + 1)

    # 0: edge blocks, 1: full blocks, 2: every block of a tile with a wide window
    for KIND in tl.static_range(3 if TABLE else 2):
        n_blocks = n_full if KIND == 1 else tl.where((i_w1 - i_w0 > W) == (KIND == 2), n_edge, 0)
        for i_n in range(0, n_blocks):
            o_j = block_index(i_n, i_first, i_full, n_full, KIND) * BN + tl.arange(0, BN)
            if TABLE:
                b_offset = block_offsets(
                    keys, p_row, o_j, K, b_start, b_horizon, b_own, b_from_left, b_to_right, b_within, b_window,
                    i_w0, i_w1, 2 if KIND == 2 else 1, KIND != 1, W, LAST,
                )  # fmt: skip
            else:
                b_offset = o_j.to(tl.float32)[None, :] - b_own[:, None]
            m_seen = (o_j[None, :] >= b_start[:, None]) & (o_j[None, :] <= b_horizon[:, None])
            b_acc, b_max, b_sum = attend(
                b_acc, b_max, b_sum, b_q, p_k, p_v, o_j, i_lo, i_hi, stride_kn, stride_vn, b_offset, m_seen,
                b_left, b_right, scale, D, BD, KIND != 1, UP,
            )  # fmt: skip
            if HEADS == 2:
                b_acc2, b_max2, b_sum2 = attend(
                    b_acc2, b_max2, b_sum2, b_q2, p_k2, p_v2, o_j, i_lo, i_hi, stride_kn, stride_vn, b_offset, m_seen,
                    b_left2, b_right2, scale, D, BD, KIND != 1, UP,
                )  # fmt: skip

    _store(out, lse, b_acc, b_max, b_sum, (i_b * Q + o_i) * H + i_h, (i_b * H + i_h) * Q + o_i, m_i, D, BD)
    if HEADS == 2:
        i_h += 1
        _store(out, lse, b_acc2, b_max2, b_sum2, (i_b * Q + o_i) * H + i_h, (i_b * H + i_h) * Q + o_i, m_i, D, BD)


@triton.jit
def _store(out, lse, b_acc, b_max, b_sum, o_out, o_lse, m_i, D: tl.constexpr, BD: tl.constexpr):
    """Store `[B, Q, H, D]` and, in powers of two, `[B, H, Q]`; a query that saw nothing gets 0 and +inf."""
    o_d = tl.arange(0, BD)
    b_safe = tl.where(b_sum == 0, 1.0, b_sum)
    b_out = b_acc / b_safe[:, None]
    p_out = out + o_out[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_i[:, None] & (o_d[None, :] < D))
    tl.store(lse + o_lse, tl.where(b_sum == 0, float("inf"), b_max + tl.log2(b_safe)), mask=m_i)
