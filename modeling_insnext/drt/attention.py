"""Sliding-window attention, with ALiBi or without, and the backends that compute it.

Shape suffixes: B rows, H query heads, G key heads, L new slots, K = M + L keys (M remembered, then the new ones), D
head width. Window w counts the token itself: query i (key number M + i) sees the keys j with

    0 <= M + i - j < w,

of these only the last `memory_B[b]` + L (what a row remembers ends at its first new slot). With ALiBi
(arXiv:2108.12409) head h adds -2^(-8(h+1)/H) * (M + i - j) to its scores; with other position encodings all slopes are
0. Four new slots behind two remembered ones, w = 3:

    key      0 1 2 3 4 5
    query 0  x x x . . .
    query 1  . x x x . .
    query 2  . . x x x .
    query 3  . . . x x x
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as uncompiled_flex_attention
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.integrations.sdpa_attention import repeat_kv


class Window(NamedTuple):
    """What every layer of one forward pass needs to know about who sees whom, and from where.

    `memory` is the number of remembered keys of each row, out of `remembered` key places; `first` the position of each
    row's first new slot; both have one number if all rows stand alike and no cache asks for each. A window over
    everything has `size` = None. `rotary` are the cosines and sines that turn queries and new keys, `None` without
    rotary positions. In front of all keys stand those of the first `sinks` positions of the text.
    """

    size: int | None
    width: int
    remembered: int
    memory: list[int]
    chunk_length: int
    first: list[int]
    alibi: bool = True
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    sinks: int = 0


def alibi_slopes(num_heads: int, device=None) -> torch.Tensor:
    """Return 2^(-8(h+1)/H), float64 `[H]`, for any H (as DRT's code, unlike ALiBi's, whose H is a power of two)."""
    return torch.pow(2.0, -8.0 * torch.arange(1, num_heads + 1, device=device).double() / num_heads)


def window_slopes(window: Window, num_heads: int, device=None) -> torch.Tensor:
    """Return the slopes of a window's scores, float64 `[H]`: zeros unless its positions are ALiBi."""
    slopes_H = alibi_slopes(num_heads, device)
    return slopes_H if window.alibi else torch.zeros_like(slopes_H)


def _bias(distance: torch.Tensor, size: int | None, slopes_H: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return -slope * distance `[H, ...]`, `-inf` where the window does not reach."""
    slopes = slopes_H.to(torch.promote_types(dtype, torch.float32)).view(-1, *[1] * distance.ndim)
    hidden = (distance < 0) if size is None else (distance < 0) | (distance >= size)
    return (-slopes * distance).masked_fill(hidden, -torch.inf).to(dtype)


def _forgotten(window: Window, keys: int, device) -> torch.Tensor | None:
    """Return a boolean `[B, 1, 1, keys]`, True on leading key places that hold nothing; `None` if all hold a key."""
    missing = [window.remembered - n for n in window.memory]
    if not any(missing):
        return None
    first_B1 = torch.tensor(missing, device=device)[:, None]
    return (torch.arange(keys, device=device) < first_B1)[:, None, None]


def sees_sinks(window: Window, device) -> torch.Tensor:
    """Return which slot sees which sink, boolean `[1 or B, 1, L, sinks]`: those that left its window."""
    first_B1 = torch.tensor(window.first, device=device)[:, None]
    last_BL = first_B1 + torch.arange(window.width, device=device) - window.size
    return (torch.arange(window.sinks, device=device) <= last_BL[..., None])[:, None]


def _with_sinks(bias: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """Put the masks of sinks, which have no bias, in front of those of the window."""
    rows, heads = max(len(bias), len(sees)), bias.shape[1]
    sinks = torch.zeros_like(sees, dtype=bias.dtype).masked_fill(~sees, -torch.inf)
    return torch.cat([sinks.expand(rows, heads, -1, -1), bias.expand(rows, -1, -1, -1)], -1)


def dense_bias(window: Window, num_heads: int, like: torch.Tensor) -> torch.Tensor:
    """Return the additive mask `[1 or B, H, L, sinks + K]`: the definition."""
    K = window.remembered + window.width
    query_L1 = torch.arange(window.remembered, K, device=like.device)[:, None]
    slopes_H = window_slopes(window, num_heads, like.device)
    bias = _bias(query_L1 - torch.arange(K, device=like.device), window.size, slopes_H, like.dtype)[None]
    forgotten = _forgotten(window, K, like.device)
    bias = bias if forgotten is None else bias.masked_fill(forgotten, -torch.inf)
    return _with_sinks(bias, sees_sinks(window, like.device)) if window.sinks else bias


def eager_attention(
    query_BHLD: torch.Tensor,
    key_BGKD: torch.Tensor,
    value_BGKD: torch.Tensor,
    bias: torch.Tensor,
    window: Window,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return softmax(scaling * q k^T + bias) v, `[B, H, L, D]`."""
    groups = query_BHLD.shape[1] // key_BGKD.shape[1]
    key, value = repeat_kv(key_BGKD, groups), repeat_kv(value_BGKD, groups)
    scores = query_BHLD @ key.transpose(2, 3) * scaling + bias
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query_BHLD.dtype)
    return torch.nn.functional.dropout(weights, p=dropout) @ value


class BandBias(NamedTuple):
    """Masks of the first blocks of a band, each by row, and of every further one. `block` None: one dense mask."""

    first: list[torch.Tensor]
    further: torch.Tensor | None
    block: int | None


def band_bias(window: Window, num_heads: int, like: torch.Tensor) -> BandBias:
    """Return what `sdpa` reads: a dense mask for short inputs, else masks of blocks of w queries over 2 w keys."""
    size = window.size
    if size is None or window.width <= size:
        return BandBias([dense_bias(window, num_heads, like)], None, None)
    query_W1 = torch.arange(size, 2 * size, device=like.device)[:, None]
    slopes_H = window_slopes(window, num_heads, like.device)
    band = _bias(query_W1 - torch.arange(2 * size, device=like.device), size, slopes_H, like.dtype)[None]
    # the band starts `size` keys before the first query: places there are padding, or hold what rows remember
    padded = window._replace(remembered=size, memory=[min(n, size) for n in window.memory])
    forgotten = _forgotten(padded, 2 * size, like.device)
    first = band if forgotten is None else band.masked_fill(forgotten, -torch.inf)
    if not window.sinks:
        return BandBias([first], band, size)
    # sinks leave the window in the second block at the latest, as there are no more than it is wide
    sees = sees_sinks(window._replace(width=2 * size), like.device)
    everything = torch.ones_like(sees[:1, :, :size])
    blocks = [_with_sinks(first, sees[:, :, :size]), _with_sinks(band, sees[:, :, size:])]
    return BandBias(blocks, _with_sinks(band, everything), size)


def sdpa_attention(query_BHLD, key_BGKD, value_BGKD, bias: BandBias, window: Window, scaling, dropout=0.0):
    """Scaled-dot-product attention; long inputs in blocks, O(L w) time and memory. Arguments as `eager_attention`."""
    attend = partial(
        torch.nn.functional.scaled_dot_product_attention,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query_BHLD.shape[1] != key_BGKD.shape[1],
    )
    if bias.block is None:
        return attend(query_BHLD, key_BGKD, value_BGKD, attn_mask=bias.first[0])
    B, H, L, D = query_BHLD.shape
    W = bias.block
    blocks = -(-L // W)

    def cut(x: torch.Tensor, left: int) -> torch.Tensor:
        return _pad_slots(x, left, blocks * W - L).unflatten(2, (-1, W)).transpose(1, 2)

    def reach(x: torch.Tensor) -> torch.Tensor:
        halves = cut(x[:, :, window.sinks :], W - window.remembered)
        sinks = x[:, None, :, : window.sinks].expand(-1, blocks, -1, -1, -1)
        return torch.cat([sinks, halves[:, :-1], halves[:, 1:]], dim=3)

    query_BNHWD, key_BNGKD, value_BNGKD = cut(query_BHLD, 0), reach(key_BGKD), reach(value_BGKD)
    parts = [
        attend(query_BNHWD[:, n], key_BNGKD[:, n], value_BNGKD[:, n], attn_mask=mask)[:, None]
        for n, mask in enumerate(bias.first)
    ]
    done = len(parts)
    if blocks > done:
        query, key, value = (x[:, done:].flatten(0, 1) for x in (query_BNHWD, key_BNGKD, value_BNGKD))
        parts.append(attend(query, key, value, attn_mask=bias.further).unflatten(0, (B, blocks - done)))
    return torch.cat(parts, dim=1).transpose(1, 2).flatten(2, 3)[:, :, :L]


def _pad_slots(x: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """Pad `[B, H, L, D]` along L; a negative number drops slots."""
    return torch.nn.functional.pad(x, (0, 0, left, right))


def flex_mask(window: Window, num_heads: int, like: torch.Tensor):
    """Return slopes `[H]` and the block mask that `flex_attention` reads."""
    K, M, size = window.remembered + window.width, window.remembered, window.size
    B = like.shape[0]
    missing_B = torch.tensor([M - n for n in window.memory], device=like.device).expand(B)

    first_B = torch.tensor(window.first, device=like.device).expand(B)
    sinks = window.sinks

    def sees(b, h, q, k):
        distance = q + M - (k - sinks)
        near = distance >= 0 if size is None else (distance >= 0) & (distance < size)
        near = near & (k - sinks >= missing_B[b])
        return torch.where(k < sinks, k <= first_B[b] + q - size, near) if sinks else near

    slopes_H = window_slopes(window, num_heads, like.device).to(torch.promote_types(like.dtype, torch.float32))
    mask = create_block_mask(sees, B, None, window.width, sinks + K, device=like.device)
    return slopes_H, mask


def flex_attention(query_BHLD, key_BGKD, value_BGKD, prepared, window: Window, scaling, dropout=0.0):
    """FlexAttention; uncompiled on CPUs, where PyTorch (as of 2.13) has no backward of it."""
    if dropout:
        raise ValueError(f"flex_attention has no dropout, got attention_dropout={dropout}; use eager or sdpa")
    slopes_H, block_mask = prepared
    remembered = window.remembered

    def add_bias(score, b, h, q, k):
        return score - slopes_H[h] * (q + remembered - k)

    on_cpu = query_BHLD.device.type == "cpu"
    attend = (
        uncompiled_flex_attention
        if on_cpu
        else partial(compile_friendly_flex_attention, training=query_BHLD.requires_grad)
    )
    return attend(
        query_BHLD,
        key_BGKD,
        value_BGKD,
        score_mod=add_bias,
        block_mask=block_mask,
        enable_gqa=query_BHLD.shape[1] != key_BGKD.shape[1],
        scale=scaling,
    )


class WindowBackend(NamedTuple):
    """How an attention implementation reads a :class:`Window`.

    `prepare(window, num_heads, like)` runs once a forward pass; its result reaches `attend` of every layer. `grouped`
    computes grouped cross-attention (:func:`retrieval.grouped_cross_attention` by default).
    """

    prepare: Callable
    attend: Callable
    grouped: Callable | None = None


WINDOW_BACKENDS = {
    "eager": WindowBackend(dense_bias, eager_attention),
    "sdpa": WindowBackend(band_bias, sdpa_attention),
    "flex_attention": WindowBackend(flex_mask, flex_attention),
}
