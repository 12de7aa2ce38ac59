"""`attn_implementation="insnext_triton"`: window and grouped cross-attention by the package `insnext_kernels`.

Optional: without that package everything else works. Nothing of size L x L or L x k S is ever made.
"""

from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from .attention import WINDOW_BACKENDS, Window, WindowBackend, window_slopes


# inside `try`, Transformers does not count an import among those that remote code needs
try:
    from insnext_kernels import grouped_cross_attention, insertion_attention
    from insnext_kernels.insertion_attention import offset_table
except ImportError:
    grouped_cross_attention = insertion_attention = offset_table = None

NAME = "insnext_triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Intervals(NamedTuple):
    """What every layer of a forward pass hands to `insertion_attention`; see there."""

    start_BL: torch.Tensor
    entries_BL: torch.Tensor
    left_H: torch.Tensor
    right_H: torch.Tensor
    table: NamedTuple


def window_intervals(window: Window, num_heads: int, like: torch.Tensor) -> Intervals:
    """Return the window as intervals of keys: from start to the query's own entry.

    Raises:
        ImportError: If `insnext_kernels` is not installed.
        ValueError: If the kernels do not know the dtype or cannot run where the tensors are, or there are sinks.
    """
    if insertion_attention is None:
        raise ImportError(
            f'attn_implementation="{NAME}" needs the package insnext_kernels, which is not installed; use eager, sdpa '
            "or flex_attention"
        )
    if like.dtype not in DTYPES:
        raise ValueError(f'attn_implementation="{NAME}" needs float32, float16 or bfloat16, got {like.dtype}')
    if window.sinks:
        raise ValueError(f'attn_implementation="{NAME}" has no attention sinks, got {window.sinks}; use eager or sdpa')
    M, B = window.remembered, like.shape[0]
    entries_BL = (torch.arange(window.width, device=like.device) + M).repeat(B, 1)
    start_BL = torch.tensor([M - held for held in window.memory], device=like.device)[:, None].expand(B, window.width)
    if window.size is not None:
        start_BL = torch.maximum(start_BL, entries_BL - window.size + 1)
    slopes_H = window_slopes(window, num_heads, like.device).float()
    table = offset_table(None, entries_BL, start_BL, entries_BQ=entries_BL, num_keys=M + window.width, impl="triton")
    return Intervals(start_BL, entries_BL, slopes_H, torch.zeros_like(slopes_H), table)


def triton_attention(query_BHLD, key_BGKD, value_BGKD, intervals: Intervals, window: Window, scaling, dropout=0.0):
    """Window attention in Triton; arguments as :func:`attention.eager_attention`.

    Raises:
        ValueError: If dropout is asked for, or the head dim is too large.
    """
    if dropout:
        raise ValueError(f"{NAME} has no dropout, got attention_dropout={dropout}; use eager or sdpa")
    start_BL, entries_BL, left_H, right_H, table = intervals
    return insertion_attention(
        query_BHLD,
        key_BGKD,
        value_BGKD,
        None,
        entries_BL,
        left_H,
        right_H,
        start_BL,
        entries_BQ=entries_BL,
        scale=scaling,
        table=table,
        impl="triton",
    )


def triton_grouped(query_BHTD, key_BGNSD, value_BGNSD, indices_BCK, weights_BCK, *, off_by_one=False, scale=None):
    """Grouped cross-attention in Triton; arguments as :func:`retrieval.grouped_cross_attention`."""
    B = len(query_BHTD)
    return grouped_cross_attention(
        query_BHTD,
        key_BGNSD.expand(B, -1, -1, -1, -1),
        value_BGNSD.expand(B, -1, -1, -1, -1),
        indices_BCK,
        weights_BCK,
        off_by_one=off_by_one,
        scale=scale,
        impl="triton",
    )


BACKENDS = {**WINDOW_BACKENDS, NAME: WindowBackend(window_intervals, triton_attention, triton_grouped)}


def refuse_other_models(module: torch.nn.Module, *args, **kwargs):
    """What Transformers holds under the name: models that know it compute it themselves, each in its own way.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"this attn_implementation is for the models that define it, got a {type(module).__name__}; use eager, sdpa "
        "or flex_attention"
    )


# Transformers refuses names it does not know before a model can say anything
AttentionInterface.register(NAME, refuse_other_models)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["eager"])
