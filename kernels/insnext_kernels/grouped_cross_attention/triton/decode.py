"""Decode: few queries. Slots, and keys within them, go to programs of their own, so that one sequence fills the GPU.

Each program writes the softmax-weighted values of its keys and log2 of their normaliser; a second kernel joins the
parts of each slot, then adds the slots by weight.
"""

import torch
import triton
import triton.language as tl

from ... import common
from ...language import LOG2_E, block, matrices, widened
from .tiles import chunks, constants, load_slot, load_tile, row_offsets, store_tile


# slots that the joining kernel takes at a time
BLOCK_SLOTS = 8


@triton.jit
def _gca_part_kernel(
    q, k, v, indices, weights, part, part_lse,
    qk_scale, M, N, K, C, PARTS,
    GROUP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    i_k, i_part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    i_g, i_bc = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_b, i_c = i_bc // C, i_bc % C
    i_n, b_size, b_w = load_slot(indices, weights, i_bc * K + i_k, N, S)
    # the joining kernel does not read what a slot without a chunk, or a part without a key, leaves out
    if (i_n < 0) | (i_part * BLOCK_S >= S):
        return
    o_h, o_m, m_r = row_offsets(0, M, GROUP, BLOCK_M)
    o_s = i_part * BLOCK_S + tl.arange(0, BLOCK_S)
    m_s = o_s < b_size
    p_q = q.data + i_b * q.batch + i_g * GROUP * q.head + i_c * M * q.row
    p_k = k.data + i_b * k.batch + i_g * k.head + i_n * k.chunk
    p_v = v.data + i_b * v.batch + i_g * v.head + i_n * v.chunk
    b_q = load_tile(p_q, o_h * q.head + o_m * widened(q.row, WIDE), m_r, D, BLOCK_D, UPCAST)
    b_k = load_tile(p_k, o_s * widened(k.row, WIDE), m_s, D, BLOCK_D, UPCAST)
    b_v = load_tile(p_v, o_s * widened(v.row, WIDE), m_s, D, BLOCK_D, UPCAST)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * qk_scale
    b_s = tl.where((o_s < S)[None, :], b_s, -float("inf"))
    b_max = tl.max(b_s, 1)
    b_p = tl.exp2(b_s - b_max[:, None])
    b_sum = tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee") / b_sum[:, None]
    # [B * C, H, M, K, PARTS] and [.., D]
    o_part = ((i_bc * tl.num_programs(1) + i_g) * GROUP * M + o_h * M + o_m) * (K * PARTS) + tl.program_id(0)
    tl.store(part_lse + o_part, b_max + tl.log2(b_sum), mask=m_r)
    store_tile(part, o_part * D, m_r, b_o, D, BLOCK_D)


@triton.jit
def _gca_join_kernel(
    indices, weights, part, part_lse, out, M, N, K, C,
    PARTS: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, OFF_BY_ONE: tl.constexpr,
):  # fmt: skip
    i_h, i_m = tl.program_id(0) // M, tl.program_id(0) % M
    i_bc = tl.program_id(1).to(tl.int64)
    i_b, i_c = i_bc // C, i_bc % C
    i_row = i_bc * tl.num_programs(0) + tl.program_id(0)
    o_d, o_part = tl.arange(0, BLOCK_D), tl.arange(0, PARTS)
    b_out = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i_first in range(0, K, BLOCK_SLOTS):
        o_k = i_first + tl.arange(0, BLOCK_SLOTS)
        b_n = tl.load(indices + i_bc * K + o_k, mask=o_k < K, other=-1)
        b_w = tl.load(weights + i_bc * K + o_k, mask=b_n >= 0, other=0.0).to(tl.float32)
        b_w = tl.where(b_n < N, b_w, float("nan"))
        # [BLOCK_SLOTS, PARTS] and [.., BLOCK_D]
        o_kp = (i_row * K + o_k[:, None]) * PARTS + o_part[None, :]
        m_part = o_part * BLOCK_S < S
        m_kp = (b_n >= 0)[:, None] & m_part[None, :]
        b_lse = tl.load(part_lse + o_kp, mask=m_kp, other=0.0)
        b_lse = tl.where(m_part[None, :], b_lse, -float("inf"))
        m_o = m_kp[:, :, None] & (o_d < D)[None, None, :]
        b_o = tl.load(part + o_kp[:, :, None] * D + o_d[None, None, :], mask=m_o, other=0.0)
        b_max = tl.max(b_lse, 1)
        if OFF_BY_ONE:
            b_max = tl.maximum(b_max, 0.0)
        b_p = tl.exp2(b_lse - b_max[:, None])
        b_sum = tl.sum(b_p, 1)
        if OFF_BY_ONE:
            b_sum += tl.exp2(-b_max)
        b_p = b_p * (b_w / b_sum)[:, None]
        b_out += tl.sum(tl.sum(b_p[:, :, None] * b_o, 1), 0)
    p_out = out.data + i_b * out.batch + i_h * out.head + (i_c * M + i_m) * out.row
    tl.store(p_out + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < D)


def launch_decode(q, k, v, indices, weights, off_by_one: bool, scale: float, parts: int):
    """Return the output `[B, H, T, D]`; `parts`, a power of two, is the number of programs of a slot."""
    B, H, T, D = q.shape
    G, N, S = k.shape[1:4]
    C, K = indices.shape[1:]
    M, rows = T // C, H // G * (T // C)
    out = common.empty(B, T, H, D, like=q).transpose(1, 2)
    block_s = block(triton.cdiv(S, parts))
    part = common.empty(B * C, H, M, K, parts, D, like=q, dtype=torch.float32)
    part_lse = common.empty(B * C, H, M, K, parts, like=part)
    _gca_part_kernel[(K * parts, G, B * C)](
        matrices(q), chunks(k), chunks(v), indices, weights, part, part_lse,
        scale * LOG2_E.value, M, N, K, C, parts,
        BLOCK_M=block(rows), **{**constants(q, k, v), "BLOCK_S": block_s},
        num_warps=4, num_stages=1,
    )  # fmt: skip
    _gca_join_kernel[(H * M, B * C)](
        indices, weights, part, part_lse, matrices(out), M, N, K, C,
        PARTS=parts, S=S, D=D, BLOCK_SLOTS=BLOCK_SLOTS, BLOCK_S=block_s, BLOCK_D=block(D), OFF_BY_ONE=off_by_one,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return out
