"""Exact infill: which share of the gaps of a text was filled with the very words that stood there."""

import re
import unicodedata
from itertools import pairwise
from operator import eq

import datasets
import evaluate


DESCRIPTION = """
A template is a text with marks `___` (also `___{2,5}`) in the places of what was left out. With f_ig the words and
punctuation in gap g of prediction i and r_ig those in the reference,

    exact_gap  = |{(i, g) : f_ig = r_ig}| / number of gaps
    exact_text = |{i : prediction i = reference i}| / number of texts
    kept       = |{i : prediction i still holds the template's given text}| / number of texts

All are in [0, 1]. Letters are compared with their case, in Unicode's composed form; white space counts only between
two words, so "sea ." is "sea.". Where a text can be read in more than one way ("the ___ the ___" in "the the the"), a
gap is as short as it can be, the leftmost first, in predictions and references alike. Every gap of a prediction that
lost the given text is wrong. A gap may be empty, and lie in a word ("un___able").
"""

INPUTS = """
Args:
    predictions: Texts with their gaps filled, `list[str]`.
    references: The texts as they were, `list[str]`.
    templates: The texts with marks, `list[str]`, each with at least one.
    ignore_case: Whether letters are compared without case. Default: False.

Returns:
    exact_gap, exact_text, kept.

Raises:
    ValueError: If a template has no mark, or a reference does not fit its template.
"""

MARK = re.compile(r"_{3,}(?:\{\d+(?:,\d*)?\})?")


def pieces(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def given_pattern(part: str) -> str:
    """Return the pattern of given text, which holds whole words where white space parts them from a mark."""
    given = pieces(part)
    if not given:
        return ""
    first = r"(?<!\w)" if part[0].isspace() and is_word(given[0]) else ""
    last = r"(?!\w)" if part[-1].isspace() and is_word(given[-1]) else ""
    spaces = [r"\s+" if is_word(left) and is_word(right) else r"\s*" for left, right in pairwise(given)]
    body = "".join(space + re.escape(piece) for space, piece in zip(["", *spaces], given, strict=True))
    return first + body + last


def is_word(piece: str) -> bool:
    return re.match(r"\w", piece) is not None


def gaps(template: str, text: str) -> list[list[str]] | None:
    """Return the pieces in each gap, or `None` if the given text is not there."""
    given = map(given_pattern, MARK.split(template))
    found = re.fullmatch(r"\s*" + r"\s*(.*?)\s*".join(given) + r"\s*", text, re.DOTALL)
    return found and [pieces(fill) for fill in found.groups()]


class ExactInfill(evaluate.Metric):
    def _info(self):
        names = ("predictions", "references", "templates")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({name: datasets.Value("string") for name in names}),
        )

    def _compute(self, predictions, references, templates, ignore_case=False):
        exact, number, texts, kept = 0, 0, 0, 0
        for text, truth, template in zip(predictions, references, templates, strict=True):
            if not MARK.search(template):
                raise ValueError(f"a template needs a mark ___, got {template!r}")
            text, truth, template = (unicodedata.normalize("NFC", one) for one in (text, truth, template))
            if ignore_case:
                text, truth, template = text.lower(), truth.lower(), template.lower()
            right = gaps(template, truth)
            if right is None:
                raise ValueError(f"a reference must fit its template, got {truth!r} and {template!r}")
            filled = gaps(template, text)
            exact += sum(map(eq, filled or (), right))
            number += len(right)
            texts += pieces(text) == pieces(truth)
            kept += filled is not None
        if not number:
            raise ValueError("there must be at least one text, got none")
        return {
            "exact_gap": exact / number,
            "exact_text": texts / len(predictions),
            "kept": kept / len(predictions),
        }
