"""Triton kernels of the backward pass: one owns the gradients of queries, one those of keys and values; no atomics.

The first also leaves delta_i = sum_d out_id dout_id. The second works on transposed scores, so that the probabilities
are the left operand of its products and never pass through shared memory.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    add_wide_window,
    block_index,
    block_offsets,
    block_ranges,
    load_bounds,
    load_rows,
    load_window_bounds,
    log2_slopes,
    stands_left,
    within,
)


@triton.jit(do_not_specialize=["H", "Q", "T"])
def _queries_kernel(
    q, k, v, out, dout, lse, delta, dq, keys, queries, tiles, windows, rows, left, right, scale, qk_scale,
    H, Q, K, T, stride_f, stride_qb, stride_qh, stride_qn, stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vg, stride_vn, stride_ob, stride_oh, stride_on,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    TABLE: tl.constexpr, LAST: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    i_t, i_h, i_b = T - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_i, o_d = i_t * W + tl.arange(0, W), tl.arange(0, BD)
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
    k += i_b * stride_kb + (i_h // GROUP) * stride_kg
    v += i_b * stride_vb + (i_h // GROUP) * stride_vg
    b_q = load_rows(q, o_i, 0, Q, stride_qn, D, BD, True, UP)
    b_do = load_rows(dout + i_b * stride_ob + i_h * stride_oh, o_i, 0, Q, stride_on, D, BD, True, UP)
    # out and dq [B, Q, H, D], lse and delta [B, H, Q]
    o_out = (i_b * Q + o_i) * H + i_h
    b_out = load_rows(out, o_out, (i_b * Q) * H, (i_b + 1) * Q * H, D, D, BD, True, UP)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + (i_b * H + i_h) * Q + o_i, b_delta, mask=m_i)
    b_lse = tl.load(lse + (i_b * H + i_h) * Q + o_i, mask=m_i, other=float("inf"))
    b_left, b_right = log2_slopes(left, right, i_h)
    b_dq = tl.zeros([W, BD], tl.float32)

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
            b_k = load_rows(k, o_j, i_lo, i_hi, stride_kn, D, BD, KIND != 1, UP)
            b_v = load_rows(v, o_j, i_lo, i_hi, stride_vn, D, BD, KIND != 1, UP)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * qk_scale
            b_s += tl.where(b_offset < 0, b_left, -b_right) * b_offset
            b_p = tl.exp2(b_s - b_lse[:, None])
            if KIND != 1:
                m_seen = (o_j[None, :] >= b_start[:, None]) & (o_j[None, :] <= b_horizon[:, None])
                b_p = tl.where(m_seen, b_p, 0.0)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
            b_dq = tl.dot(b_ds, b_k, b_dq, input_precision="ieee")
    p_dq = dq + o_out[:, None] * D + o_d[None, :]
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_i[:, None] & (o_d[None, :] < D))


@triton.jit(do_not_specialize=["H", "G", "Q", "T"])
def _keys_kernel(
    q, k, v, dout, lse, delta, dk, dv, keys, queries, tiles, blocks, windows, rows, left, right, scale, qk_scale,
    H, G, Q, K, T, stride_f, stride_qb, stride_qh, stride_qn, stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vg, stride_vn, stride_ob, stride_oh, stride_on,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    TABLE: tl.constexpr, LAST: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    i_n, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_j, o_d, o_w = i_n * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, W)
    m_j = o_j < K
    b_k = load_rows(k + i_b * stride_kb + i_g * stride_kg, o_j, 0, K, stride_kn, D, BD, True, UP)
    b_v = load_rows(v + i_b * stride_vb + i_g * stride_vg, o_j, 0, K, stride_vn, D, BD, True, UP)
    b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    queries, keys, tiles = queries + i_b * Q, keys + i_b * K, tiles + i_b * T * 6
    rows, windows = rows + i_b * T * 2 * K, windows + i_b * T * W
    if TABLE:
        b_key = tl.load(keys + o_j, mask=m_j, other=LAST)

    # tiles [i_first, i_last) see this block, n_full of them from i_full on in full; wide ones stand apart
    n_blocks = tl.cdiv(K, W)
    i_first, i_last, i_full, i_part, i_wide, i_wide_last = T, 0, 0, T, T, 0
    for i_s in tl.static_range(BN // W):
        i_block = i_n * (BN // W) + i_s
        p_block = blocks + (i_b * n_blocks + i_block) * 6
        # the part of a block beyond the last key is seen by nobody
        m_block = i_block < n_blocks
        i_first = tl.minimum(i_first, tl.load(p_block, mask=m_block, other=T))
        i_last = tl.maximum(i_last, tl.load(p_block + 1, mask=m_block, other=0))
        i_full = tl.maximum(i_full, tl.load(p_block + 2, mask=m_block, other=0))
        i_part = tl.minimum(i_part, tl.load(p_block + 3, mask=m_block, other=0))
        i_wide = tl.minimum(i_wide, tl.load(p_block + 4, mask=m_block, other=T))
        i_wide_last = tl.maximum(i_wide_last, tl.load(p_block + 5, mask=m_block, other=0))
    n_full = tl.maximum(i_part - i_full, 0)
    i_full = tl.where(n_full > 0, i_full, i_last)
    n_edge = tl.maximum(i_last - i_first - n_full, 0)

    for i_r in range(0, GROUP):
        i_h = i_g * GROUP + i_r
        p_q, p_do = q + i_b * stride_qb + i_h * stride_qh, dout + i_b * stride_ob + i_h * stride_oh
        p_lse, p_delta = lse + (i_b * H + i_h) * Q, delta + (i_b * H + i_h) * Q
        b_left, b_right = log2_slopes(left, right, i_h)
        # 0: edge tiles, 1: full tiles, 2: tiles with a wide window
        for KIND in tl.static_range(3 if TABLE else 2):
            n_tiles = n_edge if KIND == 0 else (n_full if KIND == 1 else tl.maximum(i_wide_last - i_wide, 0))
            for i_m in range(0, n_tiles):
                i_t = i_wide + i_m if KIND == 2 else block_index(i_m, i_first, i_full, n_full, KIND)
                o_i = i_t * W + o_w
                m_i = o_i < Q
                b_q = load_rows(p_q, o_i, 0, Q, stride_qn, D, BD, True, UP)
                b_do = load_rows(p_do, o_i, 0, Q, stride_on, D, BD, True, UP)
                b_own = tl.load(queries + o_i + 2 * stride_f, mask=m_i, other=0).to(tl.float32)
                # scores are transposed: [keys, queries]
                if TABLE:
                    b_first, b_last, b_from_left, b_to_right = load_window_bounds(queries, o_i, m_i, stride_f, W)
                    p_row = rows + i_t * 2 * K + o_j
                    b_n_left = tl.load(p_row, mask=m_j, other=0).to(tl.float32)
                    if KIND == 1:
                        b_offset = b_n_left[:, None] - b_own[None, :]
                    else:
                        b_n_right = tl.load(p_row + K, mask=m_j, other=0).to(tl.float32)
                        b_offset = b_n_right[:, None] * b_to_right[None, :] - b_own[None, :]
                        b_offset = b_n_left[:, None] * b_from_left[None, :] + b_offset
                    if KIND == 2:
                        b_start, b_horizon, _ = load_bounds(queries, o_i, m_i, stride_f)
                        i_w0, i_w1 = tl.load(tiles + i_t * 6 + 2), tl.load(tiles + i_t * 6 + 3)
                        b_offset = add_wide_window(
                            b_offset, keys, b_key, b_start, b_horizon, i_w0, i_w1, W, LAST, True
                        )
                    else:
                        b_left_of = stands_left(tl.load(windows + i_t * W + o_w), b_key, True)
                        b_offset = tl.dot(b_left_of, within(b_first, b_last, W, True), b_offset)
                else:
                    b_offset = o_j.to(tl.float32)[:, None] - b_own[None, :]
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * qk_scale
                b_s += tl.where(b_offset < 0, b_left, -b_right) * b_offset
                # what is needed late is loaded late: there are more rows of queries than registers for them
                b_lse = tl.load(p_lse + o_i, mask=m_i, other=float("inf"))
                b_p = tl.exp2(b_s - b_lse[None, :])
                if KIND != 1:
                    b_start, b_horizon, _ = load_bounds(queries, o_i, m_i, stride_f)
                    if TABLE:
                        # each kind passes over the tiles of the other
                        i_w0, i_w1 = tl.load(tiles + i_t * 6 + 2), tl.load(tiles + i_t * 6 + 3)
                        b_horizon = tl.where((i_w1 - i_w0 > W) == (KIND == 2), b_horizon, -1)
                    m_seen = (o_j[:, None] >= b_start[None, :]) & (o_j[:, None] <= b_horizon[None, :])
                    b_p = tl.where(m_seen, b_p, 0.0)
                b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
                b_delta = tl.load(p_delta + o_i, mask=m_i, other=0.0)
                b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
                b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
    # [B, K, G, D]
    p_out = ((i_b * K + o_j) * G + i_g)[:, None] * D + o_d[None, :]
    m_out = m_j[:, None] & (o_d[None, :] < D)
    tl.store(dk + p_out, (b_dk * scale).to(dk.dtype.element_ty), mask=m_out)
    tl.store(dv + p_out, b_dv.to(dv.dtype.element_ty), mask=m_out)
