"""Slots: where the next token may go, how every step of an insertion sequence is scored in one pass, and the losses.

Shape suffixes: B rows, N tokens in insertion order, S = 2N slots, D hidden size, V vocabulary size, M supervised
steps.

There is one slot right of every present token. A token i, once encoded, makes the slot A_i = (i, right neighbour) and,
unless its left neighbour was encoded together with it, the slot B_i = (left neighbour, i). So a whole insertion
sequence has a table of 2N slots: row i is A_i and row N + i is B_i. A slot lives from the state at which its younger
side is encoded until a token is written into it. State i is the hidden state of entry i of the insertion order; it
decides about entry i + 1, or about stopping:

    text   <bos> a c        context; then b is written between a and c, then d after c
    entry      0 1 2 | 3=b 4=d
    state 2    slots (0,1) (1,2) (2,edge)               writes b into (1,2)
    state 3    slots (0,1) (1,3) (3,2) (2,edge)         writes d into (2,edge)
    state 4    slots (0,1) (1,3) (3,2) (2,4) (4,edge)   stops

With u = W_l h_left + W_r h_right and the state h:

    p(slot or STOP) = softmax over the live slots and STOP of c tanh(z / c),  z = (W_q h) . (W_k u) / sqrt(D)
    p(token | slot) = softmax over V of E . RMSNorm(u + W_g h)

Sources: InsNet (arXiv:2102.11008) section 3 for the slots; soft cap: InsNeXt; the algebra is ours (see the README).
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


try:
    from insnext_kernels import slot_cross_entropy
except ImportError:
    slot_cross_entropy = None


HARD, MISSING_UNITS, UNFINISHED_GAPS = 0, 1, 2
STATES_PER_CHUNK = 512
TOKENS_PER_CHUNK = 2048


class SlotTable(NamedTuple):
    """All slots of an insertion sequence and, for every entry, the slot it was written into.

    Attributes:
        left_BS: Index of the left token; -1 where the row is no slot.
        right_BS: Index of the right token; N is the right edge of the text.
        born_BS: First state that has the slot.
        dies_BS: First state that no longer has it.
        slot_BN: Row of the slot that entry i was written into, 2N (STOP) where it was not written into any.
        written_BN: True where entry i was written alone, after its text's first block: it is the work of the state
            before.
    """

    left_BS: torch.Tensor
    right_BS: torch.Tensor
    born_BS: torch.Tensor
    dies_BS: torch.Tensor
    slot_BN: torch.Tensor
    written_BN: torch.Tensor

    def alive(self, start_BN: torch.Tensor, states: slice) -> torch.Tensor:
        """Return the boolean `[B, states, S]` table of slots that a state may choose from."""
        N = start_BN.shape[1]
        state_N1 = torch.arange(N, device=start_BN.device)[states, None]
        text_BS = torch.where(self.left_BS >= 0, start_BN.gather(1, self.left_BS.clamp_min(0)), -1)
        living = (self.born_BS[:, None] <= state_N1) & (state_N1 < self.dies_BS[:, None])
        return living & (text_BS[:, None] == start_BN[:, states, None])


class Supervision(NamedTuple):
    """What is trained on, each `[B, N]` by entry of the insertion sequence; arguments of the model's `forward`."""

    labels: torch.Tensor
    stop_targets: torch.Tensor | None = None
    target_kinds: torch.Tensor | None = None
    unit_starts: torch.Tensor | None = None
    step_weights: torch.Tensor | None = None


def neighbours(
    positions_BN: torch.Tensor, start_BN: torch.Tensor, horizon_BN: torch.Tensor, older: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the nearest visible token to the left (-1 if none) and to the right (N if none).

    Args:
        positions_BN: Integers whose order is the order of the text.
        start_BN: First key of each entry's interval.
        horizon_BN: Last key of each entry's interval.
        older: Whether to leave out the tokens that were encoded in the same block.
    """
    B, N = positions_BN.shape
    key_N = torch.arange(N, device=positions_BN.device)
    low, high = torch.iinfo(positions_BN.dtype).min, torch.iinfo(positions_BN.dtype).max
    lefts, rights = [], []
    for first in range(0, N, STATES_PER_CHUNK):
        rows = slice(first, first + STATES_PER_CHUNK)
        seen = (key_N >= start_BN[:, rows, None]) & (key_N <= horizon_BN[:, rows, None])
        if older:
            seen &= horizon_BN[:, None] < horizon_BN[:, rows, None]
        keys, query = positions_BN[:, None], positions_BN[:, rows, None]
        left_value, left = keys.masked_fill(~(seen & (keys < query)), low).max(2)
        right_value, right = keys.masked_fill(~(seen & (keys > query)), high).min(2)
        lefts.append(torch.where(left_value == low, -1, left))
        rights.append(torch.where(right_value == high, N, right))
    return torch.cat(lefts, 1), torch.cat(rights, 1)


def slot_table(positions_BN: torch.Tensor, start_BN: torch.Tensor, horizon_BN: torch.Tensor) -> SlotTable:
    """Derive every slot of an insertion sequence from who was encoded when.

    Args:
        positions_BN: Integers whose order is the order of the text; only comparisons inside a text matter.
        start_BN: First entry of each entry's text.
        horizon_BN: Last entry that was encoded together with it, itself for a token written alone.

    Raises:
        ValueError: If a token was written left of its text's leftmost token, or horizons do not divide the entries
            into blocks.
    """
    if not torch.compiler.is_compiling():
        _check_blocks(horizon_BN)
    B, N = positions_BN.shape
    device = positions_BN.device
    entry_BN = torch.arange(N, device=device).expand(B, N)
    newest_left, newest_right = neighbours(positions_BN, start_BN, horizon_BN, older=False)
    older_left, older_right = neighbours(positions_BN, start_BN, horizon_BN, older=True)

    horizon_left = horizon_BN.gather(1, newest_left.clamp_min(0))
    makes_b = (newest_left >= 0) & (horizon_left < horizon_BN)
    left_BS = torch.cat([entry_BN, torch.where(makes_b, newest_left, -1)], 1)
    right_BS = torch.cat([newest_right, entry_BN], 1)
    born_BS = horizon_BN.repeat(1, 2)

    first_block = horizon_BN == horizon_BN.gather(1, start_BN)
    written_into = ~first_block & (older_left >= 0)
    if not torch.compiler.is_compiling() and bool((~first_block & (older_left < 0) & (newest_left < 0)).any()):
        b, i = (~first_block & (older_left < 0) & (newest_left < 0)).nonzero()[0].tolist()
        raise ValueError(
            "nothing is inserted left of the leftmost token (texts start with BOS), got position "
            f"{int(positions_BN[b, i])} for token {i} of row {b}"
        )
    # the slot between two tokens was made by the later of them, and by the left one if they were encoded together
    horizon_l = horizon_BN.gather(1, older_left.clamp_min(0))
    horizon_r = horizon_BN.gather(1, older_right.clamp_max(N - 1))
    by_left = (older_right == N) | (horizon_l >= horizon_r)
    slot_BN = torch.where(by_left, older_left, N + older_right)
    slot_BN = torch.where(written_into, slot_BN, 2 * N)
    dies_BS = torch.full((B, 2 * N + 1), N, device=device).scatter_reduce(1, slot_BN, entry_BN, "amin")[:, : 2 * N]

    alone = (horizon_BN == entry_BN) & ((entry_BN == 0) | (horizon_BN.roll(1, 1) < entry_BN))
    return SlotTable(left_BS, right_BS, born_BS, dies_BS, slot_BN, written_into & alone)


def _check_blocks(horizon_BN: torch.Tensor) -> None:
    apart_BN = horizon_BN.gather(1, horizon_BN) != horizon_BN
    apart_BN[:, 1:] |= horizon_BN[:, 1:] < horizon_BN[:, :-1]
    if apart_BN.any():
        b, i = apart_BN.nonzero()[0].tolist()
        raise ValueError(
            "all entries from a token up to its horizon must have the same horizon, got "
            f"{horizon_BN[b, max(i - 1, 0) : int(horizon_BN[b, i]) + 1].tolist()} around token {i} of row {b}"
        )


def missing_units(
    table: SlotTable, positions_BN: torch.Tensor, start_BN: torch.Tensor, unit_starts_BN: torch.Tensor
) -> torch.Tensor:
    """Return, int64 `[B, S]`, how many units of the final text lie strictly inside each slot.

    Nothing is written into a slot while it lives, so all of them are missing for the whole of its life.
    """
    B, N = positions_BN.shape
    low = positions_BN.min()
    key_BN = start_BN * (positions_BN.max() - low + 1) + positions_BN - low
    by_text_BN = key_BN.argsort(dim=1)
    starts_in_text_order = unit_starts_BN.long().gather(1, by_text_BN)
    count_BN = torch.empty_like(start_BN).scatter(1, by_text_BN, starts_in_text_order.cumsum(1))
    before_BN = count_BN - unit_starts_BN.long()
    total_BN = torch.zeros_like(start_BN).scatter_reduce(1, start_BN, count_BN, "amax")
    left_BS = table.left_BS.clamp_min(0)
    edge_BS = total_BN.gather(1, start_BN.gather(1, left_BS))
    right_BS = before_BN.gather(1, table.right_BS.clamp_max(N - 1))
    upto_BS = torch.where(table.right_BS == N, edge_BS, right_BS)
    return torch.where(table.left_BS >= 0, upto_BS - count_BN.gather(1, left_BS), 0)


class InsNextSlotHead(nn.Module):
    """Scores of the slots, and the vector from which the token in a slot is read off with the tied embedding."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.left_proj = nn.Linear(D, D, bias=False)
        self.right_proj = nn.Linear(D, D, bias=False)
        self.state_proj = nn.Linear(D, D, bias=False)
        self.query_proj = nn.Linear(D, D, bias=False)
        self.key_proj = nn.Linear(D, D, bias=False)
        self.norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.edge = nn.Parameter(torch.zeros(D))
        self.stop_key = nn.Parameter(torch.zeros(D))
        self.cap = config.position_logit_cap
        self.scaling = D**-0.5

    def sides(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W_l h and W_r h, the parts a token gives to the slot right and the slot left of it."""
        return self.left_proj(hidden), self.right_proj(hidden)

    def edge_side(self) -> torch.Tensor:
        """Return W_r e, `[D]`, the part that the right edge of the text gives to its slot."""
        return self.right_proj(self.edge)

    def sequence_sides(self, hidden_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sides of a sequence; the right one has a last row N more, the edge of the text."""
        left_BND, right_BND = self.sides(hidden_BND)
        return left_BND, torch.cat([right_BND, self.edge_side().expand(len(hidden_BND), 1, -1)], 1)

    def position_logits(self, query: torch.Tensor, slot_keys: torch.Tensor) -> torch.Tensor:
        """Return the capped logits `[..., S]` of keys `[..., S, D]` for queries `[..., Q, D]`, float32 or wider."""
        scores = (query @ slot_keys.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
        return self.cap * torch.tanh(scores * self.scaling / self.cap)

    def stop_logit(self, query: torch.Tensor) -> torch.Tensor:
        """Return the capped logit of STOP, `[..., Q]`."""
        return self.position_logits(query, self.stop_key[None]).squeeze(-1)

    def token_state(self, slot: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return RMSNorm(u + W_g h), to be multiplied with the embedding."""
        return self.norm(slot + self.state_proj(state))


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
    supervised_BN: torch.Tensor,
    stops_BN: torch.Tensor,
    kinds_BN: torch.Tensor | None = None,
    missing_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return -log p(slot or STOP) of every state, `[B, N]`, 0 where the state decides nothing that is supervised.

    With `attn_implementation="insnext_triton"` a kernel scores the slots tile by tile; it is the same function.

    Args:
        head: The model's slot head.
        hidden_BND: Hidden states of the entries.
        sides: `head.sequence_sides(hidden_BND)`.
        table: Slots of the sequence.
        start_BN: First entry of each entry's text.
        supervised_BN: True where state i is trained on the place of entry i + 1.
        stops_BN: True where state i is trained to stop.
        kinds_BN: Target of state i: 0 the slot of entry i + 1; 1 every live slot in proportion to the units missing in
            it (exact for uniform orders); 2 every live slot with something missing alike (exact at a gap's end for
            gap-wise orders). `None` means 0 everywhere.
        missing_BS: Units missing in each slot, needed for kinds 1 and 2.
    """
    N = hidden_BND.shape[1]
    slots_BSD = _rows(sides[0], table.left_BS.clamp_min(0)) + _rows(sides[1], table.right_BS)
    target_BN = torch.where(stops_BN, 2 * N, table.slot_BN.roll(-1, 1))

    def states_loss(query, target, states, keys):
        logits = head.position_logits(query, keys).masked_fill(~table.alive(start_BN, states), -torch.inf)
        log_p = torch.cat([logits, head.stop_logit(query)[..., None]], 2).log_softmax(2)
        loss = -log_p.gather(2, target[..., None]).squeeze(2)
        if kinds_BN is None:
            return loss
        kind = torch.where(stops_BN, HARD, kinds_BN)[:, states, None]
        log_p = log_p[..., :-1]
        weight = torch.where(kind == UNFINISHED_GAPS, missing_BS[:, None].clamp_max(1), missing_BS[:, None])
        weight = weight * log_p.isfinite()
        soft = -(weight * log_p.nan_to_num(neginf=0.0)).sum(2) / weight.sum(2).clamp_min(1)
        return torch.where(kind.squeeze(2) == HARD, loss, soft)

    query_BND, keys_BSD = head.query_proj(hidden_BND), head.key_proj(slots_BSD)
    if head.config._attn_implementation == "insnext_triton":
        target_BN = torch.where(supervised_BN | stops_BN, target_BN, -1)
        return _streamed_loss(head, query_BND, keys_BSD, table, start_BN, target_BN, missing_BS, kinds_BN)
    slices = [slice(i, min(i + STATES_PER_CHUNK, N)) for i in range(0, N, STATES_PER_CHUNK)]
    chunks = [(query_BND[:, states], target_BN[:, states], states) for states in slices]
    loss_BN = torch.cat(_chunked(states_loss, chunks, keys_BSD), 1)
    return torch.where(supervised_BN | stops_BN, loss_BN, 0.0)


def _streamed_loss(head, query_BND, keys_BSD, table, start_BN, target_BN, missing_BS, kinds_BN):
    N = start_BN.shape[1]
    entry_BN = torch.arange(N, device=start_BN.device).expand_as(start_BN)
    # a slot into which nothing is written lives to the end of its text
    end_BN = torch.zeros_like(start_BN).scatter_reduce(1, start_BN, entry_BN + 1, "amax")
    end_BS = end_BN.gather(1, start_BN.gather(1, table.left_BS.clamp_min(0)))
    dies_BS = torch.where(table.left_BS >= 0, torch.minimum(table.dies_BS, end_BS), 0)
    return slot_cross_entropy(
        query_BND,
        keys_BSD,
        head.stop_key.to(query_BND.dtype),
        table.born_BS,
        dies_BS,
        target_BN,
        missing_BS,
        kinds_BN,
        cap=head.cap,
        scale=head.scaling,
        impl="triton",
    )


def token_loss(
    head: InsNextSlotHead,
    lm_head: nn.Module,
    never_inserted: list[int],
    hidden_BND: torch.Tensor,
    sides: tuple[torch.Tensor, torch.Tensor],
    table: SlotTable,
    input_ids_BN: torch.Tensor,
    supervised_BN: torch.Tensor,
) -> torch.Tensor:
    """Return -log p(token | slot) of what each supervised state writes, `[B, N]`, 0 elsewhere.

    Logits exist for at most `TOKENS_PER_CHUNK` states at a time.
    """
    b_M, state_M = supervised_BN.nonzero(as_tuple=True)
    if not len(b_M):
        return hidden_BND.new_zeros(hidden_BND.shape[:2])
    slot_M = table.slot_BN[b_M, state_M + 1]
    slot_MD = sides[0][b_M, table.left_BS[b_M, slot_M]] + sides[1][b_M, table.right_BS[b_M, slot_M]]
    states_MD = head.token_state(slot_MD, hidden_BND[b_M, state_M])
    target_M = input_ids_BN[b_M, state_M + 1]

    def tokens_loss(states, target):
        return nn.functional.cross_entropy(token_logits(states, lm_head, never_inserted), target, reduction="none")

    chunks = list(zip(states_MD.split(TOKENS_PER_CHUNK), target_M.split(TOKENS_PER_CHUNK), strict=True))
    loss_M = torch.cat(_chunked(tokens_loss, chunks))
    return loss_M.new_zeros(hidden_BND.shape[:2]).index_put((b_M, state_M), loss_M)


def insertion_losses(
    head: InsNextSlotHead,
    lm_head: nn.Module,
    never_inserted: list[int],
    hidden_BND: torch.Tensor,
    input_ids_BN: torch.Tensor,
    interval,
    supervision: Supervision,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return position and token loss of every state, `[B, N]` in nats, and which states write something supervised.

    Args:
        head: The model's slot head.
        lm_head: Maps token states to logits.
        never_inserted: Ids of probability 0.
        hidden_BND: Hidden states of the entries.
        input_ids_BN: The entries.
        interval: Who saw whom (`attention.Interval`).
        supervision: What is trained on.

    Raises:
        ValueError: If `target_kinds` come without `unit_starts`, or the label of a written token is structure or
            another token.
    """
    labels, stop_targets, kinds_BN, unit_starts, _ = supervision
    positions_BN, start_BN, horizon_BN, entries_BN = interval
    if kinds_BN is not None and unit_starts is None:
        raise ValueError("target_kinds need unit_starts, got None")
    table = slot_table(positions_BN, start_BN, horizon_BN)
    targets_BN = table.written_BN & (labels != -100)
    if not torch.compiler.is_compiling():
        _check_targets(targets_BN, input_ids_BN, labels, never_inserted)
    supervised_BN = _of_next(targets_BN, False)
    ends_BN = _text_ends(start_BN)
    # padding sees itself only, just as a text of one token would
    stops_BN = ends_BN & (start_BN != entries_BN) if stop_targets is None else ends_BN & stop_targets
    missing_BS = None
    if kinds_BN is not None:
        missing_BS = missing_units(table, positions_BN, start_BN, unit_starts)
        kinds_BN = _of_next(kinds_BN, HARD)
    sides = head.sequence_sides(hidden_BND)
    position_BN = position_loss(
        head, hidden_BND, sides, table, start_BN, supervised_BN, stops_BN, kinds_BN, missing_BS
    )
    token_BN = token_loss(head, lm_head, never_inserted, hidden_BND, sides, table, input_ids_BN, supervised_BN)
    return position_BN, token_BN, supervised_BN


def _check_targets(targets_BN, input_ids_BN, labels_BN, never_inserted) -> None:
    structure = torch.tensor(never_inserted, dtype=torch.long, device=input_ids_BN.device)
    for rule, wrong_BN in (
        ("labels must be input_ids, or -100", labels_BN != input_ids_BN),
        (f"ids {never_inserted} are structure and never written", torch.isin(input_ids_BN, structure)),
    ):
        if (targets_BN & wrong_BN).any():
            b, i = (targets_BN & wrong_BN).nonzero()[0].tolist()
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


def token_logits(states: torch.Tensor, lm_head: nn.Module, never_inserted: list[int]) -> torch.Tensor:
    """Return E . state in float32 or wider, `-inf` for ids that are structure and never inserted."""
    logits = lm_head(states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    structure_V = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    structure_V[never_inserted] = True
    return logits.masked_fill(structure_V, -torch.inf)


def _rows(values_BND: torch.Tensor, index_BS: torch.Tensor) -> torch.Tensor:
    return values_BND.gather(1, index_BS[..., None].expand(-1, -1, values_BND.shape[-1]))


def _of_next(values_BN: torch.Tensor, last) -> torch.Tensor:
    """Return for every state what `values` says of the entry it decides about, the next one; `last` for the last."""
    return torch.cat([values_BN[:, 1:], torch.full_like(values_BN[:, :1], last)], 1)
