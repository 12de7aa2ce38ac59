"""Retrieval of chunks and attention to them.

Shape suffixes: B rows, C chunks that ask, N chunks that can be found, K chunks a retrieval returns, S keys a chunk,
T = C M queries, M a chunk, H query heads, G key heads, D width (of a head in attention, of the model in retrieval).

Chunk t asks for chunks i < t by the score r_i = <q_t, l_i> / sqrt(D); the K best serve the tokens of chunk t + 1 with
weights w = softmax over the chosen of r. Training adds Gumbel noise to r for the choice alone, never for the weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Retrieved(NamedTuple):
    """Chunks found for C chunks of each row, by their numbers in the row; -1 where there are fewer than K."""

    chunks_BCK: torch.Tensor
    weights_BCK: torch.Tensor


class Served(NamedTuple):
    """What layers read that share a retrieval: keys and values of chunks, `[1 or B, G, N, S, D]`, and which of them.

    `phases[b]` is the place in its chunk of row b's slot 0; `None`: all slots are in one chunk.
    """

    key_BGNSD: torch.Tensor
    value_BGNSD: torch.Tensor
    weights_BCK: torch.Tensor
    indices_BCK: torch.Tensor
    phases: list[int] | None


def grouped_cross_attention(
    query_BHTD: torch.Tensor,
    key_BGNSD: torch.Tensor,
    value_BGNSD: torch.Tensor,
    indices_BCK: torch.Tensor,
    weights_BCK: torch.Tensor,
    *,
    off_by_one: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Return sum_i w_i softmax(scale q K_i^T) V_i, `[B, H, T, D]`: a softmax inside each chunk.

    `indices` name chunks in `[0, N)`, -1 none; a chunk serves the T / C queries of its place in C. `off_by_one` adds 1
    to every softmax's denominator. `scale` is 1 / sqrt(D) by default. Source: DRT, section 3.
    """
    query, key, value = _gather(query_BHTD, key_BGNSD, value_BGNSD, indices_BCK, scale)
    if off_by_one:
        # a key of zeros has score 0, one more in the denominator, and its value adds nothing
        key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    scores = (query @ key.flatten(3, 4).mT).unflatten(-1, key.shape[3:5])
    weights_BCK = weights_BCK.masked_fill(indices_BCK < 0, 0)
    shares = _softmax(scores) * weights_BCK[:, :, None, None, :, None]
    return _by_head(shares.to(value.dtype).flatten(-2) @ value.flatten(3, 4), query_BHTD)


def concatenated_cross_attention(
    query_BHTD, key_BGNSD, value_BGNSD, indices_BCK, weights_BCK, *, off_by_one=False, scale=None
) -> torch.Tensor:
    """Return softmax(scale q [K_1 ... K_K]^T) [V_1 ... V_K]: one softmax over all chunks, `weights` unused.

    Queries without any chunk get 0. Source: RETRO, arXiv:2112.04426, section 2.4.
    """
    query, key, value = _gather(query_BHTD, key_BGNSD, value_BGNSD, indices_BCK, scale)
    found = indices_BCK[:, :, None, None, :, None] >= 0
    some = found.any(-2, keepdim=True)
    scores = (query @ key.flatten(3, 4).mT).unflatten(-1, key.shape[3:5])
    # without any chunk nothing is hidden, for the softmax's sake, and nothing passes
    scores = scores.masked_fill(some & ~found, -torch.inf).flatten(-2)
    shares = _softmax(torch.nn.functional.pad(scores, (0, int(off_by_one))))[..., : scores.shape[-1]]
    shares = shares.masked_fill(~some[..., 0], 0)
    return _by_head(shares.to(value.dtype) @ value.flatten(3, 4), query_BHTD)


def _gather(query_BHTD, key_BGNSD, value_BGNSD, indices_BCK, scale):
    """Return scaled queries `[B, C, G, (H/G) M, D]` and the chosen chunks' keys and values `[B, C, G, K, S, D]`."""
    B, H, T, D = query_BHTD.shape
    G, C = key_BGNSD.shape[1], indices_BCK.shape[1]
    row_B = torch.arange(B, device=query_BHTD.device)
    if key_BGNSD.shape[0] == 1:
        row_B = torch.zeros_like(row_B)
    head_G1 = torch.arange(G, device=query_BHTD.device)[:, None]
    index = (row_B[:, None, None, None], head_G1, indices_BCK.clamp_min(0)[:, :, None])
    query = query_BHTD.reshape(B, G, H // G, C, T // C, D) * (D**-0.5 if scale is None else scale)
    return query.permute(0, 3, 1, 2, 4, 5).flatten(3, 4), key_BGNSD[index], value_BGNSD[index]


def _by_head(out_BCGMD: torch.Tensor, like_BHTD: torch.Tensor) -> torch.Tensor:
    """Undo the order of queries in :func:`_gather`."""
    B, H, T, D = like_BHTD.shape
    C, G = out_BCGMD.shape[1:3]
    return out_BCGMD.view(B, C, G, H // G, T // C, D).permute(0, 2, 3, 1, 4, 5).reshape(B, H, T, D)


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension in float32 or wider."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


FUSED = {"gca": grouped_cross_attention, "cca": concatenated_cross_attention}


def chance(asking_BC: torch.Tensor, found: torch.Tensor, group: int) -> torch.Tensor:
    """Return numbers in [0, 1) that look random but depend on chunk, candidate and group alone, `[B, C, N]`.

    The score of the random retriever: the same in whatever pieces a text is read.
    """
    mixed = asking_BC[..., None] * 2654435761 + found * 40503 + (group + 1) * 97
    for _ in range(3):
        mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) % (1 << 31)
    return mixed.double() / (1 << 31)


def best_chunks(
    score_block: Callable[[int, int], torch.Tensor],
    asking_BC: torch.Tensor,
    total: int,
    k: int,
    block: int = 4096,
) -> torch.Tensor:
    """Return the numbers of the k best chunks before each asking one, `[B, C, K]`, -1 where there are fewer.

    Args:
        score_block: Maps (start, stop) to the scores `[B, C, stop - start]` of these chunks.
        asking_BC: Number t of each asking chunk; chunks i < t are candidates.
        total: Number of chunks in memory.
        k: Chunks to find.
        block: Chunks scored at a time, so that memory is O(C block), whatever the length of the text.
    """
    B, C = asking_BC.shape
    device = asking_BC.device
    best = chunks = None
    for start in range(0, total, block):
        stop = min(start + block, total)
        number_N = torch.arange(start, stop, device=device)
        scores = score_block(start, stop).masked_fill(number_N >= asking_BC[..., None], -torch.inf)
        number = number_N.expand(B, C, -1)
        if best is not None:
            scores, number = torch.cat([best, scores], -1), torch.cat([chunks, number], -1)
        best, place = scores.topk(min(k, scores.shape[-1]), dim=-1)
        chunks = number.gather(-1, place)
    if best is None:
        return torch.full((B, C, k), -1, device=device)
    chunks = chunks.masked_fill(best.isneginf(), -1)
    return torch.nn.functional.pad(chunks, (0, k - chunks.shape[-1]), value=-1)


def wide_scores(queries_BCD: torch.Tensor, landmarks_BND: torch.Tensor) -> torch.Tensor:
    """Return <q, l>, `[B, C, N]`, in float32 or wider: rounded to bfloat16, many of thousands of scores are equal."""
    wide = torch.promote_types(queries_BCD.dtype, torch.float32)
    return queries_BCD.to(wide) @ landmarks_BND.to(wide).transpose(1, 2)


def gumbel_like(scores: torch.Tensor) -> torch.Tensor:
    """Return Gumbel(0, 1) noise, -log of Exp(1), drawn from PyTorch's generator."""
    return -torch.empty_like(scores).exponential_().log()


def chunk_weights(scores_BCK: torch.Tensor, chunks_BCK: torch.Tensor) -> torch.Tensor:
    """Return the softmax of the chosen chunks' scores in float32 or wider; 0 where there is none."""
    scores_BCK = scores_BCK.to(torch.promote_types(scores_BCK.dtype, torch.float32))
    scores_BCK = scores_BCK.masked_fill(chunks_BCK < 0, -torch.inf)
    some_BC1 = (chunks_BCK >= 0).any(-1, keepdim=True)
    return scores_BCK.masked_fill(~some_BC1, 0).softmax(-1).masked_fill(chunks_BCK < 0, 0)
