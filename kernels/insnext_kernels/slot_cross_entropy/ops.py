"""`slot_cross_entropy` as PyTorch operators: launches, shapes for `torch.compile`, and the rule for gradients."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import empty, interpreting
from . import triton_kernels as kernels


# backward keeps the gradients of the scores of so many states, and of so many rows that they stay below the number
STATES_PER_CHUNK = 1024
SCORES_PER_CHUNK = 2**25
# tiles of slots that a program of the forward pass goes through
TILES_PER_PROGRAM = 4


class Tiles(NamedTuple):
    """Tile sizes: states, slots, width of the scores' inner product; inner and outer width of the two others."""

    states: int
    slots: int
    width: int
    inner: int
    outer: int
    warps: int
    stages: int


def tiles_for(dtype: torch.dtype) -> Tiles:
    """Return the tile sizes for a dtype; `INSNEXT_SLOT_TILES=128,128,64,64,128,8,3` sets others."""
    chosen = os.environ.get("INSNEXT_SLOT_TILES")
    if chosen:
        return Tiles(*map(int, chosen.split(",")))
    return Tiles(64, 64, 32, 32, 64, 4, 2) if dtype == torch.float32 else Tiles(128, 128, 64, 64, 128, 8, 3)


def live_tiles(births_BS: Tensor, deaths_BS: Tensor, targets_BN: Tensor, size: Tiles) -> Tensor:
    """Return, `[B, tiles of states, tiles of slots]`, where a state with a loss may meet a slot alive."""
    (B, S), N = births_BS.shape, targets_BN.shape[1]
    n_s, n_t = max(1, -(-S // size.slots)), -(-N // size.states)
    never = torch.iinfo(torch.int32).max
    pad = (0, n_s * size.slots - S)
    is_slot = births_BS < deaths_BS
    first = torch.nn.functional.pad(torch.where(is_slot, births_BS, never), pad, value=never)
    last = torch.nn.functional.pad(torch.where(is_slot, deaths_BS, 0), pad, value=0)
    first, last = first.view(B, 1, n_s, -1).amin(3), last.view(B, 1, n_s, -1).amax(3)
    begin = torch.arange(n_t, device=births_BS.device)[:, None] * size.states
    trained = torch.nn.functional.pad(targets_BN >= 0, (0, n_t * size.states - N)).view(B, n_t, 1, -1).any(3)
    return trained & (first < begin + size.states) & (begin < last)


def listed(live: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the true entries along the last dimension, in front, and their number."""
    order = torch.sort(live.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return order.int().contiguous(), live.sum(-1, dtype=torch.int32).contiguous()


def inverse_weight(
    births_BS: Tensor, deaths_BS: Tensor, targets_BN: Tensor, weights_BS: Tensor | None, kinds_BN: Tensor | None
) -> Tensor:
    """Return `[B, N]`, float32: 1 over the sum of a state's target weights, 0 where that sum is 0."""
    B, N = targets_BN.shape
    S = births_BS.shape[1]
    state_N = torch.arange(N, device=births_BS.device)
    # row S is STOP
    birth = torch.nn.functional.pad(births_BS, (0, 1)).gather(1, targets_BN.clamp_min(0).long())
    death = torch.nn.functional.pad(deaths_BS, (0, 1), value=N).gather(1, targets_BN.clamp_min(0).long())
    inverse = ((targets_BN >= 0) & (birth <= state_N) & (state_N < death)).float()
    if kinds_BN is None:
        return inverse
    # what is alive at t: what was born until t, less what died until t
    weights = torch.where(births_BS < deaths_BS, weights_BS, 0).long()
    born, died = (x.clamp(0, N).long() for x in (births_BS, deaths_BS))
    for kind, amount in ((1, weights), (2, weights.clamp_max(1))):
        change = torch.zeros(B, N + 1, dtype=torch.long, device=births_BS.device)
        total = change.scatter_add(1, born, amount).scatter_add(1, died, -amount).cumsum(1)[:, :N]
        soft = (kinds_BN == kind) & (targets_BN >= 0) & (targets_BN < S)
        inverse = torch.where(soft, torch.where(total > 0, 1.0 / total, 0.0), inverse)
    return inverse.float()


@torch.library.custom_op("insnext_kernels::slot_cross_entropy", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, stop_key: Tensor, births: Tensor, deaths: Tensor, targets: Tensor,
    weights: Tensor | None, kinds: Tensor | None, cap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss, log-normaliser, inverse of the sum of target weights and logit of STOP, each `[B, N]`."""
    (B, N, D), S = query.shape, key.shape[1]
    size, upcast = tiles_for(query.dtype), _upcast(query)
    inverse = inverse_weight(births, deaths, targets, weights, kinds)
    loss, lse, stops = (empty(B, N, like=query, dtype=torch.float32) for _ in range(3))
    if not B * N:
        return loss, lse, inverse, stops
    tiles, counts = listed(live_tiles(births, deaths, targets, size))
    n_parts = -(-tiles.shape[2] // TILES_PER_PROGRAM)
    parts = empty(1 if kinds is None else 2, n_parts, B, N, like=query, dtype=torch.float32)
    soft = {"SOFT": kinds is not None}
    launch = {"num_warps": size.warps, "num_stages": size.stages}
    n_t = -(-N // size.states)
    # Triton launches on the current device, which need not be that of the tensors
    with torch.cuda.device_of(query):
        kernels._forward_kernel[n_t, n_parts, B](
            query, key, births, deaths, targets, weights, kinds, tiles, counts, parts,
            cap, scale / cap, B, N, S, D, tiles.shape[2], TILES=TILES_PER_PROGRAM, **soft, UPCAST=upcast,
            BT=size.states, BS=size.slots, BD=size.width, **launch,
        )  # fmt: skip
        kernels._finish_kernel[-(-N // 32), B](
            query, key, stop_key, targets, kinds, inverse, parts, loss, lse, stops,
            cap, scale / cap, B, N, S, D, n_parts, **soft, BT=32, BD=128, num_warps=4,
        )  # fmt: skip
    return loss, lse, inverse, stops


@_forward.register_fake
def _(query, key, stop_key, births, deaths, targets, weights, kinds, cap, scale):
    return tuple(query.new_empty(query.shape[:2], dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("insnext_kernels::slot_cross_entropy_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, stop_key: Tensor, births: Tensor, deaths: Tensor, targets: Tensor,
    weights: Tensor | None, kinds: Tensor | None, loss: Tensor, lse: Tensor, inverse: Tensor, stops: Tensor,
    cap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, N, D), S = query.shape, key.shape[1]
    if not B * N:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(stop_key)
    # gradients of the scores are kept around 1, so that float16 does not lose them; a power of two rounds nothing
    norm = torch.ldexp(grad.new_ones(()), grad.abs().amax().frexp().exponent)
    gain = (grad / norm).contiguous()
    p_stop = torch.where(targets == S, torch.expm1(-loss), (stops - lse).exp())
    stop_grad = gain * p_stop * (1 - (stops / cap).square()) * scale
    dstop = stop_grad.flatten().to(query.dtype) @ query.flatten(0, 1)

    size = tiles_for(query.dtype)
    states = min(-(-STATES_PER_CHUNK // size.states) * size.states, N)
    several = N > states
    dquery = empty(B, N, D, like=query)
    dkey = empty(B, S, D, like=key, dtype=torch.float32 if several else None)
    live = live_tiles(births, deaths, targets, size)
    rows = max(1, min(B, SCORES_PER_CHUNK // max(1, states * S)))
    scratch = empty(rows * states * S, like=query)
    for b in range(0, B, rows):
        some = slice(b, b + rows)
        optional = [None if x is None else x[some] for x in (weights, kinds)]
        fixed = query[some], key[some], stop_key, births[some], deaths[some], targets[some], *optional
        saved = live[some], loss[some], lse[some], inverse[some], gain[some], stop_grad[some], scratch
        for first in range(0, N, states):
            n_states = min(states, N - first)
            with torch.cuda.device_of(query):
                _backward_chunk(fixed, saved, (dquery[some], dkey[some]), (first, n_states), (cap, scale), size)
    return (dquery * norm).to(query.dtype), (dkey * norm).to(key.dtype), (dstop * norm).to(stop_key.dtype)


def _backward_chunk(fixed, saved, outputs, chunk, constants, size) -> None:
    """Write the gradients of the queries `chunk`, first and number, and add theirs to the gradients of the keys."""
    query, key, stop_key, births, deaths, targets, weights, kinds = fixed
    live, loss, lse, inverse, gain, stop_grad, scratch = saved
    (first, n_states), (cap, scale) = chunk, constants
    (B, N, D), S, upcast = query.shape, key.shape[1], _upcast(query)
    n_t, n_s, n_d = -(-n_states // size.states), live.shape[2], -(-D // size.outer)
    launch = {"num_warps": size.warps, "num_stages": size.stages}
    block = {"UPCAST": upcast, "BT": size.states, "BS": size.slots}
    kernels._score_gradient_kernel[n_s, n_t, B](
        query, key, births, deaths, targets, weights, kinds, live, loss, lse, inverse, gain, scratch,
        cap, scale / cap, scale, N, S, D, first, n_states, SOFT=kinds is not None, BD=size.width, **block, **launch,
    )  # fmt: skip
    outer = {"BK": size.inner, "BD": size.outer}
    kernels._query_gradient_kernel[n_d, n_t, B](
        scratch, key, stop_key, stop_grad, *listed(live), outputs[0],
        N, S, D, first, n_states, n_s, **block, **outer, **launch,
    )  # fmt: skip
    i_t = first // size.states
    tiles, counts = listed(live[:, i_t : i_t + n_t].transpose(1, 2))
    kernels._key_gradient_kernel[n_d, n_s, B](
        scratch, query, tiles, counts, outputs[1],
        N, S, D, first, n_states, n_t, **block, **outer, **launch,
    )  # fmt: skip


@_backward.register_fake
def _(grad, query, key, stop_key, births, deaths, targets, weights, kinds, loss, lse, inverse, stops, cap, scale):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(stop_key)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, cap, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.constants = cap, scale
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, grad, *_):
    return *_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.constants), *[None] * 7


_forward.register_autograd(_gradients, setup_context=_setup_context)


def slot_cross_entropy_triton(
    query: Tensor, key: Tensor, stop_key: Tensor, births: Tensor, deaths: Tensor, targets: Tensor,
    weights: Tensor | None, kinds: Tensor | None, cap: float, scale: float,
) -> Tensor:  # fmt: skip
    """See :func:`slot_cross_entropy`; births, deaths and weights must fit 32 bits."""
    integers = [None if x is None else x.int().contiguous() for x in (births, deaths, targets, weights, kinds)]
    tensors = query.contiguous(), key.contiguous(), stop_key.contiguous()
    return _forward(*tensors, *integers, float(cap), float(scale))[0]


def _upcast(query: Tensor) -> bool:
    # arithmetic on bfloat16 is silently wrong in the interpreter; the values themselves are exact in float32
    return interpreting() and query.dtype == torch.bfloat16


__all__ = ["slot_cross_entropy_triton"]
