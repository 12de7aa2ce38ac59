"""Loss of where the next token goes: cross-entropy over the slots alive at each step, and STOP. Needs torch only."""

import torch

from ..common import choose_impl
from .reference import slot_cross_entropy_reference


MAX_CAP = 60


def slot_cross_entropy(
    query_BND: torch.Tensor,
    key_BSD: torch.Tensor,
    stop_key_D: torch.Tensor,
    births_BS: torch.Tensor,
    deaths_BS: torch.Tensor,
    targets_BN: torch.Tensor,
    weights_BS: torch.Tensor | None = None,
    kinds_BN: torch.Tensor | None = None,
    *,
    cap: float,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return the cross-entropy of every state in nats, `[B, N]`, float32 or wider.

    State t chooses among STOP and the slots alive at t, births_s <= t < deaths_s, with

        z_ts = cap tanh(scale q_t . k_s / cap),    log p_ts = z_ts - log(exp(z_t,STOP) + sum_alive exp(z_tr))
        loss_t = - sum_alive w_ts log p_ts / sum_alive w_ts

    where w_ts is 1 at s = targets_t, or of kind 1 weights_s, or of kind 2 min(weights_s, 1). The logits exist a tile
    at a time; backward holds those of at most 1024 states. Gradients reach `query`, `key` and `stop_key`, and do not
    depend on the run (no atomics).

    Args:
        query_BND: One query for each state; float16, bfloat16 or float32 (the reference: any float).
        key_BSD: One key for each slot, of the same dtype.
        stop_key_D: The key of STOP, of the same dtype.
        births_BS: First state that has the slot.
        deaths_BS: First state that no longer has it, at most the end of its text; with deaths <= births it is none.
        targets_BN: Row of the slot that state t is to choose, S for STOP, -1 for a state without loss: 0, without
            gradient. A target that is not alive costs `inf`.
        weights_BS: Non-negative integers, for kinds 1 and 2.
        kinds_BN: Kind of each state: 0 its target, 1 and 2 as above; only where the target is a slot. Where no weight
            is positive the loss is 0, without gradient. `None` means 0 everywhere.
        cap: Bound of the logits, positive; with Triton at most 60.
        scale: Factor of the scores, by default 1 / sqrt(D).
        impl: "reference", "triton" or "auto" (triton on CUDA). An explicit choice never falls back.

    Raises:
        ValueError: If shapes or dtypes disagree, `cap` is not positive, `kinds` come without `weights`, or `impl` is
            unknown or cannot run here.
    """
    if query_BND.ndim != 3 or key_BSD.ndim != 3:
        raise ValueError(f"need query [B, N, D] and key [B, S, D], got {_shapes(query_BND, key_BSD)}")
    B, N, D = query_BND.shape
    S = key_BSD.shape[1]
    _check_shape("key", key_BSD, (B, S, D))
    _check_shape("stop_key", stop_key_D, (D,))
    for name, tensor in (("births", births_BS), ("deaths", deaths_BS), ("weights", weights_BS)):
        _check_integers(name, tensor, (B, S))
    for name, tensor in (("targets", targets_BN), ("kinds", kinds_BN)):
        _check_integers(name, tensor, (B, N))
    if not query_BND.dtype == key_BSD.dtype == stop_key_D.dtype:
        raise ValueError(
            "query, key and stop_key must have one dtype, got "
            f"{query_BND.dtype}, {key_BSD.dtype} and {stop_key_D.dtype}"
        )
    if kinds_BN is not None and weights_BS is None:
        raise ValueError("kinds need weights, got None")
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")
    scale = D**-0.5 if scale is None else scale
    tensors = query_BND, key_BSD, stop_key_D, births_BS, deaths_BS, targets_BN, weights_BS, kinds_BN
    if choose_impl(impl, query_BND) == "reference":
        return slot_cross_entropy_reference(*tensors, cap, scale)
    if query_BND.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f'impl="triton" needs float16, bfloat16 or float32, got {query_BND.dtype}')
    if cap > MAX_CAP:
        raise ValueError(f'impl="triton" needs cap <= {MAX_CAP}, so that float32 holds sums of exp(cap), got {cap}')
    from .ops import slot_cross_entropy_triton

    return slot_cross_entropy_triton(*tensors, cap, scale)


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")


def _check_integers(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None:
        _check_shape(name, tensor, shape)
        if tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")


def _shapes(*tensors: torch.Tensor) -> str:
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)


__all__ = ["slot_cross_entropy"]
