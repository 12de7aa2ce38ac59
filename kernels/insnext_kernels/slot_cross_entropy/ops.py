"""`slot_cross_entropy` as PyTorch operators: shapes for `torch.compile`, and the rule for gradients.

Triton is imported where a launch happens, so this module needs torch only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import operator


class Slots(NamedTuple):
    """When slots live and what states choose, all int32 but the weights; see :func:`slot_cross_entropy`.

    Births and deaths lie in [0, N], targets in [-1, S + 1], of which S + 1 is never alive.
    """

    births: Tensor
    deaths: Tensor
    targets: Tensor
    weights: Tensor | None
    kinds: Tensor | None


@operator("slot_cross_entropy")
def _forward(
    query: Tensor, key: Tensor, stop_key: Tensor, births: Tensor, deaths: Tensor, targets: Tensor,
    weights: Tensor | None, kinds: Tensor | None, cap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss, log-normaliser, inverse of the sum of target weights and logit of STOP, each `[B, N]`."""
    from .triton.forward import launch_forward

    return tuple(launch_forward(query, key, stop_key, Slots(births, deaths, targets, weights, kinds), cap, scale))


@_forward.register_fake
def _(query, key, stop_key, births, deaths, targets, weights, kinds, cap, scale):
    return tuple(query.new_empty(query.shape[:2], dtype=torch.float32) for _ in range(4))


@operator("slot_cross_entropy_backward")
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, stop_key: Tensor, births: Tensor, deaths: Tensor, targets: Tensor,
    weights: Tensor | None, kinds: Tensor | None, loss: Tensor, lse: Tensor, inverse: Tensor, stops: Tensor,
    cap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .triton.backward import launch_backward

    slots = Slots(births, deaths, targets, weights, kinds)
    return launch_backward(grad, query, key, stop_key, slots, (loss, lse, inverse, stops), cap, scale)


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


def slot_losses(query: Tensor, key: Tensor, stop_key: Tensor, slots: Slots, cap: float, scale: float) -> Tensor:
    """See :func:`slot_cross_entropy`."""
    # within their bounds, these fit 32 bits; weights stay as wide as they are
    integers = [x.int().contiguous() for x in slots[:3]]
    soft = [None, None] if slots.kinds is None else [slots.weights.contiguous(), slots.kinds.int().contiguous()]
    tensors = query.contiguous(), key.contiguous(), stop_key.contiguous()
    return _forward(*tensors, *integers, *soft, cap, scale)[0]
