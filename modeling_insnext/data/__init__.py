"""Insertion orders, contexts and collators: what training reads. Needs numpy and torch only."""

from .collators import InsertionCollator, first_fit
from .contexts import ContextMixture
from .orders import EQUAL, HARD, ORDERS, PROPORTIONAL, Order, OrderMixture, gap_indices, get_mixture, get_order
from .units import UnitText, cut_text, rarity_table, sentence_end_table, word_start_table


__all__ = [
    "EQUAL",
    "HARD",
    "ORDERS",
    "PROPORTIONAL",
    "ContextMixture",
    "InsertionCollator",
    "Order",
    "OrderMixture",
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
