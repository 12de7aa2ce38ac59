"""Tasks that measure: needles in long texts and star graphs. Needs numpy and torch only."""

from .haystacks import FILLER, read_haystack
from .needle_metrics import NeedleScore, NeedleTally, answer_score, generated_score, needle_scores, wilson_interval
from .needle_sets import NeedleDataset, read_needles, write_needles
from .needles import NEEDLE_KINDS, NeedleQuestion, NeedleSample, NeedleTask, draw_needles
from .word_needles import WORD_KINDS, WordNeedleTask


__all__ = [
    "FILLER",
    "NEEDLE_KINDS",
    "NeedleDataset",
    "NeedleQuestion",
    "NeedleSample",
    "NeedleScore",
    "NeedleTally",
    "NeedleTask",
    "WORD_KINDS",
    "WordNeedleTask",
    "answer_score",
    "draw_needles",
    "generated_score",
    "needle_scores",
    "read_haystack",
    "read_needles",
    "wilson_interval",
    "write_needles",
]
