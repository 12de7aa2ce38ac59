"""-log p(token | slot) over a vocabulary whose embedding is not trained: no logits are kept for the way back.

Shape suffixes as in slots; M states.
"""

from collections.abc import Callable

import torch
from torch import nn


STATES_PER_CHUNK = 256


def is_frozen(head: nn.Linear) -> bool:
    """Whether a head is what it seems, weights that stay, with nothing around it: adapters, hooks, shards, codes."""
    changed = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and head.bias is None
    return plain and not changed and not head.weight.requires_grad and not torch.compiler.is_compiling()


class _FrozenCrossEntropy(torch.autograd.Function):
    """A loss of each state has a gradient of its own, which is found beside it and weighed on the way back."""

    @staticmethod
    def forward(ctx, states_MD, target_M, logits: Callable, weight_VD):
        losses, gradients = [], []
        for states, target in zip(states_MD.split(STATES_PER_CHUNK), target_M.split(STATES_PER_CHUNK), strict=True):
            log_p = logits(states).log_softmax(-1)
            losses.append(-log_p.gather(1, target[:, None]).squeeze(1))
            p = log_p.exp_()
            p.scatter_add_(1, target[:, None], p.new_full((len(p), 1), -1.0))
            gradients.append((p.to(weight_VD.dtype) @ weight_VD).to(states.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_M):
        (gradient_MD,) = ctx.saved_tensors
        return gradient_MD * grad_M[:, None].to(gradient_MD.dtype), None, None, None


def frozen_cross_entropy(model: nn.Module, states_MD: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
    """Return `cross_entropy(model.token_logits(states), target)` of every state, `[M]`, with the gradient of states.

    Args:
        model: What has `token_logits` and an `lm_head` that `is_frozen`.
        states_MD: `slot_head.token_state` of slots and states.
        target_M: The tokens.
    """
    return _FrozenCrossEntropy.apply(states_MD, target_M, model.token_logits, model.lm_head.weight)


__all__ = ["frozen_cross_entropy", "is_frozen"]
