"""Slots: where the next token may go, and how every step of an insertion sequence is scored in one pass.

Shape suffixes: B rows, N tokens in insertion order, S = 2N slots, Q states, D hidden size, V vocabulary size.

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

Sources: InsNet (arXiv:2102.11008) section 3 for the slots; soft cap: InsNeXt; the algebra is ours (docs/design.md).
"""

from typing import NamedTuple

import torch
from torch import nn

from .neighbours import neighbours


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
    newest_left, newest_right, older_left, older_right = neighbours(positions_BN, start_BN, horizon_BN)

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


class RMSClip(nn.RMSNorm):
    """w x / max(1, rms(x)): what passed an RMSNorm without weights passes as it is, longer vectors are shortened.

    Two RMSNorms in a row are not one, since the epsilon of the first is lost in the second.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rms = wide.square().mean(-1, keepdim=True).sqrt()
        return (wide / rms.clamp_min(1)).to(x.dtype) * self.weight


class LearnedVectors(NamedTuple):
    """The vectors `[D]` of the right edge of a text, and the key of STOP."""

    edge: torch.Tensor
    stop_key: torch.Tensor


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
        norm = RMSClip if config.slot_norm == "rmsclip" else nn.RMSNorm
        self.norm = norm(D, eps=config.rms_norm_eps)
        self.edge = nn.Parameter(torch.zeros(D))
        self.stop_key = nn.Parameter(torch.zeros(D))
        self.cap = config.position_logit_cap
        self.scaling = D**-0.5

    def forward(self) -> LearnedVectors:
        """Return what the head has learned beside its projections.

        A module's own weights are there while it is called and at no other time, where they are offloaded.
        """
        return LearnedVectors(self.edge, self.stop_key)

    def sides(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W_l h and W_r h, the parts a token gives to the slot right and the slot left of it."""
        return self.left_proj(hidden), self.right_proj(hidden)

    def edge_side(self) -> torch.Tensor:
        """Return W_r e, `[D]`, the part that the right edge of the text gives to its slot."""
        # quantised layers take rows, no single vector
        return self.right_proj(self().edge[None])[0]

    def sequence_sides(self, hidden_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sides of a sequence; the right one has a last row N more, the edge of the text."""
        left_BND, right_BND = self.sides(hidden_BND)
        return left_BND, torch.cat([right_BND, self.edge_side().expand(len(hidden_BND), 1, -1)], 1)

    def slot(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return u = W_l h_left + W_r h_right, the vector of a slot, from the sides of the tokens around it."""
        return left + right

    def position_logits(self, query: torch.Tensor, slot_keys: torch.Tensor) -> torch.Tensor:
        """Return the capped logits `[..., Q, S]` of keys `[..., S, D]` for queries `[..., Q, D]`, float32 or wider."""
        return self.capped(query @ slot_keys.transpose(-1, -2))

    def capped(self, products: torch.Tensor) -> torch.Tensor:
        """Return the capped logits of products of queries and keys, float32 or wider."""
        scores = products.to(torch.promote_types(products.dtype, torch.float32))
        return self.cap * torch.tanh(scores * (self.scaling / self.cap))

    def stop_logit(self, query: torch.Tensor) -> torch.Tensor:
        """Return the capped logit of STOP, `[..., Q]`."""
        return self.position_logits(query, self().stop_key[None]).squeeze(-1)

    def choice_logits(self, query: torch.Tensor, slot_keys: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Return the logits of the slots and, last, of STOP, `[..., Q, S + 1]`; `-inf` where a slot is not allowed."""
        products = torch.cat([query @ slot_keys.transpose(-1, -2), query @ self().stop_key[:, None]], -1)
        stays = nn.functional.pad(allowed, (0, 1), value=True)
        return self.capped(products).masked_fill(~stays, -torch.inf)

    def log_p(self, query: torch.Tensor, slot_keys: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Return log p(slot or STOP), `[..., Q, S + 1]`, STOP last.

        Args:
            query: `query_proj` of the states, `[..., Q, D]`.
            slot_keys: `key_proj` of the slots, `[..., S, D]`.
            allowed: bool `[..., Q, S]`, which slots a state may choose from.
        """
        return self.choice_logits(query, slot_keys, allowed).log_softmax(-1)

    def at_the_right_edge(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what a text may do that grows at its right edge only, where a state is the left neighbour as well.

        Args:
            state: Hidden states of last tokens, `[..., D]`.

        Returns:
            The vectors `[..., D]` of the slots between them and the edge, log p(slot) and log p(STOP), both `[...]`.
        """
        slot = self.slot(self.left_proj(state), self.edge_side())
        query = self.query_proj(state)
        slot_logit = self.position_logits(query[..., None, :], self.key_proj(slot)[..., None, :])[..., 0, 0]
        stop_logit = self.stop_logit(query)
        log_sigmoid = nn.functional.logsigmoid
        return slot, log_sigmoid(slot_logit - stop_logit), log_sigmoid(stop_logit - slot_logit)

    def token_state(self, slot: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return norm(u + W_g h), to be multiplied with the embedding; norm: `config.slot_norm`."""
        return self.norm(slot + self.state_proj(state))
