"""Triton kernels for few queries over many keys.

The heads that share a key head and their queries form one tile of rows; the keys that anybody sees are divided evenly
among programs, and a second kernel merges what these leave. How many programs there are does not depend on lengths,
so that a step keeps its shape; a program without keys leaves at once.
"""

import torch
import triton
import triton.language as tl

from ...common import empty, full_programs
from ...language import LOG2_E, block, contiguous_rows, matrices, widened
from ..ops import OffsetTable
from .forward import attend
from .tiles import (
    HI,
    LO,
    QUERY_FIELDS,
    TILE_FIELDS,
    WINDOW_HI,
    WINDOW_LO,
    block_offsets,
    config_for,
    constants,
    load_query,
)


# parts that the second kernel takes at a time: all of them, 512 x 64 numbers at worst, are more than registers hold
MERGED = 32


@triton.jit(do_not_specialize=["G", "Q"])
def _decode_kernel(
    q, k, v, parts, sums, table, left, right, scale, G, Q, K,
    GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    TABLE: tl.constexpr, LAST: tl.constexpr, UP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_part, i_g, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n_parts = tl.num_programs(0)
    p_tile = table.tiles_BT6 + i_b * TILE_FIELDS
    i_lo, i_hi, i_w0, i_w1 = tl.load(p_tile + LO), tl.load(p_tile + HI), 0, 0
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

    keys, p_row = table.keys_BK + i_b * K, table.rows_BT2K + i_b * 2 * K
    query = load_query(table.queries_B5Q + i_b * QUERY_FIELDS * Q, o_i, Q, m_r, W)
    if TABLE:
        i_w0, i_w1 = tl.load(p_tile + WINDOW_LO), tl.load(p_tile + WINDOW_HI)
    b_left = tl.load(left + o_h, mask=m_r, other=0.0)[:, None] * LOG2_E
    b_right = tl.load(right + o_h, mask=m_r, other=0.0)[:, None] * LOG2_E
    p_q = q.data + i_b * q.batch + (o_h * q.head + o_i * widened(q.row, WIDE))[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_r[:, None] & (o_d[None, :] < D), other=0.0)
    b_q = b_q.to(tl.float32) if UP else b_q
    p_k, p_v = k.data + i_b * k.batch + i_g * k.head, v.data + i_b * v.batch + i_g * v.head
    k_row, v_row = widened(k.row, WIDE), widened(v.row, WIDE)
    b_acc = tl.zeros([M, BD], tl.float32)
    b_max, b_sum = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32)

    # queries that see the same keys, as one query does, have no window: then the first pass does it all
    for WINDOW in tl.static_range(0, 3 if TABLE else 1, 2):
        i_end = i_to if (i_w1 > i_w0) == (WINDOW == 2) else i_from
        for i_j in range(i_from, i_end, BN):
            o_j = i_j + tl.arange(0, BN)
            m_seen = (o_j[None, :] >= query.start[:, None]) & (o_j[None, :] <= query.horizon[:, None])
            m_seen &= (o_j < i_to)[None, :]
            if TABLE:
                b_offset = block_offsets(query, keys, p_row, o_j, K, None, None, i_w0, i_w1, WINDOW, True, W, LAST)
            else:
                b_offset = o_j.to(tl.float32)[None, :] - query.own[:, None]
            b_acc, b_max, b_sum = attend(
                b_acc, b_max, b_sum, b_q, p_k, p_v, o_j, i_from, i_to, k_row, v_row, b_offset, m_seen,
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
    o_d = tl.arange(0, BD)
    b_acc, i_max, i_total = tl.zeros([BD], tl.float32), -float("inf"), 0.0
    for i_s in range(0, n_parts, S):
        o_s = i_s + tl.arange(0, S)
        o_part = ((i_b * G + i_g) * n_parts + o_s) * M + i_r
        b_max = tl.load(sums + o_part, mask=o_s < n_parts, other=-float("inf"))
        # programs without keys left nothing but their maximum
        m_s = b_max > -float("inf")
        b_sum = tl.load(sums + tl.num_programs(2).to(tl.int64) * G * n_parts * M + o_part, mask=m_s, other=0.0)
        b_part = tl.load(parts + o_part[:, None] * BD + o_d[None, :], mask=m_s[:, None], other=0.0)
        i_new = tl.maximum(i_max, tl.max(b_max, 0))
        # where nobody has seen a key yet, a finite pivot
        i_pivot = tl.where(i_new == -float("inf"), 0.0, i_new)
        b_weight, i_fade = tl.exp2(b_max - i_pivot), tl.exp2(i_max - i_pivot)
        i_total = i_total * i_fade + tl.sum(b_weight * b_sum, 0)
        b_acc = b_acc * i_fade + tl.sum(b_weight[:, None] * b_part, 0)
        i_max = i_new
    b_out = b_acc / tl.where(i_total == 0, 1.0, i_total)
    # [B, Q, H, D]
    p_out = out + ((i_b * Q + i_r % Q) * H + i_g * GROUP + i_r // Q) * D + o_d
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=o_d < D)


def launch_decode(q, k, v, table: OffsetTable, left, right, scale: float) -> torch.Tensor:
    """Return the output, which lies in memory as `[B, Q, H, D]`."""
    (B, H, Q, D), (G, K) = q.shape, k.shape[1:3]
    q, k, v = contiguous_rows(q, k, v)
    keys, warps, stages = config_for(D, q.dtype).decode
    fixed = constants(q, k, table, v)
    M, BD = block(H // G * Q), fixed["BD"]
    # values alone decide nothing here: lengths may change from step to step, shapes may not
    n_parts = min(triton.cdiv(full_programs(q), B * G), triton.cdiv(K, keys))
    parts = empty(B, G, n_parts, M, BD, like=q, dtype=torch.float32)
    sums = empty(2, B, G, n_parts, M, like=q, dtype=torch.float32)
    out = empty(B, Q, H, D, like=q)
    _decode_kernel[(n_parts, G, B)](
        *map(matrices, (q, k, v)), parts, sums, table, left, right, scale * LOG2_E.value, G, Q, K,
        **fixed, M=M, BN=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _merge_kernel[(H // G * Q, G, B)](
        parts, sums, out, H, G, Q, n_parts, GROUP=H // G, M=M, D=D, BD=BD, S=MERGED, num_warps=4
    )
    return out.transpose(1, 2)
