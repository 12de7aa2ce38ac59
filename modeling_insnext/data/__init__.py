"""Insertion orders, contexts, collators and needles. Needs numpy and torch only."""

from .collators import InsertionCollator, first_fit
from .contexts import ContextMixture
from .needle_metrics import NeedleScore, NeedleTally, answer_score, generated_score, needle_scores, wilson_interval
from .needle_sets import NeedleDataset, read_needles, write_needles
from .needles import NEEDLE_KINDS, NeedleQuestion, NeedleSample, NeedleTask, draw_needles
from .orders import EQUAL, HARD, ORDERS, PROPORTIONAL, Order, OrderMixture, gap_indices, get_mixture, get_order
from .units import UnitText, cut_text, rarity_table, sentence_end_table, word_start_table


__all__ = [
    "EQUAL",
    "HARD",
    "ORDERS",
    "NEEDLE_KINDS",
    "PROPORTIONAL",
    "ContextMixture",
    "InsertionCollator",
    "NeedleDataset",
    "NeedleQuestion",
    "NeedleSample",
    "NeedleScore",
    "NeedleTally",
    "NeedleTask",
    "Order",
    "OrderMixture",
    "UnitText",
    "answer_score",
    "cut_text",
    "draw_needles",
    "first_fit",
    "gap_indices",
    "generated_score",
    "get_mixture",
    "get_order",
    "needle_scores",
    "rarity_table",
    "read_needles",
    "sentence_end_table",
    "wilson_interval",
    "word_start_table",
    "write_needles",
]
