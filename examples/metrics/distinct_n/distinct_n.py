"""Distinct-n: how many different n-grams there are among all n-grams of the texts."""

import re

import datasets
import evaluate


DESCRIPTION = """
Diversity of texts (Li et al., arXiv:1510.03055):

    distinct_n = number of different n-grams / number of n-grams        (no unit, in (0, 1])

counted over all texts together (`level="corpus"`), or in every text and averaged over the texts that have an n-gram
(`level="text"`). Tokens are runs of letters, digits and underscores, and single other characters but white space; an
n-gram lies within one text. The more text, the lower the value: compare sets of the same size only.
"""

INPUTS = """
Args:
    predictions: Texts, `list[str]`.
    n: Orders of the n-grams, an integer or several. Default: (1, 2).
    level: `"corpus"` (default) or `"text"`.
    lowercase: Whether letters are compared without case. Default: True.

Returns:
    distinct_<n>: One number for each order. Texts shorter than n tokens have no n-gram and do not count.

Raises:
    ValueError: If an order is no integer of at least 1, no text has an n-gram of that order, or the level does not
        exist.
"""

TOKEN = re.compile(r"\w+|[^\w\s]")
LEVELS = ("corpus", "text")


class DistinctN(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, n=(1, 2), level="corpus", lowercase=True):
        if level not in LEVELS:
            raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
        texts = [TOKEN.findall(text.lower() if lowercase else text) for text in predictions]
        orders = list(n) if hasattr(n, "__iter__") else [n]
        return {f"distinct_{order}": distinct(texts, order, level) for order in orders}


def distinct(texts: list[list[str]], order: int, level: str) -> float:
    """Return the share of different n-grams of one order."""
    if type(order) is not int or order < 1:
        raise ValueError(f"n must be an integer of at least 1, or several, got {order!r}")
    grams = [list(zip(*(tokens[i:] for i in range(order)), strict=False)) for tokens in texts]
    if level == "corpus":
        grams = [[gram for row in grams for gram in row]]
    shares = [len(set(row)) / len(row) for row in grams if row]
    if not shares:
        raise ValueError(f"a text must have at least n={order} tokens, got at most {max(map(len, texts), default=0)}")
    return sum(shares) / len(shares)
