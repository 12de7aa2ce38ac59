"""Eager twin of the Triton kernels and the oracle of their tests. Quadratic in memory."""

import torch


def offsets_reference(
    positions_BK: torch.Tensor | None,
    horizon_BQ: torch.Tensor,
    start_BQ: torch.Tensor,
    entries_BQ: torch.Tensor,
    num_keys: int,
) -> torch.Tensor:
    """Return offset(i, j), int64 `[B, Q, K]`; entries of invisible keys are meaningless."""
    if positions_BK is None:
        positions_BK = torch.arange(num_keys, device=horizon_BQ.device).expand(len(horizon_BQ), -1)
    seen_BQK = visible_reference(horizon_BQ, start_BQ, num_keys)
    in_text_BK = positions_BK.argsort(dim=1, stable=True)
    seen_in_text_BQK = seen_BQK.gather(2, in_text_BK[:, None].expand_as(seen_BQK)).long()
    # zero seen keys stand before the first one; equal positions (in several texts) count as the first of them
    before_BQK = torch.nn.functional.pad(seen_in_text_BQK.cumsum(2), (1, 0))
    rank_BK = torch.searchsorted(positions_BK.gather(1, in_text_BK), positions_BK.contiguous())
    count_BQK = before_BQK.gather(2, rank_BK[:, None].expand_as(seen_BQK))
    return count_BQK - count_BQK.gather(2, entries_BQ.long()[..., None])


def visible_reference(horizon_BQ: torch.Tensor, start_BQ: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Return the boolean `[B, Q, K]` table of start_i <= j <= horizon_i."""
    key_K = torch.arange(num_keys, device=horizon_BQ.device)
    return (key_K >= start_BQ[..., None]) & (key_K <= horizon_BQ[..., None])


def insertion_attention_reference(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKD: torch.Tensor,
    offsets_BQK: torch.Tensor,
    visible_BQK: torch.Tensor,
    left_slopes_H: torch.Tensor,
    right_slopes_H: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    heads = q_BHQD.shape[1] // k_BGKD.shape[1]
    k_BHKD, v_BHKD = (x.repeat_interleave(heads, dim=1) for x in (k_BGKD, v_BGKD))
    wide = torch.promote_types(q_BHQD.dtype, torch.float32)
    left_H11, right_H11 = (slopes.to(wide)[:, None, None] for slopes in (left_slopes_H, right_slopes_H))
    offsets_B1QK, visible_B1QK = offsets_BQK[:, None], visible_BQK[:, None]
    bias_BHQK = -left_H11 * (-offsets_B1QK).clamp_min(0) - right_H11 * offsets_B1QK.clamp_min(0)
    scores_BHQK = (q_BHQD @ k_BHKD.transpose(2, 3) * scale).to(wide) + bias_BHQK
    # a finite floor, and 0 afterwards: a query that sees nothing gets 0 and passes no gradient
    weights_BHQK = scores_BHQK.masked_fill(~visible_B1QK, torch.finfo(wide).min).softmax(-1) * visible_B1QK
    return weights_BHQK.to(q_BHQD.dtype) @ v_BHKD


__all__ = ["insertion_attention_reference", "offsets_reference", "visible_reference"]
