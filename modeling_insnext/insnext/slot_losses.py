"""Losses of a whole insertion sequence: -log p(slot or STOP) and -log p(token | slot) of every step, in one pass.

Shape suffixes as in slots; M supervised steps.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import Interval
from .slots import InsNextSlotHead, SlotTable, missing_units, slot_table
from .supervision import Supervision, TargetKind
from .token_cross_entropy import frozen_cross_entropy, is_frozen


try:
    from insnext_kernels import slot_cross_entropy
except ImportError:
    slot_cross_entropy = None


STATES_PER_CHUNK = 512
TOKENS_PER_CHUNK = 2048


class StateTargets(NamedTuple):
    """What each state of an insertion sequence is trained on.

    Attributes:
        writes_BN: True where the state is trained on the place and the token of the next entry.
        stops_BN: True where the state is trained to stop.
        kinds_BN: `TargetKind` of the place; `None` means `HARD` everywhere.
        missing_BS: Units missing in each slot, for the soft kinds.
    """

    writes_BN: torch.Tensor
    stops_BN: torch.Tensor
    kinds_BN: torch.Tensor | None = None
    missing_BS: torch.Tensor | None = None


def _chunked(function, chunks, *shared):
    """Return `[function(*chunk, *shared)]`; with several chunks and gradients, insides are recomputed, not kept."""
    if torch.is_grad_enabled() and len(chunks) > 1:
        return [checkpoint(function, *chunk, *shared, use_reentrant=False) for chunk in chunks]
    return [function(*chunk, *shared) for chunk in chunks]


def position_loss(
    head: InsNextSlotHead,
    hidden_BND: torch.Tensor,
    sides: tuple[torch.Tensor, torch.Tensor],
    table: SlotTable,
    start_BN: torch.Tensor,
    targets: StateTargets,
) -> torch.Tensor:
    """Return -log p(slot or STOP) of every state, `[B, N]`, 0 where the state decides nothing that is supervised.

    With `attn_implementation="insnext_triton"` a kernel scores the slots tile by tile; it is the same function.

    Args:
        head: The model's slot head.
        hidden_BND: Hidden states of the entries.
        sides: `head.sequence_sides(hidden_BND)`.
        table: Slots of the sequence.
        start_BN: First entry of each entry's text.
        targets: What each state is trained on.
    """
    N = hidden_BND.shape[1]
    decides_BN = targets.writes_BN | targets.stops_BN
    slots_BSD = head.slot(_rows(sides[0], table.left_BS.clamp_min(0)), _rows(sides[1], table.right_BS))
    target_BN = torch.where(targets.stops_BN, 2 * N, table.slot_BN.roll(-1, 1))

    def states_loss(query, target, states, keys):
        log_p = head.log_p(query, keys, table.alive(start_BN, states))
        loss = -log_p.gather(2, target[..., None]).squeeze(2)
        if targets.kinds_BN is None:
            return loss
        kind = torch.where(targets.stops_BN, TargetKind.HARD, targets.kinds_BN)[:, states, None]
        missing, log_p = targets.missing_BS[:, None], log_p[..., :-1]
        weight = torch.where(kind == TargetKind.EQUAL, missing.clamp_max(1), missing) * log_p.isfinite()
        soft = -(weight * log_p.nan_to_num(neginf=0.0)).sum(2) / weight.sum(2).clamp_min(1)
        return torch.where(kind.squeeze(2) == TargetKind.HARD, loss, soft)

    query_BND, keys_BSD = head.query_proj(hidden_BND), head.key_proj(slots_BSD)
    if head.config._attn_implementation == "insnext_triton":
        target_BN = torch.where(decides_BN, target_BN, -1)
        return _streamed_loss(head, query_BND, keys_BSD, table, start_BN, target_BN, targets)
    slices = [slice(i, min(i + STATES_PER_CHUNK, N)) for i in range(0, N, STATES_PER_CHUNK)]
    chunks = [(query_BND[:, states], target_BN[:, states], states) for states in slices]
    loss_BN = torch.cat(_chunked(states_loss, chunks, keys_BSD), 1)
    return torch.where(decides_BN, loss_BN, 0.0)


def _streamed_loss(head, query_BND, keys_BSD, table, start_BN, target_BN, targets):
    N = start_BN.shape[1]
    entry_BN = torch.arange(N, device=start_BN.device).expand_as(start_BN)
    # a slot into which nothing is written lives to the end of its text
    end_BN = torch.zeros_like(start_BN).scatter_reduce(1, start_BN, entry_BN + 1, "amax")
    end_BS = end_BN.gather(1, start_BN.gather(1, table.left_BS.clamp_min(0)))
    dies_BS = torch.where(table.left_BS >= 0, torch.minimum(table.dies_BS, end_BS), 0)
    return slot_cross_entropy(
        query_BND,
        keys_BSD,
        head().stop_key.to(query_BND.dtype),
        table.born_BS,
        dies_BS,
        target_BN,
        targets.missing_BS,
        targets.kinds_BN,
        cap=head.cap,
        scale=head.scaling,
        impl="triton",
    )


def token_loss(
    model: nn.Module,
    hidden_BND: torch.Tensor,
    sides: tuple[torch.Tensor, torch.Tensor],
    table: SlotTable,
    input_ids_BN: torch.Tensor,
    writes_BN: torch.Tensor,
) -> torch.Tensor:
    """Return -log p(token | slot) of what each supervised state writes, `[B, N]`, 0 elsewhere.

    Logits exist for at most `TOKENS_PER_CHUNK` states at a time.
    """
    b_M, state_M = writes_BN.nonzero(as_tuple=True)
    if not len(b_M):
        return hidden_BND.new_zeros(hidden_BND.shape[:2])
    head, slot_M = model.slot_head, table.slot_BN[b_M, state_M + 1]
    slot_MD = head.slot(sides[0][b_M, table.left_BS[b_M, slot_M]], sides[1][b_M, table.right_BS[b_M, slot_M]])
    states_MD = head.token_state(slot_MD, hidden_BND[b_M, state_M])
    target_M = input_ids_BN[b_M, state_M + 1]

    if torch.is_grad_enabled() and is_frozen(model.lm_head):
        loss_M = frozen_cross_entropy(model, states_MD, target_M)
        return loss_M.new_zeros(hidden_BND.shape[:2]).index_put((b_M, state_M), loss_M)

    def tokens_loss(states, target):
        return nn.functional.cross_entropy(model.token_logits(states), target, reduction="none")

    chunks = list(zip(states_MD.split(TOKENS_PER_CHUNK), target_M.split(TOKENS_PER_CHUNK), strict=True))
    loss_M = torch.cat(_chunked(tokens_loss, chunks))
    return loss_M.new_zeros(hidden_BND.shape[:2]).index_put((b_M, state_M), loss_M)


def insertion_losses(
    model: nn.Module,
    hidden_BND: torch.Tensor,
    input_ids_BN: torch.Tensor,
    interval: Interval,
    supervision: Supervision,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return position and token loss of every state, `[B, N]` in nats, and which states write something supervised.

    Args:
        model: What has `slot_head`, `token_logits` and `config`: an `InsNextForInsertionLM`.
        hidden_BND: Hidden states of the entries.
        input_ids_BN: The entries.
        interval: Who saw whom.
        supervision: What is trained on.

    Raises:
        ValueError: If `target_kinds` come without `unit_starts`, or the label of a written token is structure or
            another token.
    """
    positions_BN, start_BN, horizon_BN, *_ = interval
    if supervision.target_kinds is not None and supervision.unit_starts is None:
        raise ValueError("target_kinds need unit_starts, got None")
    table = slot_table(positions_BN, start_BN, horizon_BN)
    written_BN = table.written_BN & (supervision.labels != -100)
    if not torch.compiler.is_compiling():
        _check_labels(written_BN, input_ids_BN, supervision.labels, model.config.never_inserted)
    targets = _state_targets(written_BN, table, interval, supervision)
    sides = model.slot_head.sequence_sides(hidden_BND)
    position_BN = position_loss(model.slot_head, hidden_BND, sides, table, start_BN, targets)
    token_BN = token_loss(model, hidden_BND, sides, table, input_ids_BN, targets.writes_BN)
    return position_BN, token_BN, targets.writes_BN


def _state_targets(written_BN, table: SlotTable, interval: Interval, supervision: Supervision) -> StateTargets:
    """Say for every state what the supervision says of the entry it decides about, the next one."""
    positions_BN, start_BN, _, entries_BN, *_ = interval
    _, stop_targets, kinds_BN, unit_starts, _ = supervision
    ends_BN = _text_ends(start_BN)
    # padding sees itself only, just as a text of one token would
    stops_BN = ends_BN & (start_BN != entries_BN) if stop_targets is None else ends_BN & stop_targets
    missing_BS = None
    if kinds_BN is not None:
        missing_BS = missing_units(table, positions_BN, start_BN, unit_starts)
        kinds_BN = _of_next(kinds_BN, TargetKind.HARD)
    return StateTargets(_of_next(written_BN, False), stops_BN, kinds_BN, missing_BS)


def _check_labels(written_BN, input_ids_BN, labels_BN, never_inserted) -> None:
    structure = torch.tensor(never_inserted, dtype=torch.long, device=input_ids_BN.device)
    for rule, wrong_BN in (
        ("labels must be input_ids, or -100", labels_BN != input_ids_BN),
        (f"ids {never_inserted} are structure and never written", torch.isin(input_ids_BN, structure)),
    ):
        if (written_BN & wrong_BN).any():
            b, i = (written_BN & wrong_BN).nonzero()[0].tolist()
            raise ValueError(
                f"{rule}, got label {int(labels_BN[b, i])} for id {int(input_ids_BN[b, i])} at token {i} of row {b}"
            )


def mean_losses(
    losses: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    start_BN: torch.Tensor,
    step_weights_BN: torch.Tensor | None,
    num_items: torch.Tensor | int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss, and without weights and gradient its position and its token part, in nats per inserted token.

    Args:
        losses: Result of :func:`insertion_losses`.
        start_BN: First entry of each entry's text.
        step_weights_BN: Weight of the loss of each entry's insertion; stopping weighs 1.
        num_items: Divisor of the loss; by default the number of supervised tokens.
    """
    position_BN, token_BN, supervised_BN = losses
    count = supervised_BN.sum().clamp_min(1)
    loss_BN = position_BN + token_BN
    if step_weights_BN is not None:
        loss_BN = loss_BN * torch.where(_text_ends(start_BN), 1.0, _of_next(step_weights_BN, 1.0))
    loss = loss_BN.sum() / divisor(count, num_items)
    return loss, position_BN.detach().sum() / count, token_BN.detach().sum() / count


def divisor(count: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Return by what a sum of losses is divided: `num_items` where given, else `count`; at least 1."""
    return torch.as_tensor(count if num_items is None else num_items, device=count.device).clamp_min(1)


def _text_ends(start_BN: torch.Tensor) -> torch.Tensor:
    return _of_next(start_BN, -1) != start_BN


def _rows(values_BND: torch.Tensor, index_BS: torch.Tensor) -> torch.Tensor:
    return values_BND.gather(1, index_BS[..., None].expand(-1, -1, values_BND.shape[-1]))


def _of_next(values_BN: torch.Tensor, last) -> torch.Tensor:
    """Return for every state what `values` says of the entry it decides about, the next one; `last` for the last."""
    return torch.cat([values_BN[:, 1:], torch.full_like(values_BN[:, :1], last)], 1)


__all__ = ["divisor", "insertion_losses", "mean_losses"]
