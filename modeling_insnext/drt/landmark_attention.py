"""Landmark Attention, a baseline: every past block is read through the weight of its landmark.

Positions form blocks of P, the last of which is the landmark. A query sees, in one softmax, the keys of its own block
up to itself and the landmarks of earlier blocks; a landmark's share is handed down to the tokens of its block by a
softmax among these (the landmark itself keeps nothing). Blocks of three, `^` landmarks, query `d`, its share of `b`:

    key      a b ^ c d            p(^) exp(s_b) / (exp(s_a) + exp(s_b)),
    block    0 0 0 1 1            p(^) = exp(s_^) / (exp(s_^) + exp(s_c) + exp(s_d))

Scores include positions, as elsewhere in this folder. Dense: O(L K) memory. Source: Mohtashami and Jaggi,
arXiv:2305.16300, section 3.1.
"""

from typing import NamedTuple

import torch
from transformers.integrations.sdpa_attention import repeat_kv

from .attention import Window, WindowBackend, dense_bias


class Blocks(NamedTuple):
    """Additive mask `[1 or B, H, L, K]` and the blocks of queries and keys, by row."""

    bias: torch.Tensor
    query_block_BL: torch.Tensor
    key_block_BK: torch.Tensor
    is_landmark_BK: torch.Tensor


def landmark_blocks(window: Window, num_heads: int, like: torch.Tensor) -> Blocks:
    """Return what :func:`landmark_attention` reads; key j of row b has position first_b - M + j."""
    M, P = window.remembered, window.chunk_length
    place_K = torch.arange(M + window.width, device=like.device)
    position_BK = (torch.tensor(window.first, device=like.device)[:, None] - M + place_K).clamp_min(0)
    block_BK = position_BK // P
    return Blocks(dense_bias(window, num_heads, like), block_BK[:, M:], block_BK, position_BK % P == P - 1)


def grouped_softmax(scores_BHLK, own_BLK, is_landmark_BK, block_BK) -> torch.Tensor:
    """Return the share of every key, `[B, H, L, K]`; rows sum to 1.

    Args:
        scores_BHLK: Scores, `-inf` on keys that a query must not see.
        own_BLK: True where a key is of the query's own block.
        is_landmark_BK: True on landmarks.
        block_BK: Number of each key's block.
    """
    scores = scores_BHLK.to(torch.promote_types(scores_BHLK.dtype, torch.float32))
    own = own_BLK[:, None]
    landmark = is_landmark_BK[:, None, None] & ~own
    outer = scores.masked_fill(~(own | landmark), -torch.inf).softmax(-1)
    block = block_BK[:, None, None].expand_as(scores)
    blocks = (*scores.shape[:-1], int(block_BK.max()) + 1)
    inner = scores.masked_fill(own | landmark, -torch.inf)
    top = scores.new_full(blocks, -torch.inf).scatter_reduce(-1, block, inner.detach(), "amax")
    part = (inner - top.masked_fill(top.isneginf(), 0).gather(-1, block)).exp()
    total = scores.new_zeros(blocks).scatter_add(-1, block, part)
    handed = scores.new_zeros(blocks).scatter_add(-1, block, outer.masked_fill(~landmark, 0))
    share = part * (handed / total.masked_fill(total == 0, 1)).gather(-1, block)
    return torch.where(own, outer, share)


def landmark_attention(query_BHLD, key_BGKD, value_BGKD, blocks: Blocks, window: Window, scaling, dropout=0.0):
    """Return the values under :func:`grouped_softmax`, `[B, H, L, D]`."""
    groups = query_BHLD.shape[1] // key_BGKD.shape[1]
    key, value = repeat_kv(key_BGKD, groups), repeat_kv(value_BGKD, groups)
    scores = query_BHLD @ key.transpose(2, 3) * scaling + blocks.bias
    own_BLK = blocks.query_block_BL[..., None] == blocks.key_block_BK[:, None]
    shares = grouped_softmax(scores, own_BLK, blocks.is_landmark_BK, blocks.key_block_BK).to(value.dtype)
    return torch.nn.functional.dropout(shares, p=dropout) @ value


LANDMARK_BACKEND = WindowBackend(landmark_blocks, landmark_attention)
