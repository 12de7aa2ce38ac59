"""Needles in words: sentences hidden between those of a long text, in any tokenizer's tokens. Needs numpy only.

The kinds, after RULER (arXiv:2404.06654), with the answer behind the slash; a number has `num_digits` digits:

    passkey            The passkey is 5817201.      What is the passkey? Answer: The passkey is / 5817201.
    multi_key          One of the special magic numbers for amber falcon is 5817201.   (and of other keys)
                       ... The special magic number for amber falcon is / 5817201.
    multi_value        the same with `num_values` numbers of one key; ... are / 5817201, 3310942.      in text order
    variable_tracking  VAR KQZRV = 5817201.  VAR AMNTE = VAR KQZRV.  and so on over `hops` hops, in this order
                       ... The value of VAR AMNTE is / 5817201.          (RULER asks for the names instead)
    common_words       A word of the list is river.    `common_count` times; others `RARE_COUNT` times
                       Which 3 words of the list occur most often? Answer: The words are / river, ladder, copper.
                       in the order in which each first occurs

The full stop belongs to the answer, so a longer number is a wrong one. Needles stand between sentences: behind a token
that ends one, the first at or behind the place that was drawn, else the last before it; where within `REACH` tokens
there is none, between two lines, as of code, or else there. Nothing of the haystack is written over; the text is
`length` tokens long with all of it. Numbers, and with them answers, stand nowhere else in the text; only words of
`common_words` may. No two keys, numbers or variables of a text are equal.

The last token of a question is index 0 of a chunk, and needles end a chunk before it, as in `needles`: what a chunk
asks for serves the next one, so the whole question but its last token asks for what the answer needs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .needles import (
    NO_TEXT,
    NeedleQuestion,
    NeedleSample,
    Plan,
    begin_plan,
    check_integer,
    haystack_blocks,
)


# kinds, and how many keys, chains or words nobody asks for
WORD_NOISE = {"passkey": 0, "multi_key": 5, "multi_value": 2, "variable_tracking": 2, "common_words": 6}
WORD_KINDS = tuple(WORD_NOISE)
# options that one kind has, and what they are by default
OPTIONS = {"num_values": ("multi_value", 3), "hops": ("variable_tracking", 2), "common_count": ("common_words", 6)}
# tokens that a needle may be moved to stand between sentences
REACH = 256
NUM_COMMON, RARE_COUNT = 3, 2
NAME_LETTERS = 5
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
MOST_FACTS = 64
# how often facts are drawn until none of their numbers stands in the haystack
TRIES = 100
ADJECTIVES = (
    *("amber", "bitter", "brave", "calm", "clever", "crimson", "dusty", "eager", "early", "fancy", "gentle", "golden"),
    *("hollow", "humble", "ivory", "jolly", "late", "little", "lonely", "loud", "lucky", "narrow", "noble", "old"),
    *("pale", "plain", "proud", "quick", "quiet", "rapid", "rough", "royal", "rusty", "sharp", "shy", "silent"),
    *("silver", "simple", "slow", "small", "smooth", "solid", "steady", "stormy", "strange", "sunny", "tall", "warm"),
)
NOUNS = (
    *(
        "anchor",
        "apple",
        "arrow",
        "basket",
        "bell",
        "bridge",
        "button",
        "candle",
        "castle",
        "chapel",
        "copper",
        "corner",
    ),
    *("falcon", "feather", "fiddle", "forest", "garden", "glove", "hammer", "harbor", "helmet", "island", "kettle"),
    *("ladder", "lantern", "lemon", "marble", "meadow", "mirror", "needle", "orchard", "paper", "pebble", "pepper"),
    *("pillow", "pocket", "ribbon", "river", "saddle", "shadow", "spider", "stable", "thunder", "ticket", "timber"),
    *("tunnel", "valley", "velvet", "violin", "wagon", "window", "winter"),
)


class Words(NamedTuple):
    """What is drawn for one key, chain or list: a key, numbers, names of variables, a list and its common words."""

    key: str
    numbers: list[str]
    names: list[str]
    listed: list[str]
    common: list[str]


class Fact(NamedTuple):
    """What is written: needles in the order of the text, what may stand nowhere else, the question and the answer."""

    needles: list[str]
    hidden: list[str]
    question: str
    answer: str


def _asking(question: str, begun: str, answer: str) -> tuple[str, str]:
    return f"\nQuestion: {question}\nAnswer: {begun}", f" {answer}."


def _passkey(words: Words) -> Fact:
    number = words.numbers[0]
    return Fact([f" The passkey is {number}."], [number], *_asking("What is the passkey?", "The passkey is", number))


def _multi_key(words: Words) -> Fact:
    key, number = words.key, words.numbers[0]
    needle = f" One of the special magic numbers for {key} is {number}."
    begun = f"The special magic number for {key} is"
    return Fact([needle], [number], *_asking(f"What is the special magic number for {key}?", begun, number))


def _multi_value(words: Words) -> Fact:
    key = words.key
    needles = [f" One of the special magic numbers for {key} is {number}." for number in words.numbers]
    question, begun = f"What are all the special magic numbers for {key}?", f"The special magic numbers for {key} are"
    return Fact(needles, words.numbers, *_asking(question, begun, ", ".join(words.numbers)))


def _variable_tracking(words: Words) -> Fact:
    number, names = words.numbers[0], words.names
    needles = [f" VAR {names[0]} = {number}."]
    needles += [f" VAR {new} = VAR {old}." for old, new in zip(names, names[1:], strict=False)]
    question, begun = f"What is the value of VAR {names[-1]}?", f"The value of VAR {names[-1]} is"
    return Fact(needles, [number], *_asking(question, begun, number))


def _common_words(words: Words) -> Fact:
    needles = [f" A word of the list is {word}." for word in words.listed]
    question = f"Which {NUM_COMMON} words of the list occur most often?"
    return Fact(needles, [], *_asking(question, "The words are", ", ".join(words.common)))


WRITERS: dict[str, Callable[[Words], Fact]] = {
    "passkey": _passkey,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
}


@dataclass(eq=False)
class WordNeedleTask:
    """What is hidden in words and asked for.

    Args:
        kind: One of `WORD_KINDS`.
        tokenizer: Anything with `encode(text, add_special_tokens=False)`, `decode(ids)`, `all_special_ids`, `len()`.
        chunk_size: Tokens of a chunk.
        num_digits: Digits of a number.
        num_values: Numbers of a key, `multi_value` only; None is 3.
        hops: Steps from the number to the variable that is asked for, 1 to 4, `variable_tracking` only; None is 2.
        common_count: How often each of the most common words occurs, `common_words` only; None is 6.
        num_noise: Keys, chains or words that nobody asks for, not for `passkey`; None is `WORD_NOISE`.
        num_questions: Questions at the end of the text, each about another key or chain; 1 for `passkey` and
            `common_words`.
        depth: Where the first needle of the first question stands, 0 to 1: the share of the haystack in front of it,
            before it is moved between two sentences; None is anywhere. What belongs to it follows behind it.

    Attributes:
        min_length: Tokens of the shortest text with room for all of it.

    Raises:
        ValueError: For an unknown kind, a number out of range, an option that the kind does not have, a chunk too
            small for an answer, or a tokenizer that writes a sentence with special tokens.
    """

    kind: str
    tokenizer: Any = field(repr=False)
    chunk_size: int = 64
    num_digits: int = 7
    num_values: int | None = None
    hops: int | None = None
    common_count: int | None = None
    num_noise: int | None = None
    num_questions: int = 1
    depth: float | None = None
    min_length: int = field(init=False)

    def __post_init__(self):
        self._check_options()
        self._ends = borders(self.tokenizer)
        fact = self._longest()
        question, answer = self._ask(fact)
        self._question_tokens, self._answer_tokens = len(question), len(answer)
        if self.chunk_size <= len(answer):
            raise ValueError(
                f"chunk_size must be at least {len(answer) + 1}, the last token of the question and the answer, got "
                f"{self.chunk_size}"
            )
        needle_tokens = self._num_facts * sum(len(self._encode(needle)) for needle in fact.needles)
        shortest = needle_tokens - self._limit(0)
        self.min_length = shortest + -shortest % self.chunk_size

    def _option(self, name: str) -> int:
        """Return an option of some kinds, what it is by default, or 1 where the kind has none."""
        kind, default = OPTIONS[name]
        return 1 if self.kind != kind else default if getattr(self, name) is None else getattr(self, name)

    @property
    def _noise(self) -> int:
        return WORD_NOISE[self.kind] if self.num_noise is None else self.num_noise

    @property
    def _num_facts(self) -> int:
        return 1 if self.kind == "common_words" else self.num_questions + self._noise

    def _check_options(self) -> None:
        if self.kind not in WORD_KINDS:
            raise ValueError(f"kind must be one of {', '.join(WORD_KINDS)}, got {self.kind!r}")
        for name, (kind, _) in OPTIONS.items():
            if self.kind != kind and getattr(self, name) is not None:
                raise ValueError(f"{name} is for {kind} only, got {getattr(self, name)!r} for {self.kind}")
        most_noise = len(NOUNS) - NUM_COMMON if self.kind == "common_words" else MOST_FACTS
        for name, low, high in (
            ("chunk_size", 2, None),
            ("num_digits", 1, 18),
            ("num_values", 2, 16),
            ("hops", 1, 4),
            ("common_count", RARE_COUNT + 1, None),
            ("num_noise", 0, most_noise),
            ("num_questions", 1, MOST_FACTS),
        ):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), low, high)
        for name, value, most, kinds in (
            ("num_questions", self.num_questions, 1, ("passkey", "common_words")),
            ("num_noise", self.num_noise or 0, 0, ("passkey",)),
        ):
            if self.kind in kinds and value != most:
                raise ValueError(f"{name} must be {most} for {self.kind}, got {value}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be in 0..1 or None, got {self.depth!r}")
        needed = self._num_facts * self._option("num_values")
        if 9 * 10 ** (self.num_digits - 1) < needed:
            raise ValueError(f"num_digits must allow {needed} different numbers, got {self.num_digits}")

    def _encode(self, text: str) -> np.ndarray:
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        if not ids or set(self.tokenizer.all_special_ids).intersection(ids):
            raise ValueError(f"the tokenizer must write {text!r} without special tokens, got ids {ids}")
        return np.array(ids, dtype=np.int64)

    def _ask(self, fact: Fact) -> tuple[np.ndarray, np.ndarray]:
        """Return a question and its answer, as the tokenizer cuts them where one follows the other."""
        question, both = self._encode(fact.question), self._encode(fact.question + fact.answer)
        if not np.array_equal(both[: len(question)], question) or len(both) == len(question):
            raise ValueError(f"the tokenizer must cut {fact.question!r} from {fact.answer!r}, got ids {both.tolist()}")
        return question, both[len(question) :]

    def _longest(self) -> Fact:
        """Return a fact of as many tokens as any has."""

        def longest(words) -> str:
            return max(words, key=lambda word: len(self._encode(f" {word}")))

        noun, digit = longest(NOUNS), longest(str(9 - n) for n in range(9))
        numbers = [digit * self.num_digits] * self._option("num_values")
        names = [longest(letter * NAME_LETTERS for letter in LETTERS)] * (self._option("hops") + 1)
        listed = [noun] * (NUM_COMMON * self._option("common_count") + RARE_COUNT * self._noise)
        return WRITERS[self.kind](Words(f"{longest(ADJECTIVES)} {noun}", numbers, names, listed, [noun] * NUM_COMMON))

    def _draw_facts(self, rng: np.random.Generator) -> list[Fact]:
        count, low = self._num_facts, 10 ** (self.num_digits - 1)
        pairs = rng.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False)
        numbers = _different(lambda: str(rng.integers(low, 10 * low)), count * self._option("num_values"))
        names = _different(lambda: "".join(rng.choice(LETTERS, NAME_LETTERS)), count * (self._option("hops") + 1))
        listed, common = [], []
        if self.kind == "common_words":
            words = [NOUNS[i] for i in rng.choice(len(NOUNS), NUM_COMMON + self._noise, replace=False)]
            times = [self._option("common_count")] * NUM_COMMON + [RARE_COUNT] * self._noise
            listed = rng.permutation(np.repeat(words, times)).tolist()
            common = sorted(words[:NUM_COMMON], key=listed.index)
        keys = [f"{ADJECTIVES[pair // len(NOUNS)]} {NOUNS[pair % len(NOUNS)]}" for pair in pairs]
        return [
            WRITERS[self.kind](Words(key, numbers[i::count], names[i::count], listed, common))
            for i, key in enumerate(keys)
        ]

    # where it stands

    def _question_ends(self, length: int) -> list[int]:
        """Return the index of the last token of each question: the first tokens of the last chunks with room."""
        chunks_apart = -(-(self._question_tokens + self._answer_tokens) // self.chunk_size)
        last = length - self.chunk_size
        return [last - i * chunks_apart * self.chunk_size for i in reversed(range(self.num_questions))]

    def _limit(self, length: int) -> int:
        """Return where needles must have ended."""
        return self._question_ends(length)[0] - max(self.chunk_size, self._question_tokens - 1)

    def plan(self, haystack: np.ndarray, length: int, index: int, seed: int, epoch: int) -> Plan:
        """Check what was asked for and draw all of a sample but its haystack; see `draw_needles`.

        Raises:
            ValueError: Also if the haystack is full of the numbers that could be hidden in it.
        """
        rng, first = begin_plan(self, haystack, length, index, seed, epoch)
        facts = self._facts_not_in(haystack, first, length, rng)
        needles = [[self._encode(needle) for needle in fact.needles] for fact in facts]
        free = self._limit(length) - sum(len(needle) for of_fact in needles for needle in of_fact)
        before, of_fact = self._places(haystack, first, [len(some) for some in needles], free, rng)
        pieces, at, told = [], 0, [0] * len(facts)
        number_of = {}
        for place, fact in zip(before, of_fact, strict=True):
            ids = needles[fact][told[fact]]
            number_of[fact, told[fact]] = len(pieces)
            pieces.append((int(place) + at, ids))
            at, told[fact] = at + len(ids), told[fact] + 1
        places = tuple((start, start + len(ids)) for start, ids in pieces)
        questions = []
        for fact, end in enumerate(self._question_ends(length)):
            question, answer = self._ask(facts[fact])
            own = tuple(number_of[fact, n] for n in range(told[fact]))
            questions.append(NeedleQuestion(end + 1 - len(question), end, end + 1 + len(answer), own))
            pieces.append((questions[-1].start, np.concatenate([question, answer])))
        depths = tuple((before / max(free, 1)).tolist())
        sample = NeedleSample(f"word_{self.kind}", NO_TEXT, places, depths, tuple(questions))
        return Plan(pieces, sample, lambda haystack, length: _around(pieces, haystack, first, length))

    def _facts_not_in(self, haystack, first: int, length: int, rng: np.random.Generator) -> list[Fact]:
        """Return facts none of whose numbers stands in the haystack already."""
        for _ in range(TRIES):
            facts = self._draw_facts(rng)
            numbers = [self._encode(f" {number}") for fact in facts for number in fact.hidden]
            # whatever stands in front of a number
            if not any(_stands_in(ids[len(ids) > 2 :], haystack, first, length) for ids in numbers):
                return facts
        raise ValueError(
            f"the haystack must leave numbers of {self.num_digits} digits to hide, got one that holds those drawn in "
            f"{TRIES} tries: use more digits"
        )

    def _places(self, haystack, first: int, counts: list[int], free: int, rng: np.random.Generator):
        """Return for every needle, in text order, the haystack in front of it and the number of its fact."""
        fact_N = np.repeat(np.arange(len(counts)), counts)
        before_N = rng.integers(free + 1, size=len(fact_N))
        if self.depth is not None:
            place = round(self.depth * free)
            before_N[: counts[0]] = rng.integers(place, free + 1, size=counts[0])
            before_N[0] = place
        # needles that have the same haystack in front of them come in random order
        order = np.lexsort((rng.permutation(len(fact_N)), before_N))
        return np.array([self._between(haystack, first, int(before_N[n]), free) for n in order]), fact_N[
            order
        ].tolist()

    def _between(self, haystack, first: int, place: int, free: int) -> int:
        """Return the first place from `place` on, else the last one before it, between two sentences, else lines."""
        near = np.arange(max(place - REACH, 0), min(place + REACH, free) + 1)
        before = haystack[(first + near - 1) % len(haystack)]
        for ends in self._ends:
            fits = near[ends[before] & (near > 0)]
            if len(fits):
                return int(fits[min(np.searchsorted(fits, place), len(fits) - 1)])
        return place


@functools.lru_cache(maxsize=8)
def borders(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return for every id whether a sentence may end with it, and whether a line does, `[V]` each."""
    words = [tokenizer.decode(np.array([token])) for token in range(len(tokenizer))]
    sentences = [word.rstrip(" \n\"'”’)").endswith((".", "!", "?")) for word in words]
    return np.array(sentences), np.array([word.endswith("\n") for word in words])


def _different(draw: Callable[[], str], count: int) -> list[str]:
    """Return `count` different strings: equal ones are drawn again."""
    found = {}
    while len(found) < count:
        found.setdefault(draw())
    return list(found)


def _stands_in(ids: np.ndarray, haystack: np.ndarray, first: int, length: int) -> bool:
    """Return whether tokens stand in the text that `haystack_blocks` yields."""
    tail = np.empty(0, dtype=haystack.dtype)
    for _, block in haystack_blocks(haystack, first, length):
        text = np.concatenate([tail, block])
        starts = np.flatnonzero(text[: len(text) - len(ids) + 1] == ids[0]) if len(text) >= len(ids) else []
        if any(np.array_equal(text[start : start + len(ids)], ids) for start in starts):
            return True
        tail = text[len(text) - len(ids) + 1 :] if len(ids) > 1 else tail
    return False


def _around(pieces: list[tuple[int, np.ndarray]], haystack: np.ndarray, first: int, length: int):
    """Yield (index in the text, tokens): pieces, which ascend, and between them the haystack from `first` on."""
    at = 0
    for start, ids in (*pieces, (length, NO_TEXT)):
        for done, block in haystack_blocks(haystack, first, start - at):
            yield at + done, block
        yield start, ids
        first, at = first + start - at, start + len(ids)
