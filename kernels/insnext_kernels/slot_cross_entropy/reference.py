"""Eager twin of the Triton kernels and the oracle of their tests."""

import torch

from .kinds import Kind


# as plain numbers, which torch.compile knows to compare
ITS_TARGET, ALIKE = int(Kind.ITS_TARGET), int(Kind.ALIKE)


def slot_cross_entropy_reference(
    query_BND: torch.Tensor,
    key_BSD: torch.Tensor,
    stop_key_D: torch.Tensor,
    births_BS: torch.Tensor,
    deaths_BS: torch.Tensor,
    targets_BN: torch.Tensor,
    weights_BS: torch.Tensor | None,
    kinds_BN: torch.Tensor | None,
    cap: float,
    scale: float,
) -> torch.Tensor:
    B, N, _ = query_BND.shape
    S = key_BSD.shape[1]
    wide = torch.promote_types(query_BND.dtype, torch.float32)
    state_N1 = torch.arange(N, device=query_BND.device)[:, None]
    alive_BNS = (births_BS[:, None] <= state_N1) & (state_N1 < deaths_BS[:, None])

    # row S is STOP, which is always alive
    keys = torch.cat([key_BSD, stop_key_D.expand(B, 1, -1)], 1)
    scores = (query_BND @ keys.transpose(1, 2)).to(wide)
    logits = cap * torch.tanh(scores * scale / cap)
    log_p = logits.masked_fill(~_with_stop(alive_BNS, True), -torch.inf).log_softmax(2)

    hard_BN = -log_p.gather(2, targets_BN.clamp(0, S).long()[..., None]).squeeze(2)
    loss_BN = torch.where(targets_BN >= 0, hard_BN, 0.0).masked_fill(targets_BN > S, torch.inf)
    if kinds_BN is None:
        return loss_BN
    weight = torch.where(kinds_BN[..., None] == ALIKE, weights_BS[:, None].clamp_max(1), weights_BS[:, None])
    weight = _with_stop(weight * alive_BNS, 0)
    soft_BN = -(weight * log_p.masked_fill(weight == 0, 0.0)).sum(2) / weight.sum(2).clamp_min(1)
    is_soft_BN = (kinds_BN != ITS_TARGET) & (targets_BN >= 0) & (targets_BN < S)
    return torch.where(is_soft_BN, soft_BN, loss_BN)


def _with_stop(values_BNS: torch.Tensor, stop: int | bool) -> torch.Tensor:
    return torch.nn.functional.pad(values_BNS, (0, 1), value=stop)


__all__ = ["slot_cross_entropy_reference"]
