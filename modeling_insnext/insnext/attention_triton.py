"""`attn_implementation="insnext_triton"`: insertion attention by the Triton kernels of the package `insnext_kernels`.

That package is optional. Checkpoints load without it; who chooses this implementation then gets an `ImportError`.
"""

from typing import NamedTuple

import torch
from transformers.utils import output_capturing


# inside `try`, Transformers does not count an import among those that remote code needs
try:
    from insnext_kernels.insertion_attention import insertion_attention, offset_table
except ImportError:
    insertion_attention = offset_table = None

NAME = "insnext_triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TritonInterval(NamedTuple):
    """What every layer of one forward pass hands to `insertion_attention`; see there.

    Attributes:
        intervals: Positions, horizon, slopes to the left and to the right, start.
        entries_BQ: Which key each query is.
        table: The offset table of the batch.
    """

    intervals: tuple[torch.Tensor, ...]
    entries_BQ: torch.Tensor
    table: NamedTuple


def prepare_triton(interval, slopes_2H: torch.Tensor, dtype: torch.dtype) -> TritonInterval:
    """Return intervals, slopes and the offset table, which all layers and heads share.

    Raises:
        ImportError: If `insnext_kernels` is not installed.
        ValueError: If the kernels do not know the dtype, or cannot run where the tensors are.
    """
    if insertion_attention is None:
        raise ImportError(
            f'attn_implementation="{NAME}" needs the package insnext_kernels, which is not installed; use eager, sdpa '
            "or flex_attention"
        )
    if interval.causal_blocks:
        raise ValueError(
            f'block_attention="causal" is not for attn_implementation="{NAME}"; use eager, sdpa or flex_attention'
        )
    if dtype not in DTYPES:
        raise ValueError(f'attn_implementation="{NAME}" needs float32, float16 or bfloat16, got {dtype}')
    positions_BK, start_BQ, horizon_BQ, entries_BQ, *_ = interval
    left_H, right_H = slopes_2H.float()
    table = offset_table(positions_BK, horizon_BQ, start_BQ, entries_BQ=entries_BQ, impl="triton")
    return TritonInterval((positions_BK, horizon_BQ, left_H, right_H, start_BQ), entries_BQ, table)


def triton_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: TritonInterval,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Return attention as `[B, Q, H, D]`, and no weights: these never exist.

    Raises:
        ValueError: If dropout or the weights are asked for, or the head dim is too large.
    """
    if dropout:
        raise ValueError(f"{NAME} has no dropout, got attention_dropout={dropout}; use eager or sdpa")
    if _weights_are_wanted():
        raise ValueError(f"{NAME} has no attention weights to return, got output_attentions=True; use eager")
    out_BHQD = insertion_attention(
        query,
        key,
        value,
        *attention_mask.intervals,
        entries_BQ=attention_mask.entries_BQ,
        scale=scaling,
        table=attention_mask.table,
        impl="triton",
    )
    # a view: the kernels lay heads out behind queries
    return out_BHQD.transpose(1, 2), None


def _weights_are_wanted() -> bool:
    """Return whether Transformers, which does not say so, waits for the weights of this forward pass."""
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is not None and "attentions" in (collector.get() or {})


__all__ = ["TritonInterval", "prepare_triton", "triton_attention"]
