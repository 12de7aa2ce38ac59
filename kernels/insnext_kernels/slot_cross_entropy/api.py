"""What users call: arguments are checked here, and handed to an implementation. Needs torch only."""

import torch

from ..common import check_positive, check_range, check_tensors, choose_impl
from .kinds import Kind
from .ops import Slots, slot_losses
from .reference import slot_cross_entropy_reference


MAX_CAP = 60
# as plain numbers, which torch.compile knows to compare
KINDS = int(min(Kind)), int(max(Kind))


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
        births_BS: First state that has the slot; any integers.
        deaths_BS: First state that no longer has it, at most the end of its text; with deaths <= births it is none.
        targets_BN: Row of the slot that state t is to choose, S for STOP, -1 for a state without loss: 0, without
            gradient. A target that is not alive costs `inf`.
        weights_BS: Non-negative integers of which S sum up to less than 2^63, for kinds 1 and 2.
        kinds_BN: The `Kind` of each state: 0 its target, 1 and 2 as above; only where the target is a slot. Where no
            weight is positive the loss is 0, without gradient. `None` means 0 everywhere.
        cap: Bound of the logits, positive and finite; with Triton at most 60.
        scale: Factor of the scores, positive and finite, by default 1 / sqrt(D).
        impl: "reference", "triton" or "auto" (triton on CUDA). An explicit choice never falls back.

    Values of integers are looked at on a CPU only. On a GPU a state whose target or kind is none costs `inf`.

    Raises:
        TypeError: If an argument is no tensor, or `cap` or `scale` no number.
        ValueError: If shapes, dtypes or devices disagree, a value is out of range, `kinds` come without `weights`, or
            `impl` is unknown or cannot run here.
    """
    check_tensors(
        query=query_BND, key=key_BSD, stop_key=stop_key_D, births=births_BS, deaths=deaths_BS, targets=targets_BN,
        weights=weights_BS, kinds=kinds_BN,
    )  # fmt: skip
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
    if not query_BND.dtype == key_BSD.dtype == stop_key_D.dtype or not query_BND.is_floating_point():
        raise ValueError(
            "query, key and stop_key must have one float dtype, got "
            f"{query_BND.dtype}, {key_BSD.dtype} and {stop_key_D.dtype}"
        )
    if kinds_BN is not None and weights_BS is None:
        raise ValueError("kinds need weights, got None")
    check_range("targets", targets_BN, -1, S)
    check_range("kinds", kinds_BN, *KINDS)
    check_range("weights", weights_BS, 0, torch.iinfo(torch.int64).max // max(S, 1))
    cap, scale = check_positive("cap", cap), check_positive("scale", D**-0.5 if scale is None else scale)
    tensors = query_BND, key_BSD, stop_key_D
    slots = Slots(*_bounded(births_BS, deaths_BS, targets_BN, kinds_BN), weights_BS, kinds_BN)
    if choose_impl(impl, query_BND) == "reference":
        return slot_cross_entropy_reference(*tensors, *slots, cap, scale)
    if query_BND.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f'impl="triton" needs float16, bfloat16 or float32, got {query_BND.dtype}')
    if cap > MAX_CAP:
        raise ValueError(f'impl="triton" needs cap <= {MAX_CAP}, so that float32 holds sums of exp(cap), got {cap}')
    return slot_losses(*tensors, slots, cap, scale)


def _bounded(births_BS, deaths_BS, targets_BN, kinds_BN) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return births and deaths in [0, N], which is all that a state can tell, and targets in [-1, S + 1].

    S + 1 is no slot and never alive; it takes the place of the target where a kind is none.
    """
    N, S = targets_BN.shape[1], births_BS.shape[1]
    births_BS, deaths_BS, targets_BN = (x.long() for x in (births_BS, deaths_BS, targets_BN))
    targets_BN = targets_BN.clamp(-1, S + 1)
    if kinds_BN is not None:
        targets_BN = targets_BN.masked_fill((kinds_BN < KINDS[0]) | (kinds_BN > KINDS[1]), S + 1)
    return births_BS.clamp(0, N), deaths_BS.clamp(0, N), targets_BN


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")


def _check_integers(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None:
        _check_shape(name, tensor, shape)
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")


def _shapes(*tensors: torch.Tensor) -> str:
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)


__all__ = ["slot_cross_entropy"]
