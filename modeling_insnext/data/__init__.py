"""What training reads: insertion orders, contexts, collators, keywords. Needs numpy and torch only."""

from .collators import InsertionCollator, first_fit
from .contexts import ContextMixture
from .keywords import inflections, keyword_spans
from .orders import ORDERS, Order, OrderMixture, TargetKind, gap_indices, get_mixture, get_order
from .passes import Passes, Shuffled
from .programs import insertion_steps
from .sentences import split_sentences
from .text_file import load_texts, save_texts
from .units import UnitText, cut_text, piece_table, rarity_table, sentence_end_table, word_start_table


__all__ = [
    "ORDERS",
    "ContextMixture",
    "InsertionCollator",
    "Order",
    "OrderMixture",
    "Passes",
    "Shuffled",
    "TargetKind",
    "UnitText",
    "cut_text",
    "first_fit",
    "gap_indices",
    "get_mixture",
    "get_order",
    "inflections",
    "keyword_spans",
    "insertion_steps",
    "load_texts",
    "piece_table",
    "rarity_table",
    "save_texts",
    "sentence_end_table",
    "split_sentences",
    "word_start_table",
]
