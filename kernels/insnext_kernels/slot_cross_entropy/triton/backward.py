"""Backward, for a chunk of states at a time: the gradients of the scores by recomputation, then two products with the
keys and the queries, each program owning what it writes. Lists of live tiles say where there is anything to do.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...common import empty
from ...language import LOG2_E
from ..ops import Slots
from .tiles import COUNTS, ITS_TARGET, alive, kind_weights, listed, live_tiles, scores, tanh, tiles_for, upcast


# the gradients of the scores of so many states are kept, and of so many rows that they stay below the number
STATES_PER_CHUNK = 1024
SCORES_PER_CHUNK = 2**25


@triton.jit(do_not_specialize=COUNTS)
def _score_gradient_kernel(
    query, key, births, deaths, targets, weights, kinds, live, loss, lse, inverse, gain, grad,
    cap, rate, scale, N, S, D, first, n_states, SOFT: tl.constexpr, UPCAST: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # states first to first + n_states; first is a multiple of BT
    i_s, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_tiles_t = tl.cdiv(N, BT)
    if tl.load(live + (i_b * n_tiles_t + first // BT + i_t) * tl.num_programs(0) + i_s) == 0:
        return
    o_local = i_t * BT + tl.arange(0, BT)
    o_t = first + o_local
    o_s = i_s * BS + tl.arange(0, BS)
    b_target = tl.load(targets + i_b * N + o_t, mask=o_t < N, other=-1)
    b_loss = tl.load(loss + i_b * N + o_t, mask=o_t < N, other=0.0)
    b_lse = tl.load(lse + i_b * N + o_t, mask=o_t < N, other=float("inf"))
    b_inverse = tl.load(inverse + i_b * N + o_t, mask=o_t < N, other=0.0)
    b_gain = tl.load(gain + i_b * N + o_t, mask=o_t < N, other=0.0) * scale

    b_scores = scores(query + i_b * N * D, key + i_b * S * D, o_t, o_s, N, S, D, BT, BS, BD, UPCAST)
    b_tanh = tanh(b_scores * rate)
    b_alive = alive(births + i_b * S, deaths + i_b * S, o_t, o_s, S)
    b_own = b_target
    if SOFT:
        b_kind = tl.load(kinds + i_b * N + o_t, mask=o_t < N, other=0)
        b_own = tl.where(b_kind != ITS_TARGET, -1, b_target)
    # of its target's probability a hard state knows more digits
    b_own_grad = tl.exp2(-b_loss * LOG2_E) - b_inverse
    b_p = tl.exp2((cap * b_tanh - b_lse[:, None]) * LOG2_E)
    b_grad = tl.where(o_s[None, :] == b_own[:, None], b_own_grad[:, None], b_p)
    if SOFT:
        m_soft = (b_target >= 0) & (b_target < S) & (b_kind != ITS_TARGET)
        b_weight = tl.load(weights + i_b * S + o_s, mask=o_s < S, other=0).to(tl.float32)
        b_grad -= tl.where(m_soft, b_inverse, 0.0)[:, None] * kind_weights(b_kind, b_weight)
    b_grad *= (1.0 - b_tanh * b_tanh) * b_gain[:, None]
    b_grad = tl.where(b_alive, b_grad, 0.0)
    p_grad = grad + (i_b * n_states + o_local[:, None]) * S + o_s[None, :]
    m_grad = (o_local[:, None] < n_states) & (o_s[None, :] < S)
    tl.store(p_grad, b_grad.to(grad.dtype.element_ty), mask=m_grad)


@triton.jit(do_not_specialize=COUNTS)
def _query_gradient_kernel(
    grad, key, stop_key, stop_grad, tiles, counts, dquery,
    N, S, D, first, n_states, n_tiles, UPCAST: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_d, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_local = i_t * BT + tl.arange(0, BT)
    o_d = i_d * BD + tl.arange(0, BD)
    m_t = o_local < n_states
    i_row = i_b * tl.cdiv(N, BT) + first // BT + i_t
    n_live = tl.load(counts + i_row)
    # [BT, BD]
    b_stop_grad = tl.load(stop_grad + i_b * N + first + o_local, mask=m_t, other=0.0)
    b_stop = tl.load(stop_key + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dq = b_stop_grad[:, None] * b_stop[None, :]
    for i in range(0, n_live * (BS // BK)):
        o_s = tl.load(tiles + i_row * n_tiles + i // (BS // BK)) * BS + (i % (BS // BK)) * BK + tl.arange(0, BK)
        p_grad = grad + (i_b * n_states + o_local[:, None]) * S + o_s[None, :]
        b_grad = tl.load(p_grad, mask=m_t[:, None] & (o_s[None, :] < S), other=0.0)
        p_k = key + (i_b * S + o_s[:, None]) * D + o_d[None, :]
        b_k = tl.load(p_k, mask=(o_s[:, None] < S) & (o_d[None, :] < D), other=0.0)
        if UPCAST:
            b_grad, b_k = b_grad.to(tl.float32), b_k.to(tl.float32)
        b_dq = tl.dot(b_grad, b_k, b_dq, input_precision="ieee")
    p_dq = dquery + (i_b * N + first + o_local[:, None]) * D + o_d[None, :]
    tl.store(p_dq, b_dq.to(dquery.dtype.element_ty), mask=m_t[:, None] & (o_d[None, :] < D))


@triton.jit(do_not_specialize=COUNTS)
def _key_gradient_kernel(
    grad, query, tiles, counts, dkey,
    N, S, D, first, n_states, n_tiles, UPCAST: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # tiles and counts: of states, counted from `first`, for every tile of slots
    i_d, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_s = i_s * BS + tl.arange(0, BS)
    o_d = i_d * BD + tl.arange(0, BD)
    i_row = i_b * tl.num_programs(1) + i_s
    n_live = tl.load(counts + i_row)
    m_dk = (o_s[:, None] < S) & (o_d[None, :] < D)
    p_dk = dkey + (i_b * S + o_s[:, None]) * D + o_d[None, :]
    # [BS, BD]; the sum goes on from the chunk of states before
    b_dk = tl.zeros([BS, BD], dtype=tl.float32)
    if first > 0:
        b_dk = tl.load(p_dk, mask=m_dk, other=0.0).to(tl.float32)
    for i in range(0, n_live * (BT // BK)):
        o_local = tl.load(tiles + i_row * n_tiles + i // (BT // BK)) * BT + (i % (BT // BK)) * BK + tl.arange(0, BK)
        m_t = o_local < n_states
        p_grad = grad + (i_b * n_states + o_local[None, :]) * S + o_s[:, None]
        b_grad = tl.load(p_grad, mask=(o_s[:, None] < S) & m_t[None, :], other=0.0)
        p_q = query + (i_b * N + first + o_local[:, None]) * D + o_d[None, :]
        b_q = tl.load(p_q, mask=m_t[:, None] & (o_d[None, :] < D), other=0.0)
        if UPCAST:
            b_grad, b_q = b_grad.to(tl.float32), b_q.to(tl.float32)
        b_dk = tl.dot(b_grad, b_q, b_dk, input_precision="ieee")
    tl.store(p_dk, b_dk.to(dkey.dtype.element_ty), mask=m_dk)


class Saved(NamedTuple):
    """What all chunks of states read, and the memory that each fills anew."""

    live: torch.Tensor
    loss: torch.Tensor
    lse: torch.Tensor
    inverse: torch.Tensor
    gain: torch.Tensor
    stop_grad: torch.Tensor
    scratch: torch.Tensor


def launch_backward(grad, query, key, stop_key, slots: Slots, forward, cap: float, scale: float):
    """Return the gradients of query, key and stop_key; `forward` is what the forward pass returned."""
    (B, N, D), S = query.shape, key.shape[1]
    if not B * N:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(stop_key)
    loss, lse, inverse, stops = forward
    # gradients of the scores are kept around 1, so that float16 does not lose them; a power of two rounds nothing
    norm = torch.ldexp(grad.new_ones(()), grad.abs().amax().frexp().exponent)
    gain = (grad / norm).contiguous()
    p_stop = torch.where(slots.targets == S, torch.expm1(-loss), (stops - lse).exp())
    stop_grad = gain * p_stop * (1 - (stops / cap).square()) * scale
    dstop = stop_grad.flatten().to(query.dtype) @ query.flatten(0, 1)

    size = tiles_for(query.dtype)
    states = min(triton.cdiv(STATES_PER_CHUNK, size.states) * size.states, N)
    dquery = empty(B, N, D, like=query)
    dkey = empty(B, S, D, like=key, dtype=torch.float32 if N > states else None)
    rows = max(1, min(B, SCORES_PER_CHUNK // max(1, states * S)))
    saved = Saved(live_tiles(slots, size), loss, lse, inverse, gain, stop_grad, empty(rows * states * S, like=query))
    for b in range(0, B, rows):
        some = slice(b, b + rows)
        part = Slots(*(None if x is None else x[some] for x in slots))
        own = Saved(*(x[some] for x in saved[:-1]), saved.scratch)
        for first in range(0, N, states):
            tensors = query[some], key[some], stop_key, part, own, dquery[some], dkey[some]
            _launch_chunk(*tensors, first, min(states, N - first), cap, scale)
    return (dquery * norm).to(query.dtype), (dkey * norm).to(key.dtype), (dstop * norm).to(stop_key.dtype)


def _launch_chunk(query, key, stop_key, slots, saved, dquery, dkey, first, n_states, cap, scale) -> None:
    """Write the gradients of the queries from `first` on, and add theirs to the gradients of the keys."""
    (B, N, D), S, size = query.shape, key.shape[1], tiles_for(query.dtype)
    n_t, n_s, n_d = triton.cdiv(n_states, size.states), saved.live.shape[2], triton.cdiv(D, size.outer)
    fixed = {"UPCAST": upcast(query), "BT": size.states, "BS": size.slots}
    fixed |= {"num_warps": size.warps, "num_stages": size.stages}
    _score_gradient_kernel[n_s, n_t, B](
        query, key, *slots, saved.live, saved.loss, saved.lse, saved.inverse, saved.gain, saved.scratch,
        cap, scale / cap, scale, N, S, D, first, n_states, SOFT=slots.kinds is not None, BD=size.width, **fixed,
    )  # fmt: skip
    fixed |= {"BK": size.inner, "BD": size.outer}
    _query_gradient_kernel[n_d, n_t, B](
        saved.scratch, key, stop_key, saved.stop_grad, *listed(saved.live), dquery,
        N, S, D, first, n_states, n_s, **fixed,
    )  # fmt: skip
    i_t = first // size.states
    tiles, counts = listed(saved.live[:, i_t : i_t + n_t].transpose(1, 2))
    _key_gradient_kernel[n_d, n_s, B](
        saved.scratch, query, tiles, counts, dkey, N, S, D, first, n_states, n_t, **fixed
    )
