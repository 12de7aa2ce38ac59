"""Backward in two kernels, seven matmuls, without atomics.

With P the probabilities of a slot, dP = dO V^T and delta = rowsum(P * dP) = dO . o_i, which is also the weight's
gradient before its sum over heads and queries:

    dS = w P (dP - delta)    dq += dS K    dV += (w P)^T dO    dK += dS^T q

The first kernel goes over queries (dq, delta, weights), the second over chunks, through the inverted index: the
list of (query chunk, slot) pairs that chose a chunk. Both compute S and dP. Sharing them would leave the minimum of
five matmuls, but P and dS, two tensors of B * C * K * S * D elements, would lie between the kernels: at 16K tokens,
8 slots and 12 heads of 64 that is 2 x 201 MB in bfloat16, written and read, 187 us at 4.3 TB/s, where two matmuls are
26 GFLOP, 33 us at 790 TFLOP/s. Summing dq where the chunks are would take atomics or as much memory.

A list may be long, since every query chunk may choose the same chunk. It is cut into segments of at most L pairs. The
first segment of a chunk is work of the chunk's program; every other segment has a program of its own, whose sums the
chunk's program adds in order. Segment starts of one chunk are L apart, and those of different chunks at least as
much, so `start // L` numbers the other segments: no table of segments is needed.
"""

import torch
import triton
import triton.language as tl

from ... import common
from ...language import LOG2_E, matrices, widened
from .tiles import chunks, constants, load_slot, load_tile, row_offsets, store_tile, tiles


@triton.jit
def _query_gradient(b_q, b_do, b_k, b_v, b_dq, b_lse, b_w, qk_scale, S: tl.constexpr, BLOCK_S: tl.constexpr):
    """Add one chunk's part to `b_dq`; return it and delta."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_p = tl.exp2(b_s * qk_scale - b_lse[:, None])
    if S != BLOCK_S:
        b_p = tl.where((tl.arange(0, BLOCK_S) < S)[None, :], b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_delta = tl.sum(b_p * b_dp, 1)
    b_ds = b_p * b_w * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee"), b_delta


@triton.jit
def _gca_bwd_q_kernel(
    q, k, v, indices, weights, do, lse, dq, delta, dw,
    scale, qk_scale, M, N, K, T, TILES,
    GROUP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    i_c, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_g, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    C = tl.num_programs(0) // TILES
    i_t = i_c.to(tl.int64) * M
    p_q = q.data + i_b * q.batch + i_g * GROUP * q.head + i_t * q.row
    p_do = do.data + i_b * do.batch + i_g * GROUP * do.head + i_t * do.row
    p_dq = dq.data + i_b * dq.batch + i_g * GROUP * dq.head + i_t * dq.row
    q_row, do_row, dq_row = widened(q.row, WIDE), widened(do.row, WIDE), widened(dq.row, WIDE)
    k_row, v_row = widened(k.row, WIDE), widened(v.row, WIDE)
    lse += (i_b * tl.num_programs(1) + i_g) * GROUP * K * T + i_t
    delta += (i_b * tl.num_programs(1) + i_g) * GROUP * K * T + i_t
    # [B, G, C, TILES, K]
    dw += ((i_b * tl.num_programs(1) + i_g) * tl.num_programs(0) + tl.program_id(0)) * K
    p_k = k.data + i_b * k.batch + i_g * k.head
    p_v = v.data + i_b * v.batch + i_g * v.head
    indices += (i_b * C + i_c) * K
    weights += (i_b * C + i_c) * K

    o_h, o_m, m_r = row_offsets(i_tile * BLOCK_M, M, GROUP, BLOCK_M)
    b_q = load_tile(p_q, o_h * q.head + o_m * q_row, m_r, D, BLOCK_D, UPCAST)
    b_do = load_tile(p_do, o_h * do.head + o_m * do_row, m_r, D, BLOCK_D, UPCAST)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if TAIL:
        o_h2, o_m2, m_r2 = row_offsets(BLOCK_M, M, GROUP, TAIL)
        b_q2 = load_tile(p_q, o_h2 * q.head + o_m2 * q_row, m_r2, D, BLOCK_D, UPCAST)
        b_do2 = load_tile(p_do, o_h2 * do.head + o_m2 * do_row, m_r2, D, BLOCK_D, UPCAST)
        b_dq2 = tl.zeros([TAIL, BLOCK_D], dtype=tl.float32)
    o_s = tl.arange(0, BLOCK_S)
    for i_k in range(0, K):
        i_n, b_size, b_w = load_slot(indices, weights, i_k, N, S)
        m_s = o_s < b_size
        b_k = load_tile(p_k + i_n * k.chunk, o_s * k_row, m_s, D, BLOCK_D, UPCAST)
        b_v = load_tile(p_v + i_n * v.chunk, o_s * v_row, m_s, D, BLOCK_D, UPCAST)
        o_row = (o_h * K + i_k) * T + o_m
        b_lse = tl.load(lse + o_row, mask=m_r, other=0.0)
        b_dq, b_delta = _query_gradient(b_q, b_do, b_k, b_v, b_dq, b_lse, b_w, qk_scale, S, BLOCK_S)
        tl.store(delta + o_row, b_delta, mask=m_r)
        b_dw = tl.sum(b_delta, 0)
        if TAIL:
            o_row2 = (o_h2 * K + i_k) * T + o_m2
            b_lse2 = tl.load(lse + o_row2, mask=m_r2, other=0.0)
            b_dq2, b_delta2 = _query_gradient(b_q2, b_do2, b_k, b_v, b_dq2, b_lse2, b_w, qk_scale, S, BLOCK_S)
            tl.store(delta + o_row2, b_delta2, mask=m_r2)
            b_dw += tl.sum(b_delta2, 0)
        tl.store(dw + i_k, b_dw)
    store_tile(p_dq, o_h * dq.head + o_m * dq_row, m_r, b_dq * scale, D, BLOCK_D)
    if TAIL:
        store_tile(p_dq, o_h2 * dq.head + o_m2 * dq_row, m_r2, b_dq2 * scale, D, BLOCK_D)


def launch_backward_q(do, q, k, v, indices, weights, lse, scale: float):
    """Return dq, the gradient of the weights, and delta `[B, H, K, T]` for `launch_backward_kv`."""
    B, H, T, D = q.shape
    G, N, S = k.shape[1:4]
    C, K = indices.shape[1:]
    tile = tiles("backward_q", H // G * (T // C), S, D, q.dtype)
    dq = common.empty(B, T, H, D, like=q).transpose(1, 2)
    delta = common.empty(B, H, K, T, like=lse)
    dw = common.empty(B, G, C, tile.count, K, like=lse)
    _gca_bwd_q_kernel[(C * tile.count, G, B)](
        matrices(q), chunks(k), chunks(v), indices, weights, matrices(do), lse, matrices(dq), delta, dw,
        scale, scale * LOG2_E.value, T // C, N, K, T, tile.count,
        BLOCK_M=tile.block_m, TAIL=tile.tail, **constants(q, k, v, do, dq),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dq, dw.sum((1, 3)).to(weights.dtype), delta


def inverted_index(indices: torch.Tensor, N: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return for each batch row the slots sorted by chunk, and where in that list each chunk begins.

    Returns:
        listed chunks `[B, C * K]` int32 ascending, `N` where there is none; slots `[B, C * K]`, c * K + i; bounds
        `[B, N + 1]`.
    """
    B = indices.shape[0]
    # what is no chunk goes to the end, before an index that does not fit 32 bits could become one
    flat = indices.reshape(B, -1)
    flat = flat.masked_fill((flat < 0) | (flat > N), N).to(torch.int32)
    listed, slots = torch.sort(flat, dim=1, stable=True)
    numbers = torch.arange(N + 1, dtype=torch.int32, device=indices.device).expand(B, N + 1)
    return listed, slots, torch.searchsorted(listed, numbers.contiguous(), out_int32=True)


@triton.jit
def _chunk_gradients(b_k, b_v, b_q, b_do, b_dk, b_dv, b_lse, b_delta, b_w, qk_scale):
    """Add one query tile's part to the gradients of a chunk."""
    # [BLOCK_S, BLOCK_M]; rows beyond the chunk hold garbage that stays in its row and is not stored
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    b_p = tl.exp2(b_s * qk_scale - b_lse[None, :]) * b_w
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def _gca_bwd_kv_kernel(
    q, k, v, weights, do, lse, delta, listed, slots, bounds, dk, dv, dk_more, dv_more,
    scale, qk_scale, M, N, K, T, TILES, PAIRS, SEGMENTS, L,
    GROUP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, TAIL: tl.constexpr, MORE: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    i_g, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if MORE:
        # the only segment, if any, that begins in [i_low, i_low + L) and is not its chunk's first
        i_low = (tl.program_id(0) + 1) * L
        i_n = tl.load(listed + i_b * PAIRS + i_low)
        if i_n >= N:
            return
        i_first = tl.load(bounds + i_b * (N + 1) + i_n)
        i_start = i_first + tl.maximum(tl.cdiv(i_low - i_first, L), 1) * L
    else:
        i_n = tl.program_id(0)
        i_start = tl.load(bounds + i_b * (N + 1) + i_n)
    i_last = tl.load(bounds + i_b * (N + 1) + i_n + 1)
    if MORE:
        if i_start >= tl.minimum(i_last, i_low + L):
            return
    i_stop = tl.minimum(i_start + L, i_last)

    i_n = i_n.to(tl.int64)
    p_q = q.data + i_b * q.batch + i_g * GROUP * q.head
    p_do = do.data + i_b * do.batch + i_g * GROUP * do.head
    q_row, do_row = widened(q.row, WIDE), widened(do.row, WIDE)
    k_row, v_row = widened(k.row, WIDE), widened(v.row, WIDE)
    p_k = k.data + i_b * k.batch + i_g * k.head + i_n * k.chunk
    p_v = v.data + i_b * v.batch + i_g * v.head + i_n * v.chunk
    lse += (i_b * tl.num_programs(1) + i_g) * GROUP * K * T
    delta += (i_b * tl.num_programs(1) + i_g) * GROUP * K * T
    slots += i_b * PAIRS
    weights += i_b * PAIRS
    o_s = tl.arange(0, BLOCK_S)
    b_k = load_tile(p_k, o_s * k_row, o_s < S, D, BLOCK_D, UPCAST)
    b_v = load_tile(p_v, o_s * v_row, o_s < S, D, BLOCK_D, UPCAST)
    b_dk = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for i_pair in range(i_start * TILES, i_stop * TILES):
        i_slot = tl.load(slots + i_pair // TILES).to(tl.int32)
        b_w = tl.load(weights + i_slot).to(tl.float32)
        i_k, i_t = i_slot % K, (i_slot // K).to(tl.int64) * M
        o_h, o_m, m_r = row_offsets((i_pair % TILES) * BLOCK_M, M, GROUP, BLOCK_M)
        o_t = i_t + o_m
        o_row = (o_h * K + i_k) * T + o_t
        b_q = load_tile(p_q, o_h * q.head + o_t * q_row, m_r, D, BLOCK_D, UPCAST)
        b_do = load_tile(p_do, o_h * do.head + o_t * do_row, m_r, D, BLOCK_D, UPCAST)
        b_lse = tl.load(lse + o_row, mask=m_r, other=0.0)
        b_delta = tl.load(delta + o_row, mask=m_r, other=0.0)
        b_dk, b_dv = _chunk_gradients(b_k, b_v, b_q, b_do, b_dk, b_dv, b_lse, b_delta, b_w, qk_scale)
        if TAIL:
            o_h2, o_m2, m_r2 = row_offsets(BLOCK_M, M, GROUP, TAIL)
            o_t2 = i_t + o_m2
            o_row2 = (o_h2 * K + i_k) * T + o_t2
            b_q2 = load_tile(p_q, o_h2 * q.head + o_t2 * q_row, m_r2, D, BLOCK_D, UPCAST)
            b_do2 = load_tile(p_do, o_h2 * do.head + o_t2 * do_row, m_r2, D, BLOCK_D, UPCAST)
            b_lse2 = tl.load(lse + o_row2, mask=m_r2, other=0.0)
            b_delta2 = tl.load(delta + o_row2, mask=m_r2, other=0.0)
            b_dk, b_dv = _chunk_gradients(b_k, b_v, b_q2, b_do2, b_dk, b_dv, b_lse2, b_delta2, b_w, qk_scale)

    # [B, G, SEGMENTS, S, D]
    p_more = (i_b * tl.num_programs(1) + i_g) * SEGMENTS * S * D
    if MORE:
        p_more += tl.program_id(0).to(tl.int64) * S * D
        store_tile(dk_more + p_more, o_s * D, o_s < S, b_dk, D, BLOCK_D)
        store_tile(dv_more + p_more, o_s * D, o_s < S, b_dv, D, BLOCK_D)
    else:
        for i_more in range(i_start + L, i_last, L):
            p_segment = p_more + (i_more // L - 1).to(tl.int64) * S * D
            b_dk += load_tile(dk_more + p_segment, o_s * D, o_s < S, D, BLOCK_D, False)
            b_dv += load_tile(dv_more + p_segment, o_s * D, o_s < S, D, BLOCK_D, False)
        p_chunk = i_b * dk.batch + i_g * dk.head + i_n * dk.chunk
        dk_row = widened(dk.row, WIDE)
        store_tile(dk.data + p_chunk, o_s * dk_row, o_s < S, b_dk * scale, D, BLOCK_D)
        store_tile(dv.data + p_chunk, o_s * dk_row, o_s < S, b_dv, D, BLOCK_D)


def segment_length(K: int) -> int:
    """Return L: twice the pairs of an average chunk where every past chunk is equally popular."""
    return max(16, 2 * K)


def launch_backward_kv(do, q, k, v, indices, weights, lse, delta, scale: float):
    """Return dk and dv, which lie in memory as `[B, N, S, G, D]`."""
    B, H, T, D = q.shape
    G, N, S = k.shape[1:4]
    C, K = indices.shape[1:]
    dk, dv = (common.empty(B, N, S, G, D, like=k).permute(0, 3, 1, 2, 4) for _ in range(2))
    if N == 0:
        return dk, dv
    tile = tiles("backward_kv", H // G * (T // C), S, D, q.dtype)
    L = segment_length(K)
    segments = (C * K - 1) // L
    dk_more, dv_more = (common.empty(B, G, segments, S, D, like=lse) for _ in range(2))
    index = inverted_index(indices, N)
    for more, programs in ((True, segments), (False, N)):
        if programs:
            _gca_bwd_kv_kernel[(programs, G, B)](
                matrices(q), chunks(k), chunks(v), weights, matrices(do), lse, delta, *index,
                chunks(dk), chunks(dv), dk_more, dv_more,
                scale, scale * LOG2_E.value, T // C, N, K, T, tile.count, C * K, segments, L,
                BLOCK_M=tile.block_m, TAIL=tile.tail, MORE=more, **constants(q, k, v, do, dk),
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    return dk, dv
