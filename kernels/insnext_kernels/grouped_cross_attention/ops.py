"""`torch.library` operators around the Triton launches: shapes for the compiler, gradients for autograd.

Triton is imported where a launch happens, so this module needs torch only.
"""

import torch
from torch import Tensor

from ..common import full_programs, operator


# a tile of the tensor cores; more queries than this fill a GPU by themselves
MAX_DECODE_ROWS = 16


def _rows(q: Tensor, k: Tensor, indices: Tensor) -> int:
    """Return the number of queries that read a chunk through one key head."""
    return q.shape[1] // k.shape[1] * (q.shape[2] // indices.shape[1])


def wants_decode(q: Tensor, k: Tensor, indices: Tensor) -> bool:
    """Return whether one program for all slots of a query chunk would leave the GPU idle."""
    programs = indices.shape[0] * indices.shape[1] * k.shape[1]
    return _rows(q, k, indices) <= MAX_DECODE_ROWS and programs < full_programs(q)


def decode_parts(q: Tensor, k: Tensor, indices: Tensor) -> int:
    """Return into how many parts the keys of a slot are cut: at least 16 keys each, and fewer results than values."""
    programs = indices.numel() * k.shape[1]
    S, parts = k.shape[3], 1
    while programs * parts < full_programs(q) and 2 * parts * 16 <= S and 2 * parts * _rows(q, k, indices) <= S // 2:
        parts *= 2
    return parts


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


def _rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@operator("gca_forward")
def forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, off_by_one: bool, scale: float, save_lse: bool
) -> tuple[Tensor, Tensor]:
    from .triton.forward import launch_forward

    tensors = *_rows_contiguous(q, k, v), *_contiguous(indices, weights)
    return launch_forward(*tensors, off_by_one, scale, save_lse)


@forward.register_fake
def _(q, k, v, indices, weights, off_by_one, scale, save_lse):
    B, H, T, D = q.shape
    lse_shape = (B, H, indices.shape[2], T) if save_lse else (0,)
    return q.new_empty(B, T, H, D).transpose(1, 2), q.new_empty(lse_shape, dtype=torch.float32)


@operator("gca_backward_q")
def backward_q(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton.backward import launch_backward_q

    return launch_backward_q(*_rows_contiguous(do, q, k, v), *_contiguous(indices, weights), lse, scale)


@backward_q.register_fake
def _(do, q, k, v, indices, weights, lse, scale):
    B, H, T, D = q.shape
    dweights = weights.new_empty(weights.shape)
    return q.new_empty(B, T, H, D).transpose(1, 2), dweights, lse.new_empty(lse.shape)


@operator("gca_backward_kv")
def backward_kv(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from .triton.backward import launch_backward_kv

    return launch_backward_kv(*_rows_contiguous(do, q, k, v), *_contiguous(indices, weights), lse, delta, scale)


@backward_kv.register_fake
def _(do, q, k, v, indices, weights, lse, delta, scale):
    B, G, N, S, D = k.shape
    dk, dv = (k.new_empty(B, N, S, G, D).permute(0, 3, 1, 2, 4) for _ in range(2))
    return dk, dv


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _, ctx.scale, save_lse = inputs
    if not save_lse:
        raise ValueError("a gradient was asked for, but forward did not save the normalisers it needs")
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    # no zeros for the normalisers
    ctx.set_materialize_grads(False)


def _backward(ctx, do, _dlse):
    *tensors, lse = ctx.saved_tensors
    dq, dweights, delta = backward_q(do, *tensors, lse, ctx.scale)
    dk = dv = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        dk, dv = backward_kv(do, *tensors, lse, delta, ctx.scale)
    return dq, dk, dv, None, dweights, None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)


@operator("gca_decode")
def decode(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, off_by_one: bool, scale: float
) -> Tensor:
    from .triton.decode import launch_decode

    parts = decode_parts(q, k, indices)
    return launch_decode(*_rows_contiguous(q, k, v), *_contiguous(indices, weights), off_by_one, scale, parts)


@decode.register_fake
def _(q, k, v, indices, weights, off_by_one, scale):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)
