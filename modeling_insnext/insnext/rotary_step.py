"""Rotary positions of a few tokens behind a cache: the turned keys are kept, and what has moved costs a query more.

Shape suffixes as in attention, and P numbers by which keys have moved. Notation: rotary.

A key is turned once, by the number b_j that it gets when it is turned, and kept beside the unturned one. It has moved
by m_j = r(j) - b_j since, where r(j) is its rank in the text as it is now, and a query of rank r_i that sees the whole
text meets it under e_ij = r_i - m_j. A token that is written gets b such that it has moved as far as the token left of
it. So m rises along the text, by steps at the places where something was written: P of them and one, however much was
written there. A query is turned P times; once P grows beyond `MOST_MOVES`, all keys are turned anew.
The cache holds half as much again.

    text            a  b  x  y  c  d       a b c d were turned as they stood, then x and y were written
    r               0  1  2  3  4  5
    b               0  1  2  3  2  3
    m               0  0  0  0  2  2       P = 2
"""

from typing import NamedTuple

import torch

from .attention import Interval, sdpa_attention, visible_keys
from .cache import InsertionCache, grown, selected
from .rope import Rope, turn
from .rotary import additive_mask


MOST_MOVES = 8
# blocks of more tokens are encodings of a text, which turn all keys
MOST_QUERIES = 8


class TurnedKeys:
    """The keys of a cache turned by `bases_BC`; as many columns are in use as the cache has entries."""

    def __init__(self, batch_size: int, device):
        self.bases_BC = torch.zeros(batch_size, 0, dtype=torch.long, device=device)
        self.layers: list[torch.Tensor] = []

    def make_room(self, keys: int) -> None:
        """Let the numbers reach to `keys` columns."""
        held = self.bases_BC.shape[1]
        if held < keys:
            # a few more than asked for, since the next step asks for one more
            self.bases_BC = torch.nn.functional.pad(self.bases_BC, (0, max(keys + 32, 2 * held) - held))

    def update(self, layer_idx: int, key_BHKD: torch.Tensor, step: "RotaryStep") -> torch.Tensor:
        """Turn the new keys of a layer, or all of them, and return all `[B, H, K, D]`."""
        B, H, K, D = key_BHKD.shape
        while len(self.layers) <= layer_idx:
            self.layers.append(key_BHKD.new_zeros(B, H, 0, D))
        held = self.layers[layer_idx]
        if held.shape[2] < K:
            held = self.layers[layer_idx] = grown(held, self.bases_BC.shape[1])
        if step.index_B1Q1 is None:
            held[:, :, :K] = turn(key_BHKD, *step.key_turns)
        else:
            index = step.index_B1Q1.expand(-1, H, -1, D)
            held.scatter_(2, index, turn(key_BHKD.gather(2, index), *step.key_turns))
        return held[:, :, :K]

    def select_rows(self, rows: torch.Tensor, used: int) -> None:
        """Keep the given rows, in that order, of columns the first `used`."""
        self.bases_BC = self.bases_BC[rows]
        self.layers = [selected(keys, rows, used) for keys in self.layers]


class RotaryStep(NamedTuple):
    """What the layers of one step attend by.

    Attributes:
        turned: The turned keys of the cache.
        key_turns: Cosines and sines by which new keys are turned, `[B, 1, Q, D]`, or all keys, `[B, 1, K, D]`.
        index_B1Q1: Which keys are new; None where all are turned.
        query_turns: Cosines and sines of the queries, `[B, 1, P, Q, D]`.
        number_B11K: Which of P each key has moved by, `[B, 1, 1, 1, K]`; None where P = 1.
        mask_B1QK: Additive, `-inf` on invisible keys; None where every query sees every key.
    """

    turned: TurnedKeys
    key_turns: tuple[torch.Tensor, torch.Tensor]
    index_B1Q1: torch.Tensor | None
    query_turns: tuple[torch.Tensor, torch.Tensor]
    number_B11K: torch.Tensor | None
    mask_B1QK: torch.Tensor | None

    def attend(self, module, query, key, value, dropout: float) -> tuple[torch.Tensor, None]:
        """Return attention as `[B, Q, H, D]`."""
        key = self.turned.update(module.layer_idx, key, self)
        B, H, Q, D = query.shape
        KV, K = key.shape[1:3]
        if self.number_B11K is None:
            query = turn(query, *(table.squeeze(2) for table in self.query_turns))
            return sdpa_attention(module, query, key, value, self.mask_B1QK, module.scaling, dropout)
        query = turn((query * module.scaling)[:, :, None], *self.query_turns)
        # heads that share their keys are rows of one matmul
        scores = (query.reshape(B, KV, -1, D) @ key.transpose(2, 3)).view(B, H, -1, Q, K)
        scores = scores.gather(2, self.number_B11K.expand(B, H, 1, Q, K)).squeeze(2)
        if self.mask_B1QK is not None:
            scores = scores + self.mask_B1QK
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=wide).to(value.dtype)
        weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
        out = weights.view(B, KV, -1, K) @ value
        return out.view(B, H, Q, D).transpose(1, 2), None


def is_step(interval: Interval, past) -> bool:
    """Whether `rotary_step` can prepare these tokens: few, and behind a cache that grows."""
    grows = isinstance(past, InsertionCache) and past.max_length is None and past.longest > 0
    few = interval.entries_BQ.shape[1] <= MOST_QUERIES
    return grows and few and interval.ranked and not torch.compiler.is_compiling()


def rotary_step(interval: Interval, rope: Rope, dtype: torch.dtype, past: InsertionCache) -> RotaryStep:
    """Return what `sdpa` attends by in a step of decoding; the device is asked once."""
    rank_BK, entries_BQ = interval.positions_BK, interval.entries_BQ
    visible_BQK = visible_keys(interval)
    rank_BQ = rank_BK.gather(1, entries_BQ)
    if past.turned is None:
        past.turned, moves = TurnedKeys(len(rank_BK), rank_BK.device), None
        past.turned.make_room(rank_BK.shape[1])
        most, seen = MOST_MOVES + 1, bool(visible_BQK.all())
    else:
        past.turned.make_room(rank_BK.shape[1])
        moves = _moves(rank_BK, rank_BQ, visible_BQK, past.turned, entries_BQ)
        most, seen = torch.stack([moves.most, visible_BQK.all()]).tolist()
    mask_B1QK = None if seen else additive_mask(visible_BQK, dtype)
    if most > MOST_MOVES:
        past.turned.bases_BC[:, : rank_BK.shape[1]] = rank_BK
        query_turns, key_turns = rope.turns(rank_BQ[:, None, None], dtype), rope.turns(rank_BK[:, None], dtype)
        return RotaryStep(past.turned, key_turns, None, query_turns, None, mask_B1QK)
    key_turns = rope.turns(past.turned.bases_BC.gather(1, entries_BQ)[:, None], dtype)
    moved_BP = rank_BK.new_zeros(len(rank_BK), most).scatter_(1, moves.number_BK, moves.moved_BK)
    query_turns = rope.turns((rank_BQ[:, None] - moved_BP[..., None])[:, None], dtype)
    number_B11K = moves.number_BK[:, None, None, None] if most > 1 else None
    return RotaryStep(past.turned, key_turns, entries_BQ[:, None, :, None], query_turns, number_B11K, mask_B1QK)


class Moves(NamedTuple):
    """How far keys have moved, the number of each such distance, and the most distances of a row.

    More than `MOST_MOVES` where a distance is none that writing makes.
    """

    moved_BK: torch.Tensor
    number_BK: torch.Tensor
    most: torch.Tensor


def _moves(rank_BK, rank_BQ, visible_BQK, turned: TurnedKeys, entries_BQ) -> Moves:
    """Give the new keys their numbers b, and return how far all keys have moved."""
    B, K = rank_BK.shape
    # what nobody sees has moved as far as the first key, by nothing
    old_BK = visible_BQK.any(1).scatter(1, entries_BQ, False)
    moved_BK = torch.where(old_BK, rank_BK - turned.bases_BC[:, :K], 0)
    left_BQK = rank_BK[:, None] < rank_BQ[..., None]
    moved_BQ = torch.where(left_BQK, moved_BK[:, None], 0).amax(2)
    turned.bases_BC.scatter_(1, entries_BQ, rank_BQ - moved_BQ)
    moved_BK.scatter_(1, entries_BQ, moved_BQ)
    within_BK = moved_BK.clamp(0, K)
    upto_BM = rank_BK.new_zeros(B, K + 1).scatter_(1, within_BK, 1).cumsum(1)
    most = torch.where((within_BK == moved_BK).all(), upto_BM[:, -1].amax(), MOST_MOVES + 1)
    return Moves(moved_BK, upto_BM.gather(1, within_BK) - 1, most)
