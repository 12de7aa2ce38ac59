"""Triton kernels for few queries over many keys.

The heads that share a key head and their queries form one tile of rows; the keys that anybody sees are divided evenly
among programs, and a second kernel merges what these leave. How many programs there are does not depend on lengths,
so that a step keeps its shape; a program without keys leaves at once.
"""

import triton
import triton.language as tl

from .triton_forward import attend
from .triton_tiles import block_offsets, load_bounds, load_window_bounds


@triton.jit(do_not_specialize=["G", "Q"])
def _decode_kernel(
    q, k, v, parts, sums, keys, queries, tiles, windows, rows, left, right, scale, G, Q, K, stride_f,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    TABLE: tl.constexpr, LAST: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    i_part, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_parts = tl.num_programs(0)
    i_lo, i_hi, i_w0, i_w1 = tl.load(tiles + i_b * 6), tl.load(tiles + i_b * 6 + 1), 0, 0
    n_each = tl.cdiv(tl.cdiv(i_hi - i_lo, BN), n_parts) * BN
    i_from = i_lo + i_part * n_each
    i_to = tl.minimum(i_from + n_each, i_hi)
    # row r is query r % Q of head r // Q of the group
    o_r, o_d = tl.arange(0, M), tl.arange(0, BD)
    m_r = o_r < GROUP * Q
    o_h, o_i = i_g * GROUP + o_r // Q, o_r % Q
    # parts [B, G, n_parts, M, BD], sums [2, B, G, n_parts, M]
    i_out = (i_b * G + i_g) * n_parts + i_part
    p_max = sums + i_out * M + o_r
    p_sum = p_max + tl.num_programs(2).to(tl.int64) * G * n_parts * M
    if i_from >= i_to:
        tl.store(p_max, tl.full([M], -float("inf"), tl.float32))
        return

    queries, keys, p_row = queries + i_b * Q, keys + i_b * K, rows + i_b * 2 * K
    b_start, b_horizon, b_own = load_bounds(queries, o_i, m_r, stride_f)
    if TABLE:
        i_w0, i_w1 = tl.load(tiles + i_b * 6 + 2), tl.load(tiles + i_b * 6 + 3)
        _, _, b_from_left, b_to_right = load_window_bounds(queries, o_i, m_r, stride_f, W)
    b_left = tl.load(left + o_h, mask=m_r, other=0.0)[:, None] * 1.4426950408889634
    b_right = tl.load(right + o_h, mask=m_r, other=0.0)[:, None] * 1.4426950408889634
    p_q = q + i_b * stride_qb + o_h[:, None] * stride_qh + o_i[:, None] * stride_qn + o_d[None, :]
    b_q = tl.load(p_q, mask=m_r[:, None] & (o_d[None, :] < D), other=0.0)
    b_q = b_q.to(tl.float32) if UP else b_q
    p_k, p_v = k + i_b * stride_kb + i_g * stride_kg, v + i_b * stride_vb + i_g * stride_vg
    b_acc = tl.zeros([M, BD], tl.float32)
    b_max, b_sum = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32)

    # queries that see the same keys, as one query does, have no window: then the first pass does it all
    for WINDOW in tl.static_range(0, 3 if TABLE else 1, 2):
        i_end = i_to if (i_w1 > i_w0) == (WINDOW == 2) else i_from
        for i_j in range(i_from, i_end, BN):
            o_j = i_j + tl.arange(0, BN)
            m_seen = (o_j[None, :] >= b_start[:, None]) & (o_j[None, :] <= b_horizon[:, None]) & (o_j < i_to)[None, :]
            if TABLE:
                b_offset = block_offsets(
                    keys, p_row, o_j, K, b_start, b_horizon, b_own, b_from_left, b_to_right, None, None, i_w0, i_w1,
                    WINDOW, True, W, LAST,
                )  # fmt: skip
            else:
                b_offset = o_j.to(tl.float32)[None, :] - b_own[:, None]
            b_acc, b_max, b_sum = attend(
                b_acc, b_max, b_sum, b_q, p_k, p_v, o_j, i_from, i_to, stride_kn, stride_vn, b_offset, m_seen,
                b_left, b_right, scale, D, BD, True, UP,
            )  # fmt: skip
    tl.store(p_max, b_max)
    tl.store(p_sum, b_sum)
    tl.store(parts + (i_out * M + o_r)[:, None] * BD + o_d[None, :], b_acc)


@triton.jit(do_not_specialize=["H", "G", "Q", "n_parts"])
def _merge_kernel(
    parts, sums, out, H, G, Q, n_parts,
    GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    i_r, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_s, o_d = tl.arange(0, S), tl.arange(0, BD)
    o_part = ((i_b * G + i_g) * n_parts + o_s) * M + i_r
    b_max = tl.load(sums + o_part, mask=o_s < n_parts, other=-float("inf"))
    # programs without keys left nothing but their maximum
    m_s = b_max > -float("inf")
    b_sum = tl.load(sums + tl.num_programs(2).to(tl.int64) * G * n_parts * M + o_part, mask=m_s, other=0.0)
    b_acc = tl.load(parts + o_part[:, None] * BD + o_d[None, :], mask=m_s[:, None], other=0.0)
    b_weight = tl.where(m_s, tl.exp2(b_max - tl.max(tl.where(m_s, b_max, -1e38), 0)), 0.0)
    b_total = tl.sum(b_weight * b_sum, 0)
    b_out = tl.sum(b_weight[:, None] * b_acc, 0) / tl.where(b_total == 0, 1.0, b_total)
    # [B, Q, H, D]
    p_out = out + ((i_b * Q + i_r % Q) * H + i_g * GROUP + i_r // Q) * D + o_d
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=o_d < D)
