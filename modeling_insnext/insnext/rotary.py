"""Rotary positions on insertion offsets: score(i, j) = q_i . R(offset(i, j)) k_j / sqrt(D).

Shape suffixes as in attention, and P pairs of a query and an angle. R turns by the frequencies of
`config.rope_parameters`. From left to right offset(i, j) = j - i, and this is RoPE (arXiv:2104.09864) itself.

Let b_j be any number under which key j is turned once. Query i then meets it under e_ij = b_j - offset(i, j). With b_j
the rank of j in its text, e_ij falls short of it by the tokens that were missing left of j when i was encoded: it is
one number where nothing was missing, and changes along the text only at gaps. So a query is turned once for each value
it meets, all of them meet the keys in one matmul, and every key picks its own. Queries go block by block in the order
of writing, with ranks as the last one of a block leaves them, so that what is missing is what the block itself writes
later. `RotaryPairs` is the definition, which turns every key for every query.

    text            a  b  c  d  e          written in the order a, e, c, d, b
    b_j             0  1  2  3  4
    e_ij for i = c  0  .  1  .  2          b and d were missing: c meets a under 0, itself under 1, e under 2
"""

from typing import NamedTuple

import torch
from transformers.integrations.sdpa_attention import repeat_kv

from .attention import Interval, insertion_offsets, sdpa_attention, visible_keys
from .rope import Rope, turn


# fewer to a block, fewer angles; more, fewer matmuls
QUERIES_PER_BLOCK = 32
MOST_BLOCKS = 16


class RotaryPairs(NamedTuple):
    """The definition: every key is turned by its offset for every query.

    The factor on cosines and sines stands on both sides of a product, so here it is squared.

    Attributes:
        turns: Cosines and sines of the offsets, `[B, 1, Q, K, D]`.
        mask_B1QK: Additive, `-inf` on invisible keys.
    """

    turns: tuple[torch.Tensor, torch.Tensor]
    mask_B1QK: torch.Tensor

    def attend(self, module, query, key, value, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return attention as `[B, Q, H, D]` and its weights."""
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        scores = (query[:, :, :, None] * turn(key[:, :, None], *self.turns)).sum(-1)
        return _weighted(module, scores * module.scaling + self.mask_B1QK, value, dropout)


class RotarySegments(NamedTuple):
    """Keys turned once, queries once for each angle they meet.

    Attributes:
        key_turns: Cosines and sines of b_j, `[B, 1, K, D]`.
        query_turns: Of the angles that queries meet, `[B, 1, P, D]`; where each meets one only, P = Q and
            `owner_BP` and `pair_BQK` are `None`.
        owner_BP: The query of each pair.
        pair_BQK: The pair under which a query meets a key.
        mask_B1QK: Additive, `-inf` on invisible keys.
    """

    key_turns: tuple[torch.Tensor, torch.Tensor]
    query_turns: tuple[torch.Tensor, torch.Tensor]
    owner_BP: torch.Tensor | None
    pair_BQK: torch.Tensor | None
    mask_B1QK: torch.Tensor

    def attend(self, module, query, key, value, dropout: float) -> tuple[torch.Tensor, None]:
        """Return attention as `[B, Q, H, D]`."""
        key = turn(key, *self.key_turns)
        if self.pair_BQK is None:
            query = turn(query, *self.query_turns)
            return sdpa_attention(module, query, key, value, self.mask_B1QK, module.scaling, dropout)
        B, H, Q, D = query.shape
        P, (KV, K) = self.owner_BP.shape[1], key.shape[1:3]
        query = (query * module.scaling).gather(2, self.owner_BP[:, None, :, None].expand(B, H, P, D))
        # heads that share their keys are rows of one matmul
        query = turn(query, *self.query_turns).reshape(B, KV, -1, D)
        scores = (query @ key.transpose(2, 3)).view(B, H, P, K)
        scores = scores.gather(2, self.pair_BQK[:, None].expand(B, H, Q, K)) + self.mask_B1QK
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
        out = weights.view(B, KV, -1, K) @ value
        return out.view(B, H, Q, D).transpose(1, 2), None


class RotaryBlock(NamedTuple):
    """Queries that stand side by side in the order of writing, the keys that they see, and how they meet these."""

    queries: slice
    keys: slice
    segments: RotarySegments


class RotaryBlocks(NamedTuple):
    """Queries block by block: `RotarySegments` with ranks as the last query of a block leaves them."""

    blocks: list[RotaryBlock]

    def attend(self, module, query, key, value, dropout: float) -> tuple[torch.Tensor, None]:
        """Return attention as `[B, Q, H, D]`."""
        outs = [
            segments.attend(module, query[:, :, queries], key[:, :, keys], value[:, :, keys], dropout)[0]
            for queries, keys, segments in self.blocks
        ]
        return torch.cat(outs, 1), None


def _weighted(module, scores_BHQK, value_BHKD, dropout):
    wide = torch.promote_types(scores_BHQK.dtype, torch.float32)
    weights = scores_BHQK.softmax(-1, dtype=wide).to(value_BHKD.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value_BHKD).transpose(1, 2).contiguous(), weights


def rotary_pairs(interval: Interval, rope: Rope, dtype: torch.dtype) -> RotaryPairs:
    """Return what `eager` attends by."""
    cos, sin = rope.turns(insertion_offsets(interval)[:, None], dtype)
    return RotaryPairs((cos * rope.factor, sin * rope.factor), additive_mask(visible_keys(interval), dtype))


def rotary_segments(interval: Interval, rope: Rope, dtype: torch.dtype) -> RotarySegments | RotaryBlocks:
    """Return what `sdpa` attends by: blocks, unless each query meets one angle only."""
    everything = slice(0, interval.entries_BQ.shape[1]), slice(0, interval.positions_BK.shape[1])
    visible_BQK = visible_keys(interval)
    if interval.ranked:
        own_BQ = interval.positions_BK.gather(1, interval.entries_BQ)
        return _met(interval.positions_BK, own_BQ, None, visible_BQK, rope, dtype)
    order_BK, offsets_BQK = text_order(interval), insertion_offsets(interval)

    def read(queries: slice, keys: slice, pairs: bool) -> RotarySegments | None:
        base_BK = ranks_at(order_BK, interval.horizon_BQ[:, queries])
        own_BQ = base_BK.gather(1, interval.entries_BQ[:, queries])
        visible = visible_BQK[:, queries, keys]
        angle_BQK = base_BK[:, None, keys] - offsets_BQK[:, queries, keys]
        # a query meets itself under its own b, and so may whatever it does not see
        angle_BQK = torch.where(visible, angle_BQK, own_BQ[..., None])
        several = bool((angle_BQK != own_BQ[..., None]).any())
        if several and not pairs:
            return None
        return _met(base_BK[:, keys], own_BQ, angle_BQK if several else None, visible, rope, dtype)

    # while a graph is traced, whose size should not depend on who sees whom, all is one block
    whole = read(*everything, pairs=torch.compiler.is_compiling())
    if whole is not None:
        return whole
    return RotaryBlocks([RotaryBlock(*block, read(*block, pairs=True)) for block in blocks_of(interval)])


def _met(base_BK, own_BQ, angle_BQK, visible_BQK, rope: Rope, dtype) -> RotarySegments:
    owner_BP = pair_BQK = None
    if angle_BQK is not None:
        own_BQ, owner_BP, pair_BQK = segments(angle_BQK)
    key_turns, query_turns = rope.turns(base_BK[:, None], dtype), rope.turns(own_BQ[:, None], dtype)
    return RotarySegments(key_turns, query_turns, owner_BP, pair_BQK, additive_mask(visible_BQK, dtype))


def blocks_of(interval: Interval) -> list[tuple[slice, slice]]:
    """Return blocks of queries, and what keys those of all rows see; the device is asked once."""
    Q = interval.entries_BQ.shape[1]
    width = max(QUERIES_PER_BLOCK, -(-Q // MOST_BLOCKS))
    queries = [slice(first, min(first + width, Q)) for first in range(0, Q, width)]
    first = torch.stack([interval.start_BQ[:, block].min() for block in queries])
    last = torch.stack([interval.horizon_BQ[:, block].max() for block in queries])
    return [
        (block, slice(low, high + 1)) for block, low, high in zip(queries, first.tolist(), last.tolist(), strict=True)
    ]


def segments(angle_BQK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number the different angles of every query.

    Returns:
        The angle `[B, P]` and the query `[B, P]` of every pair, those of a query side by side, and the pair
        `[B, Q, K]` of every query and key. Rows with fewer pairs are filled up with pairs that nobody picks.
    """
    B, Q, K = angle_BQK.shape
    sorted_BQK, order_BQK = angle_BQK.sort(2)
    begins_BQK = torch.ones_like(sorted_BQK, dtype=torch.bool)
    begins_BQK[..., 1:] = sorted_BQK[..., 1:] != sorted_BQK[..., :-1]
    count_BQ = begins_BQK.sum(2)
    first_BQ = count_BQ.cumsum(1) - count_BQ
    number_BQK = begins_BQK.cumsum(2) - 1 + first_BQ[..., None]
    pair_BQK = torch.empty_like(number_BQK).scatter(2, order_BQK, number_BQK)
    num_pairs = int(count_BQ.sum(1).max())
    query_BQK = torch.arange(Q, device=angle_BQK.device)[:, None].expand(B, Q, K)
    empty_BP = angle_BQK.new_zeros(B, num_pairs)
    angle_BP, owner_BP = (
        empty_BP.scatter(1, number_BQK.flatten(1), values.flatten(1)) for values in (sorted_BQK, query_BQK)
    )
    return angle_BP, owner_BP, pair_BQK


def text_order(interval: Interval) -> torch.Tensor:
    """Return the keys of every row in the order of the text, one text behind the other, int64 `[B, K]`.

    Behind a cache a row holds one text.
    """
    positions_BK, start_BQ, *_ = interval
    by_position_BK = positions_BK.argsort(dim=1, stable=True)
    if start_BQ.shape != positions_BK.shape:
        return by_position_BK
    by_text_BK = start_BQ.gather(1, by_position_BK).argsort(dim=1, stable=True)
    return by_position_BK.gather(1, by_text_BK)


def ranks_at(order_BK: torch.Tensor, horizon_BQ: torch.Tensor) -> torch.Tensor:
    """Return how many keys stand left of each in `order_BK`, of those that any of the queries sees or could, `[B, K]`.

    In a text these are ranks as the last query leaves them, counted from any number on.
    """
    there_BK = (order_BK <= horizon_BQ.amax(1, keepdim=True)).long()
    return torch.empty_like(order_BK).scatter(1, order_BK, there_BK.cumsum(1) - there_BK)


def additive_mask(visible_BQK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `[B, 1, Q, K]`, `-inf` on invisible keys."""
    hidden_B1QK = ~visible_BQK[:, None]
    return torch.zeros_like(hidden_B1QK, dtype=dtype).masked_fill(hidden_B1QK, -torch.inf)


ROTARY_BACKENDS = {"eager": rotary_pairs, "sdpa": rotary_segments}

__all__ = ["ROTARY_BACKENDS", "RotaryBlocks", "RotaryPairs", "RotarySegments", "rotary_pairs", "rotary_segments"]
