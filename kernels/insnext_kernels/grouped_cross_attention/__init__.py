"""Grouped cross-attention: every chunk of queries reads whole chunks of memory, named by index. Needs torch only."""

from .api import grouped_cross_attention
from .reference import grouped_cross_attention_reference


__all__ = ["grouped_cross_attention", "grouped_cross_attention_reference"]
