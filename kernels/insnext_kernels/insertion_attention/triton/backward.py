"""Triton kernels of the backward pass: one owns the gradients of queries, one those of keys and values; no atomics.

The first also leaves delta_i = sum_d out_id dout_id. The second works on transposed scores, so that the probabilities
are the left operand of its products and never pass through shared memory.
"""

import torch
import triton
import triton.language as tl

from ...common import empty
from ...language import LOG2_E, contiguous_rows, matrices, widened
from ..ops import OffsetTable
from .table import launch_blocks
from .tiles import (
    BLOCK_FIELDS,
    FULL_END,
    FULL_FIRST,
    OWN,
    QUERY_FIELDS,
    SEEN_END,
    SEEN_FIRST,
    TILE_FIELDS,
    WIDE_END,
    WIDE_FIRST,
    WINDOW_HI,
    WINDOW_LO,
    add_wide_window,
    block_index,
    block_offsets,
    block_ranges,
    config_for,
    constants,
    load_bounds,
    load_query,
    load_rows,
    load_window_bounds,
    log2_slopes,
    stands_left,
    store_rows,
    within,
)


@triton.jit(do_not_specialize=["H", "Q", "T"])
def _queries_kernel(
    q, k, v, out, dout, lse, delta, dq, table, left, right, scale, qk_scale, H, Q, K, T,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    TABLE: tl.constexpr, LAST: tl.constexpr, UP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
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
    p_do = dout.data + i_b * dout.batch + i_h * dout.head
    b_do = load_rows(p_do, o_i, 0, Q, widened(dout.row, WIDE), D, BD, True, UP)
    p_out = out.data + i_b * out.batch + i_h * out.head
    b_out = load_rows(p_out, o_i, 0, Q, widened(out.row, WIDE), D, BD, True, UP)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    # [B, H, Q]
    o_lse = (i_b * H + i_h) * Q + o_i
    tl.store(delta + o_lse, b_delta, mask=m_i)
    b_lse = tl.load(lse + o_lse, mask=m_i, other=float("inf"))
    b_left, b_right = log2_slopes(left, right, i_h)
    b_dq = tl.zeros([W, BD], tl.float32)

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
            b_k = load_rows(p_k, o_j, seen.lo, seen.hi, k_row, D, BD, KIND != 1, UP)
            b_v = load_rows(p_v, o_j, seen.lo, seen.hi, v_row, D, BD, KIND != 1, UP)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * qk_scale
            b_s += tl.where(b_offset < 0, b_left, -b_right) * b_offset
            b_p = tl.exp2(b_s - b_lse[:, None])
            if KIND != 1:
                m_seen = (o_j[None, :] >= query.start[:, None]) & (o_j[None, :] <= query.horizon[:, None])
                b_p = tl.where(m_seen, b_p, 0.0)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
            b_dq = tl.dot(b_ds, b_k, b_dq, input_precision="ieee")
    store_rows(dq.data + i_b * dq.batch + i_h * dq.head, b_dq * scale, o_i, Q, widened(dq.row, WIDE), D, BD)


@triton.jit
def _tiles_of_blocks(blocks, i_n, n_blocks, T, BN: tl.constexpr, W: tl.constexpr):
    """Return which tiles see BN keys: the first and the number of edge tiles, of full ones, and of wide ones."""
    i_first, i_last, i_full, i_part, i_wide, i_wide_end = T, 0, 0, T, T, 0
    for i_s in tl.static_range(BN // W):
        i_block = i_n * (BN // W) + i_s
        p_block = blocks + i_block * BLOCK_FIELDS
        # the part of a block beyond the last key is seen by nobody
        m_block = i_block < n_blocks
        i_first = tl.minimum(i_first, tl.load(p_block + SEEN_FIRST, mask=m_block, other=T))
        i_last = tl.maximum(i_last, tl.load(p_block + SEEN_END, mask=m_block, other=0))
        i_full = tl.maximum(i_full, tl.load(p_block + FULL_FIRST, mask=m_block, other=0))
        i_part = tl.minimum(i_part, tl.load(p_block + FULL_END, mask=m_block, other=0))
        i_wide = tl.minimum(i_wide, tl.load(p_block + WIDE_FIRST, mask=m_block, other=T))
        i_wide_end = tl.maximum(i_wide_end, tl.load(p_block + WIDE_END, mask=m_block, other=0))
    n_full = tl.maximum(i_part - i_full, 0)
    n_edge = tl.maximum(i_last - i_first - n_full, 0)
    return i_first, n_edge, tl.where(n_full > 0, i_full, i_last), n_full, i_wide, tl.maximum(i_wide_end - i_wide, 0)


@triton.jit(do_not_specialize=["H", "Q", "T"])
def _keys_kernel(
    q, k, v, dout, lse, delta, dk, dv, table, left, right, scale, qk_scale, H, Q, K, T,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    TABLE: tl.constexpr, LAST: tl.constexpr, UP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_n, i_g, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_j, o_w = i_n * BN + tl.arange(0, BN), tl.arange(0, W)
    m_j = o_j < K
    b_k = load_rows(k.data + i_b * k.batch + i_g * k.head, o_j, 0, K, widened(k.row, WIDE), D, BD, True, UP)
    b_v = load_rows(v.data + i_b * v.batch + i_g * v.head, o_j, 0, K, widened(v.row, WIDE), D, BD, True, UP)
    b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    keys, p_query = table.keys_BK + i_b * K, table.queries_B5Q + i_b * QUERY_FIELDS * Q
    tiles, rows = table.tiles_BT6 + i_b * T * TILE_FIELDS, table.rows_BT2K + i_b * T * 2 * K
    windows = table.windows_BTW + i_b * T * W
    if TABLE:
        b_key = tl.load(keys + o_j, mask=m_j, other=LAST)
    n_blocks = tl.cdiv(K, W)
    p_blocks = table.blocks_BN6 + i_b * n_blocks * BLOCK_FIELDS
    i_first, n_edge, i_full, n_full, i_wide, n_wide = _tiles_of_blocks(p_blocks, i_n, n_blocks, T, BN, W)

    q_row, do_row = widened(q.row, WIDE), widened(dout.row, WIDE)
    for i_r in range(0, GROUP):
        i_h = i_g * GROUP + i_r
        p_q, p_do = q.data + i_b * q.batch + i_h * q.head, dout.data + i_b * dout.batch + i_h * dout.head
        p_lse, p_delta = lse + (i_b * H + i_h) * Q, delta + (i_b * H + i_h) * Q
        b_left, b_right = log2_slopes(left, right, i_h)
        # 0: edge tiles, 1: full tiles, 2: tiles with a wide window
        for KIND in tl.static_range(3 if TABLE else 2):
            n_tiles = n_edge if KIND == 0 else (n_full if KIND == 1 else n_wide)
            for i_m in range(0, n_tiles):
                i_t = i_wide + i_m if KIND == 2 else block_index(i_m, i_first, i_full, n_full, KIND)
                o_i, p_tile = i_t * W + o_w, tiles + i_t * TILE_FIELDS
                m_i = o_i < Q
                b_q = load_rows(p_q, o_i, 0, Q, q_row, D, BD, True, UP)
                b_do = load_rows(p_do, o_i, 0, Q, do_row, D, BD, True, UP)
                b_own = tl.load(p_query + OWN * Q + o_i, mask=m_i, other=0).to(tl.float32)
                # scores are transposed: [keys, queries]
                if TABLE:
                    b_first, b_last, b_from_left, b_to_right = load_window_bounds(p_query, o_i, Q, m_i, W)
                    p_row = rows + i_t.to(tl.int64) * 2 * K + o_j
                    b_n_left = tl.load(p_row, mask=m_j, other=0).to(tl.float32)
                    if KIND == 1:
                        b_offset = b_n_left[:, None] - b_own[None, :]
                    else:
                        b_n_right = tl.load(p_row + K, mask=m_j, other=0).to(tl.float32)
                        b_offset = b_n_right[:, None] * b_to_right[None, :] - b_own[None, :]
                        b_offset = b_n_left[:, None] * b_from_left[None, :] + b_offset
                    if KIND == 2:
                        b_start, b_horizon, _ = load_bounds(p_query, o_i, Q, m_i)
                        i_w0, i_w1 = tl.load(p_tile + WINDOW_LO), tl.load(p_tile + WINDOW_HI)
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
                    b_start, b_horizon, _ = load_bounds(p_query, o_i, Q, m_i)
                    if TABLE:
                        # each kind passes over the tiles of the other
                        is_wide = tl.load(p_tile + WINDOW_HI) - tl.load(p_tile + WINDOW_LO) > W
                        b_horizon = tl.where(is_wide == (KIND == 2), b_horizon, -1)
                    m_seen = (o_j[:, None] >= b_start[None, :]) & (o_j[:, None] <= b_horizon[None, :])
                    b_p = tl.where(m_seen, b_p, 0.0)
                b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
                b_delta = tl.load(p_delta + o_i, mask=m_i, other=0.0)
                b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
                b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
    store_rows(dk.data + i_b * dk.batch + i_g * dk.head, b_dk * scale, o_j, K, widened(dk.row, WIDE), D, BD)
    store_rows(dv.data + i_b * dv.batch + i_g * dv.head, b_dv, o_j, K, widened(dv.row, WIDE), D, BD)


def launch_backward(
    dout, q, k, v, out, lse, table: OffsetTable, left, right, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v; heads lie behind rows in memory."""
    (B, H, Q, D), (G, K), T = q.shape, k.shape[1:3], table.tiles_BT6.shape[1]
    dout, q, k, v, out = contiguous_rows(dout, q, k, v, out)
    dq, delta = empty(B, Q, H, D, like=q).transpose(1, 2), empty(B, H, Q, like=lse)
    dk, dv = (empty(B, K, G, D, like=k).transpose(1, 2) for _ in range(2))
    if table.blocks_BN6.numel() == 0:
        table = table._replace(blocks_BN6=launch_blocks(table.tiles_BT6, K))
    config, fixed = config_for(D, q.dtype), constants(q, k, table, v, out, dout, dq, dk, dv)
    scales, sizes = (scale, scale * LOG2_E.value), (H, Q, K, T)
    keys, warps, stages = config.backward_queries
    _queries_kernel[(T, H, B)](
        *map(matrices, (q, k, v, out, dout)), lse, delta, matrices(dq), table, left, right, *scales, *sizes,
        **fixed, BN=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    keys, warps, stages = config.backward_keys
    _keys_kernel[(triton.cdiv(K, keys), G, B)](
        *map(matrices, (q, k, v, dout)), lse, delta, matrices(dk), matrices(dv), table, left, right, *scales, *sizes,
        **fixed, BN=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv
