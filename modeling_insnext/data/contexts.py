"""Contexts: which units of a text are given, and which written tokens are encoded together again.

A text in insertion order, c given tokens, s1 + s2 of the written ones re-encoded (x: in one block):

    tokens     given ...  first s1 written | next s2 written | rest
    reencode   x x x x x  x x x x            .   .   .         .  .
    windowed   x x x x x  x x x x            x   x   x         .  .     two blocks
    labels     no         no                 no               yes      (yes from the first "." on)
"""

from dataclasses import dataclass, fields

import numpy as np

from .orders import keyword_units
from .units import UnitText


MAX_SPANS = 3


@dataclass(frozen=True)
class ContextMixture:
    """How the context of a text is drawn. BOS and what the text itself marks as given are always in it.

    With M units missing, one of these is drawn; the rest of the probability adds nothing to the context. Something
    to write always remains.

    Args:
        words: Probability of k units at random, k uniform over 0..M-1.
        spans: Probability of infilling: 1 to 3 spans are missing, their borders uniform.
        prefix: Probability of the first k units, k uniform over 0..M-1.
        keywords: Probability of k of the K keyword units at random, k uniform over 0..min(K, M-1).
        reencode: Probability that the first s of n written tokens join the context block, s uniform over 0..n. May
            cut a word.
        windowed: Probability that the first s1 written tokens join the context block, s1 uniform over 0..n, and the
            next s2 make a second block over it, s2 uniform over 2..n-s1; needs n - s1 >= 2, else no second block.

    Raises:
        ValueError: If a probability is outside [0, 1], or `words + spans + prefix + keywords` or
            `reencode + windowed` is above 1.
    """

    words: float = 0.0
    spans: float = 0.0
    prefix: float = 0.0
    keywords: float = 0.0
    reencode: float = 0.0
    windowed: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be a probability in [0, 1], got {value!r}")
        for names in (("words", "spans", "prefix", "keywords"), ("reencode", "windowed")):
            total = sum(getattr(self, name) for name in names)
            if total > 1 + 1e-9:
                raise ValueError(f"{' + '.join(names)} must be at most 1, got {total}")

    def draw_given(self, text: UnitText, rng: np.random.Generator) -> np.ndarray:
        """Return the units of the context, `[U]` bool."""
        given_units = text.given_units.copy()
        missing = np.flatnonzero(~given_units)
        draws = {"words": _words, "spans": _spans, "prefix": _prefix, "keywords": _keywords}
        u = rng.random()
        for name, draw in draws.items():
            u -= getattr(self, name)
            if u < 0:
                if len(missing):
                    given_units[draw(text, missing, rng)] = True
                break
        return given_units

    def draw_blocks(self, num_written: int, rng: np.random.Generator) -> tuple[int, int]:
        """Return (s1, s2): how many written tokens join the context block, and how many make the second block."""
        u = rng.random()
        if u >= self.reencode + self.windowed:
            return 0, 0
        first = int(rng.integers(num_written + 1))
        if u < self.reencode or num_written - first < 2:
            return first, 0
        return first, int(rng.integers(2, num_written - first + 1))


def _words(text, missing, rng):
    return rng.permutation(missing)[: rng.integers(len(missing))]


def _spans(text, missing, rng):
    """2n distinct borders cut the missing units; what lies between an odd and an even one stays missing."""
    num_spans = rng.integers(1, min(MAX_SPANS, (len(missing) + 1) // 2) + 1)
    borders = rng.choice(len(missing) + 1, size=2 * num_spans, replace=False)
    crossed = np.cumsum(np.bincount(borders, minlength=len(missing) + 1))[:-1]
    return missing[crossed % 2 == 0]


def _prefix(text, missing, rng):
    return missing[: rng.integers(len(missing))]


def _keywords(text, missing, rng):
    keywords = keyword_units(text, ~np.isin(np.arange(text.num_units), missing))
    return rng.permutation(keywords)[: rng.integers(min(len(keywords), len(missing) - 1) + 1)]
