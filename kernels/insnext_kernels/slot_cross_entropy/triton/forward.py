"""Forward: a program scores one tile of states against a few tiles of slots and leaves partial sums; a second kernel
adds STOP and the partial sums up. Lists of live tiles say where there is anything to do.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from ...common import empty
from ...language import LOG2_E
from ..kinds import Kind
from ..ops import Slots
from .tiles import COUNTS, ITS_TARGET, alive, kind_weights, listed, live_tiles, scores, tanh, tiles_for, upcast


# tiles of slots that a program goes through
TILES_PER_PROGRAM = 4


@triton.jit
def _log1p(b_x):
    # Kahan: the rounding of 1 + x is made good by the quotient
    b_u = 1.0 + b_x
    return tl.where(b_u == 1.0, b_x, tl.log(b_u) * (b_x / tl.where(b_u == 1.0, 1.0, b_u - 1.0)))


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    query, key, births, deaths, targets, weights, kinds, tiles, counts, parts,
    cap, rate, B, N, S, D, n_tiles, TILES: tl.constexpr, SOFT: tl.constexpr, UPCAST: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_t, i_part, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    i_row = i_b * tl.num_programs(0) + i_t
    n_live = tl.load(counts + i_row)
    # the target of a hard state is left to the second kernel, which so keeps the digits of a loss near 0
    b_own = tl.load(targets + i_b * N + o_t, mask=o_t < N, other=-1)
    if SOFT:
        b_kind = tl.load(kinds + i_b * N + o_t, mask=o_t < N, other=0)
        b_own = tl.where(b_kind != ITS_TARGET, -1, b_own)
    b_sum = tl.zeros([BT], dtype=tl.float32)
    b_dot = tl.zeros([BT], dtype=tl.float32)
    for i in range(i_part * TILES, tl.minimum(n_live, (i_part + 1) * TILES)):
        o_s = tl.load(tiles + i_row * n_tiles + i) * BS + tl.arange(0, BS)
        b_scores = scores(query + i_b * N * D, key + i_b * S * D, o_t, o_s, N, S, D, BT, BS, BD, UPCAST)
        b_z = cap * tanh(b_scores * rate)
        b_alive = alive(births + i_b * S, deaths + i_b * S, o_t, o_s, S)
        if SOFT:
            b_weight = tl.load(weights + i_b * S + o_s, mask=o_s < S, other=0).to(tl.float32)
            b_dot += tl.sum(tl.where(b_alive, kind_weights(b_kind, b_weight) * b_z, 0.0), 1)
        # logits are in [-cap, cap], so float32 holds the sum of the exponentials as they are
        b_others = b_alive & (o_s[None, :] != b_own[:, None])
        b_sum += tl.sum(tl.where(b_others, tl.exp2(b_z * LOG2_E), 0.0), 1)
    # parts [1 or 2, n_parts, B, N]
    p_part = parts + (i_part * B + i_b) * N + o_t
    tl.store(p_part, b_sum, mask=o_t < N)
    if SOFT:
        tl.store(p_part + tl.num_programs(1) * B * N.to(tl.int64), b_dot, mask=o_t < N)


@triton.jit(do_not_specialize=COUNTS)
def _finish_kernel(
    query, key, stop_key, targets, kinds, inverse, parts, loss, lse, stops,
    cap, rate, B, N, S, D, n_parts, SOFT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < N
    b_target = tl.load(targets + i_b * N + o_t, mask=m_t, other=-1)
    m_slot = (b_target >= 0) & (b_target < S)
    b_stop = tl.zeros([BT], dtype=tl.float32)
    b_hard = tl.zeros([BT], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d[None, :] < D
        p_q = query + (i_b * N + o_t[:, None]) * D + o_d[None, :]
        b_q = tl.load(p_q, mask=m_t[:, None] & m_d, other=0.0).to(tl.float32)
        p_k = key + (i_b * S + b_target[:, None]) * D + o_d[None, :]
        b_k = tl.load(p_k, mask=m_slot[:, None] & m_d, other=0.0).to(tl.float32)
        b_key = tl.load(stop_key + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_stop += tl.sum(b_q * b_key[None, :], 1)
        b_hard += tl.sum(b_q * b_k, 1)
    b_stop = cap * tanh(b_stop * rate)
    b_dot = tl.where(b_target == S, b_stop, cap * tanh(b_hard * rate))

    b_sum = tl.where(b_target == S, 0.0, tl.exp2(b_stop * LOG2_E))
    b_soft_dot = tl.zeros([BT], dtype=tl.float32)
    for i_part in range(0, n_parts):
        p_part = parts + (i_part * B + i_b) * N + o_t
        b_sum += tl.load(p_part, mask=m_t, other=0.0)
        if SOFT:
            b_soft_dot += tl.load(p_part + n_parts * B * N.to(tl.int64), mask=m_t, other=0.0)

    b_inverse = tl.load(inverse + i_b * N + o_t, mask=m_t, other=0.0)
    b_own = tl.where(b_inverse > 0, tl.exp2(b_dot * LOG2_E), 0.0)
    b_idle = b_target < 0
    if SOFT:
        b_kind = tl.load(kinds + i_b * N + o_t, mask=m_t, other=0)
        m_soft = m_slot & (b_kind != ITS_TARGET)
        b_own = tl.where(m_soft, 0.0, b_own)
        b_dot = tl.where(m_soft, b_soft_dot, b_dot)
        b_idle = b_idle | (m_soft & (b_inverse == 0))
    b_odds = b_sum / tl.where(b_own > 0, b_own, 1.0)
    m_sure = (b_own > 0) & (b_odds < 0.5)
    b_lse = tl.log(tl.where(b_idle, 1.0, b_sum + b_own))
    b_loss = tl.where(m_sure, _log1p(tl.where(m_sure, b_odds, 0.0)), b_lse - b_dot * b_inverse)
    b_loss = tl.where(b_inverse > 0, b_loss, float("inf"))
    p_t = i_b * N + o_t
    tl.store(loss + p_t, tl.where(b_idle, 0.0, b_loss), mask=m_t)
    # with an infinite normaliser every probability is 0, and so is every gradient of a state without loss
    tl.store(lse + p_t, tl.where(b_idle, float("inf"), b_lse), mask=m_t)
    tl.store(stops + p_t, b_stop, mask=m_t)


class Forward(NamedTuple):
    """float32, each `[B, N]`: loss, log-normaliser, inverse of the sum of target weights, logit of STOP."""

    loss: torch.Tensor
    lse: torch.Tensor
    inverse: torch.Tensor
    stops: torch.Tensor


def inverse_weight(slots: Slots) -> torch.Tensor:
    """Return `[B, N]`, float32: 1 over the sum of a state's target weights, 0 where that sum is 0."""
    births_BS, deaths_BS, targets_BN, weights_BS, kinds_BN = slots
    (B, N), S = targets_BN.shape, births_BS.shape[1]
    state_N = torch.arange(N, device=births_BS.device)
    target_BN = targets_BN.clamp_min(0).long()
    # row S is STOP, row S + 1 is never alive
    birth = pad(births_BS, (0, 2)).gather(1, target_BN)
    death = pad(pad(deaths_BS, (0, 1), value=N), (0, 1)).gather(1, target_BN)
    inverse = ((targets_BN >= 0) & (birth <= state_N) & (state_N < death)).float()
    if kinds_BN is None:
        return inverse
    # what is alive at t: what was born until t, less what died until t
    weights = torch.where(births_BS < deaths_BS, weights_BS, 0).long()
    for kind, amount in ((Kind.BY_WEIGHT, weights), (Kind.ALIKE, weights.clamp_max(1))):
        change = torch.zeros(B, N + 1, dtype=torch.long, device=births_BS.device)
        total = change.scatter_add(1, births_BS.long(), amount).scatter_add(1, deaths_BS.long(), -amount)
        total = total.cumsum(1)[:, :N]
        soft = (kinds_BN == kind) & (targets_BN >= 0) & (targets_BN < S)
        inverse = torch.where(soft, torch.where(total > 0, 1.0 / total, 0.0), inverse)
    return inverse.float()


def launch_forward(query, key, stop_key, slots: Slots, cap: float, scale: float) -> Forward:
    (B, N, D), S = query.shape, key.shape[1]
    size, soft = tiles_for(query.dtype), slots.kinds is not None
    loss, lse, stops = (empty(B, N, like=query, dtype=torch.float32) for _ in range(3))
    result = Forward(loss, lse, inverse_weight(slots), stops)
    if not B * N:
        return result
    tiles, counts = listed(live_tiles(slots, size))
    n_parts = triton.cdiv(tiles.shape[2], TILES_PER_PROGRAM)
    parts = empty(2 if soft else 1, n_parts, B, N, like=query, dtype=torch.float32)
    _forward_kernel[triton.cdiv(N, size.states), n_parts, B](
        query, key, *slots, tiles, counts, parts, cap, scale / cap, B, N, S, D, tiles.shape[2],
        TILES=TILES_PER_PROGRAM, SOFT=soft, UPCAST=upcast(query), BT=size.states, BS=size.slots, BD=size.width,
        num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    _finish_kernel[triton.cdiv(N, 32), B](
        query, key, stop_key, slots.targets, slots.kinds, result.inverse, parts, loss, lse, stops,
        cap, scale / cap, B, N, S, D, n_parts, SOFT=soft, BT=32, BD=128, num_warps=4,
    )  # fmt: skip
    return result
