"""Triton kernels of insertion and retrieval language models, on plain tensors; importing needs torch only.

    insertion_attention       attention over intervals, biased by the distance in the text; no (n, n) tensor
    slot_cross_entropy        loss of where the next token goes, over the slots that are alive; no (n, 2n) tensor
    grouped_cross_attention   attention to retrieved chunks, read in place through their indices

Every operator takes `impl="auto" | "reference" | "triton"`.
"""

from .grouped_cross_attention import grouped_cross_attention
from .insertion_attention import insertion_attention, offset_table
from .slot_cross_entropy import slot_cross_entropy


__all__ = ["grouped_cross_attention", "insertion_attention", "offset_table", "slot_cross_entropy"]
