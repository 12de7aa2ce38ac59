"""Forward: one program takes a tile of queries through the chunks of its slots, one after the other.

A chunk fits into one tile, so its softmax needs no second pass; weight and normaliser are folded into the
probabilities, and the second matmul of all slots adds into one accumulator. Programs of one head follow each other,
since the keys and values of a head fit into the L2 cache where those of all heads may not.
"""

import torch
import triton
import triton.language as tl

from ... import common
from ...language import LOG2_E, matrices, widened
from .tiles import chunks, constants, load_slot, load_tile, row_offsets, store_tile, tiles


@triton.jit
def _attend(b_q, b_k, b_v, b_out, b_w, qk_scale, S: tl.constexpr, BLOCK_S: tl.constexpr, OFF_BY_ONE: tl.constexpr):
    """Add what the queries read from one chunk to `b_out`; return it and log2 of the normalisers."""
    # [BLOCK_M, BLOCK_S]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if S != BLOCK_S:
        b_s = tl.where((tl.arange(0, BLOCK_S) < S)[None, :], b_s, -float("inf"))
    b_max = tl.max(b_s, 1) * qk_scale
    if OFF_BY_ONE:
        b_max = tl.maximum(b_max, 0.0)
    b_p = tl.exp2(b_s * qk_scale - b_max[:, None])
    b_sum = tl.sum(b_p, 1)
    if OFF_BY_ONE:
        b_sum += tl.exp2(-b_max)
    b_p = b_p * (b_w / b_sum)[:, None]
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision="ieee")
    return b_out, b_max + tl.log2(b_sum)


@triton.jit
def _gca_fwd_kernel(
    q, k, v, indices, weights, out, lse,
    qk_scale, M, N, K, T, TILES,
    GROUP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, TAIL: tl.constexpr, OFF_BY_ONE: tl.constexpr, SAVE_LSE: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    i_c, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_g, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    C = tl.num_programs(0) // TILES
    # the first row of the query chunk in the first head of the group
    i_t = i_c.to(tl.int64) * M
    p_q = q.data + i_b * q.batch + i_g * GROUP * q.head + i_t * q.row
    p_out = out.data + i_b * out.batch + i_g * GROUP * out.head + i_t * out.row
    q_row, out_row = widened(q.row, WIDE), widened(out.row, WIDE)
    k_row, v_row = widened(k.row, WIDE), widened(v.row, WIDE)
    lse += (i_b * tl.num_programs(1) + i_g) * GROUP * K * T + i_t
    p_k = k.data + i_b * k.batch + i_g * k.head
    p_v = v.data + i_b * v.batch + i_g * v.head
    indices += (i_b * C + i_c) * K
    weights += (i_b * C + i_c) * K

    o_h, o_m, m_r = row_offsets(i_tile * BLOCK_M, M, GROUP, BLOCK_M)
    b_q = load_tile(p_q, o_h * q.head + o_m * q_row, m_r, D, BLOCK_D, UPCAST)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if TAIL:
        o_h2, o_m2, m_r2 = row_offsets(BLOCK_M, M, GROUP, TAIL)
        b_q2 = load_tile(p_q, o_h2 * q.head + o_m2 * q_row, m_r2, D, BLOCK_D, UPCAST)
        b_out2 = tl.zeros([TAIL, BLOCK_D], dtype=tl.float32)
    o_s = tl.arange(0, BLOCK_S)
    for i_k in range(0, K):
        i_n, b_size, b_w = load_slot(indices, weights, i_k, N, S)
        m_s = o_s < b_size
        b_k = load_tile(p_k + i_n * k.chunk, o_s * k_row, m_s, D, BLOCK_D, UPCAST)
        b_v = load_tile(p_v + i_n * v.chunk, o_s * v_row, m_s, D, BLOCK_D, UPCAST)
        b_out, b_lse = _attend(b_q, b_k, b_v, b_out, b_w, qk_scale, S, BLOCK_S, OFF_BY_ONE)
        if SAVE_LSE:
            tl.store(lse + (o_h * K + i_k) * T + o_m, b_lse, mask=m_r)
        if TAIL:
            b_out2, b_lse2 = _attend(b_q2, b_k, b_v, b_out2, b_w, qk_scale, S, BLOCK_S, OFF_BY_ONE)
            if SAVE_LSE:
                tl.store(lse + (o_h2 * K + i_k) * T + o_m2, b_lse2, mask=m_r2)
    store_tile(p_out, o_h * out.head + o_m * out_row, m_r, b_out, D, BLOCK_D)
    if TAIL:
        store_tile(p_out, o_h2 * out.head + o_m2 * out_row, m_r2, b_out2, D, BLOCK_D)


def launch_forward(q, k, v, indices, weights, off_by_one: bool, scale: float, save_lse: bool):
    """Return the output `[B, H, T, D]` and log2 of the normalisers `[B, H, K, T]` (empty if not saved)."""
    B, H, T, D = q.shape
    G, N, S = k.shape[1:4]
    C, K = indices.shape[1:]
    out = common.empty(B, T, H, D, like=q).transpose(1, 2)
    lse = common.empty(*((B, H, K, T) if save_lse else (0,)), like=q, dtype=torch.float32)
    tile = tiles("forward", H // G * (T // C), S, D, q.dtype)
    _gca_fwd_kernel[(C * tile.count, G, B)](
        matrices(q), chunks(k), chunks(v), indices, weights, matrices(out), lse,
        scale * LOG2_E.value, T // C, N, K, T, tile.count,
        BLOCK_M=tile.block_m, TAIL=tile.tail, OFF_BY_ONE=off_by_one, SAVE_LSE=save_lse, **constants(q, k, v, out),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out, lse
