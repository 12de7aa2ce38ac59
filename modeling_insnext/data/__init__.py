"""Insertion orders, contexts and collators: what training reads. Needs numpy and torch only."""

from .collators import InsertionCollator, first_fit
from .contexts import ContextMixture
from .orders import ORDERS, Order, OrderMixture, TargetKind, gap_indices, get_mixture, get_order
from .units import UnitText, cut_text, rarity_table, sentence_end_table, word_start_table


__all__ = [
    "ORDERS",
    "ContextMixture",
    "InsertionCollator",
    "Order",
    "OrderMixture",
    "TargetKind",
    "UnitText",
    "cut_text",
    "first_fit",
    "gap_indices",
    "get_mixture",
    "get_order",
    "rarity_table",
    "sentence_end_table",
    "word_start_table",
]
