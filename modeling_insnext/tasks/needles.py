"""Needles in a haystack: a short text hidden in a long one and asked for at its end. Needs numpy only.

A text of 5 chunks of 16 tokens, one needle "|The passkey is:" k k k "|" (n), the question "|What is the passkey? The
passkey is" (q) whose last token is index 0 of the last chunk, the answer (A), haystack (.); labels are -100 but at A:

    chunk 0           chunk 1           chunk 2           chunk 3           chunk 4
    ................  ..nnnnnnnnn.....  ................  ........qqqqqqqq  qAAA............
                                                          ^ limit: needles end here at the latest

Chunks are counted in tokens of the text: a model that puts landmarks between them does so itself. The haystack lies
under everything; needles and questions replace what is there. The kinds, with the answer after the slash:

    passkey     |The passkey is: K |                              |What is the passkey? The passkey is / K
    multi_key   |One of the special magic numbers for X is Y |    |The special magic number for X is / Y
    two_hop     |DEF A -> B |  and, before or after,  |DEF B -> C |      |The path from A is / B , C

K, X, Y, A, B, C are strings of random ids, uniform over the allowed ones: no special ids and none that occur in a
phrase. No two keys, values or variables of a text are equal. Noise is more keys, or chains, that nobody asks for.

Needles end at the latest one chunk before the last token of the first question, so 2 chunks before the end. Needles of
together l tokens leave R - l tokens of haystack in front of that limit R; each needle has u of them in front of it, u
uniform over 0 .. R - l, independently of the others; its depth is u / (R - l). Several questions end each at index 0
of a chunk of its own, as close together as chunks allow.

A sample is a function of task, haystack, length, index, seed and epoch, and of nothing else. Kinds and phrases follow
DRT (ICML 2025, PMLR 267:24727) and RULER (arXiv:2404.06654).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np


IGNORE_INDEX = -100
# kinds, and how many keys or chains nobody asks for
NOISE = {"passkey": 0, "multi_key": 5, "two_hop": 1}
NEEDLE_KINDS = tuple(NOISE)
PHRASES = (
    *("|", "|The passkey is:", "|What is the passkey? The passkey is"),
    *("|One of the special magic numbers for", "is", "|The special magic number for"),
    *("|DEF", "->", "|The path from", ","),
)
# tokens that are copied at once
BLOCK = 1 << 20
NO_TEXT = np.empty(0, dtype=np.int64)


class NeedleQuestion(NamedTuple):
    """Where a question stands: its prompt is `input_ids[: end + 1]`, its answer `input_ids[end + 1 : stop]`.

    Attributes:
        start: Index of its first token.
        end: Index of its last token, a multiple of the chunk size.
        stop: One past the last token of the answer.
        needles: Which of the sample's needles hold the answer.
    """

    start: int
    end: int
    stop: int
    needles: tuple[int, ...]

    @property
    def answer(self) -> slice:
        return slice(self.end + 1, self.stop)


@dataclass(frozen=True, eq=False)
class NeedleSample:
    """A text with needles.

    Attributes:
        kind: Kind of the task; `word_` stands in front of that of a `WordNeedleTask`.
        input_ids: The text, `[T]`; a read-only memory map where it comes from a file.
        needles: (start, stop) of each needle.
        depths: Depth of each needle, 0 to 1: the share of the haystack in front of it.
        questions: In text order.
    """

    kind: str
    input_ids: np.ndarray
    needles: tuple[tuple[int, int], ...]
    depths: tuple[float, ...]
    questions: tuple[NeedleQuestion, ...]

    @property
    def labels(self) -> np.ndarray:
        """The answers, and -100 everywhere else, `[T]`; made on each access."""
        labels = np.full(len(self.input_ids), IGNORE_INDEX, dtype=np.int64)
        for question in self.questions:
            labels[question.answer] = self.input_ids[question.answer]
        return labels


class _Fact(NamedTuple):
    """What one key or chain writes: its needles, the question about it and the answer, each token ids."""

    needles: list[np.ndarray]
    question: np.ndarray
    answer: np.ndarray


class Plan(NamedTuple):
    """A sample before its text is made: what is written where, and the haystack around it.

    `blocks(haystack, length)` yields (index in the text, tokens); where blocks overlap, later ones count.
    """

    pieces: list[tuple[int, np.ndarray]]
    sample: NeedleSample
    blocks: Callable[[np.ndarray, int], Iterator[tuple[int, np.ndarray]]]


@dataclass(eq=False)
class NeedleTask:
    """What is hidden and asked for.

    Args:
        kind: `passkey`, `multi_key` or `two_hop`.
        tokenizer: Anything with `encode(text, add_special_tokens=False)`, `all_special_ids` and `len()`.
        chunk_size: Tokens of a chunk.
        num_ids: Random ids of a passkey, a value or a variable.
        key_ids: Random ids of a key, `multi_key` only; None takes `num_ids`.
        num_noise: Keys or chains that nobody asks for, not for `passkey`; None is 5 keys, 1 chain.
        num_questions: Questions at the end of the text, each about another key or chain; 1 for `passkey`.
        id_range: First and one past the last id that may be drawn; None is the whole vocabulary.

    Attributes:
        min_length: Tokens of the shortest text with room for all of it.
        allowed_ids: What random ids are drawn from.

    Raises:
        ValueError: For an unknown kind, a number out of range, an option that the kind does not have, a chunk too
            small for the answer, too few ids for distinct strings, or a phrase that the tokenizer cannot write.
    """

    kind: str
    tokenizer: Any = field(repr=False)
    chunk_size: int = 64
    num_ids: int = 5
    key_ids: int | None = None
    num_noise: int | None = None
    num_questions: int = 1
    id_range: tuple[int, int] | None = None
    min_length: int = field(init=False)
    allowed_ids: np.ndarray = field(init=False, repr=False)
    _words: dict[str, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self):
        self._check_options()
        self._words = self._encode_phrases()
        self.allowed_ids = self._allow_ids()
        fact = self._write(*(np.zeros(width, dtype=np.int64) for width in self._widths()))
        if self.chunk_size <= len(fact.answer):
            raise ValueError(
                f"chunk_size must be at least {len(fact.answer) + 1}, the last token of the question and the answer, "
                f"got {self.chunk_size}"
            )
        needle_tokens = self._num_facts * sum(map(len, fact.needles))
        shortest = needle_tokens - self._limit(0, fact)
        self.min_length = shortest + -shortest % self.chunk_size

    @property
    def _num_facts(self) -> int:
        return self.num_questions + (NOISE[self.kind] if self.num_noise is None else self.num_noise)

    def _check_options(self) -> None:
        if self.kind not in NEEDLE_KINDS:
            raise ValueError(f"kind must be one of {', '.join(NEEDLE_KINDS)}, got {self.kind!r}")
        for name, low in (("chunk_size", 2), ("num_ids", 1), ("num_questions", 1), ("key_ids", 1), ("num_noise", 0)):
            value = getattr(self, name)
            if value is not None or name not in ("key_ids", "num_noise"):
                check_integer(name, value, low)
        if self.key_ids is not None and self.kind != "multi_key":
            raise ValueError(f"key_ids is for multi_key only, got {self.key_ids} for {self.kind}")
        for name, value, only in (("num_questions", self.num_questions, 1), ("num_noise", self.num_noise or 0, 0)):
            if self.kind == "passkey" and value != only:
                raise ValueError(f"{name} must be {only} for passkey, which has one needle, got {value}")

    def _encode_phrases(self) -> dict[str, np.ndarray]:
        words, special = {}, set(self.tokenizer.all_special_ids)
        for phrase in PHRASES:
            ids = list(self.tokenizer.encode(phrase, add_special_tokens=False))
            if not ids or special.intersection(ids):
                raise ValueError(f"the tokenizer must write {phrase!r} without special tokens, got ids {ids}")
            words[phrase] = np.array(ids, dtype=np.int64)
        return words

    def _allow_ids(self) -> np.ndarray:
        vocab_size = len(self.tokenizer)
        low, high = (0, vocab_size) if self.id_range is None else self.id_range
        if not 0 <= low < high <= vocab_size:
            raise ValueError(f"id_range must be (low, high), 0 <= low < high <= {vocab_size}, got {self.id_range}")
        taken = [*self._words.values(), np.array(self.tokenizer.all_special_ids, dtype=np.int64)]
        allowed = np.setdiff1d(np.arange(low, high), np.concatenate(taken))
        columns = self._widths()
        for width in set(columns):
            # the variables of two_hop are one pool, keys and values are two
            needed = self._num_facts * (len(columns) if self.kind == "two_hop" else 1)
            if len(allowed) ** width < needed:
                raise ValueError(
                    f"id_range must allow {needed} distinct strings of {width} ids, got {len(allowed)} ids that are "
                    f"neither special nor part of a phrase in {low}..{high - 1}"
                )
        return allowed

    def _widths(self) -> tuple[int, ...]:
        """Return how many ids each random string of a fact has."""
        if self.kind == "multi_key":
            return self.key_ids or self.num_ids, self.num_ids
        return (self.num_ids,) * (3 if self.kind == "two_hop" else 1)

    def _write(self, *strings: np.ndarray) -> _Fact:
        def write(*parts):
            return np.concatenate([self._words[part] if isinstance(part, str) else part for part in parts])

        if self.kind == "passkey":
            (key,) = strings
            needle = write("|The passkey is:", key, "|")
            return _Fact([needle], write("|What is the passkey? The passkey is"), key)
        if self.kind == "multi_key":
            key, value = strings
            needle = write("|One of the special magic numbers for", key, "is", value, "|")
            return _Fact([needle], write("|The special magic number for", key, "is"), value)
        a, b, c = strings
        needles = [write("|DEF", a, "->", b, "|"), write("|DEF", b, "->", c, "|")]
        return _Fact(needles, write("|The path from", a, "is"), write(b, ",", c))

    def _draw_facts(self, rng: np.random.Generator) -> list[_Fact]:
        widths = self._widths()
        if self.kind == "two_hop":
            strings = _distinct(self.allowed_ids, len(widths) * self._num_facts, widths[0], rng)
            columns = [strings[i :: len(widths)] for i in range(len(widths))]
        else:
            columns = [_distinct(self.allowed_ids, self._num_facts, width, rng) for width in widths]
        return [self._write(*strings) for strings in zip(*columns, strict=True)]

    def plan(self, haystack: np.ndarray, length: int, index: int, seed: int, epoch: int) -> Plan:
        """Check what was asked for and draw all of a sample but its haystack; see `draw_needles`."""
        rng, first = begin_plan(self, haystack, length, index, seed, epoch)
        facts = self._draw_facts(rng)
        texts = [needle for fact in facts for needle in fact.needles]
        starts, depths = _place([len(text) for text in texts], self._limit(length, facts[0]), rng)
        pieces = list(zip(starts, texts, strict=True))
        needles = tuple((start, start + len(text)) for start, text in pieces)
        questions, per_fact = [], len(facts[0].needles)
        for i, end in enumerate(self._ends(length, facts[0])):
            start, stop = end + 1 - len(facts[i].question), end + 1 + len(facts[i].answer)
            questions.append(NeedleQuestion(start, end, stop, tuple(range(i * per_fact, (i + 1) * per_fact))))
            pieces.append((start, np.concatenate([facts[i].question, facts[i].answer])))

        def blocks(haystack, length):
            yield from haystack_blocks(haystack, first, length)
            yield from pieces

        return Plan(pieces, NeedleSample(self.kind, NO_TEXT, needles, depths, tuple(questions)), blocks)

    def _ends(self, length: int, fact: _Fact) -> list[int]:
        """Return the index of the last token of each question: the first tokens of the last chunks with room."""
        chunks_apart = -(-(len(fact.question) + len(fact.answer)) // self.chunk_size)
        last = length - self.chunk_size
        return [last - i * chunks_apart * self.chunk_size for i in reversed(range(self.num_questions))]

    def _limit(self, length: int, fact: _Fact) -> int:
        """Return where needles must have ended."""
        return self._ends(length, fact)[0] - max(self.chunk_size, len(fact.question) - 1)


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")


def _distinct(allowed: np.ndarray, count: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return `count` different strings, uniform over all of them: equal ones are drawn again."""
    found = {}
    while len(found) < count:
        string = rng.choice(allowed, width)
        found.setdefault(string.tobytes(), string)
    return list(found.values())


def begin_plan(task, haystack: np.ndarray, length: int, index: int, seed: int, epoch: int):
    """Check what was asked for; return the generator of all draws of a sample, and where its haystack starts."""
    check_haystack(haystack)
    for name, value in (("length", length), ("index", index), ("seed", seed), ("epoch", epoch)):
        # one word each: longer numbers would run into one another in the entropy
        check_integer(name, value, 0, 2**32 - 1)
    check_length(task, length)
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch, length, index]))
    size = len(haystack)
    return rng, int(rng.integers(size - length + 1 if size >= length else size))


def _place(lengths: list[int], limit: int, rng: np.random.Generator) -> tuple[list[int], tuple[float, ...]]:
    """Return start and depth of each needle; the needles and the haystack between them fill `limit` tokens."""
    free = limit - sum(lengths)
    before = rng.integers(free + 1, size=len(lengths))
    starts, taken = [0] * len(lengths), 0
    # needles that have the same haystack in front of them come in random order
    for needle in np.lexsort((rng.permutation(len(lengths)), before)):
        starts[needle] = int(before[needle]) + taken
        taken += lengths[needle]
    return starts, tuple((before / max(free, 1)).tolist())


def check_haystack(haystack: np.ndarray) -> None:
    if not isinstance(haystack, np.ndarray) or haystack.dtype.kind not in "iu" or haystack.ndim != 1:
        got = f"{haystack.dtype} {haystack.shape}" if isinstance(haystack, np.ndarray) else type(haystack).__name__
        raise ValueError(f"haystack must be a numpy array of token ids, integers [N], got {got}")
    if len(haystack) == 0:
        raise ValueError("haystack must have at least one token, got 0 tokens")


def check_length(task, length: int) -> None:
    if length % task.chunk_size:
        raise ValueError(f"length must be a multiple of chunk_size, {task.chunk_size}, got {length}")
    if length < task.min_length:
        raise ValueError(f"length must be at least {task.min_length}, room for needles and questions, got {length}")


def haystack_blocks(haystack: np.ndarray, first: int, length: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index in the text, tokens), read cyclically from `first` on."""
    if len(haystack) < min(length, BLOCK):
        haystack = np.tile(haystack, -(-min(length, BLOCK) // len(haystack)))
    done = 0
    while done < length:
        at = (first + done) % len(haystack)
        block = haystack[at : at + min(BLOCK, length - done)]
        yield done, block
        done += len(block)


def draw_needles(task, haystack: np.ndarray, length: int, index: int, seed: int = 0, epoch: int = 0) -> NeedleSample:
    """Return sample `index` of `length` tokens: always the same one.

    Args:
        task: What is hidden and asked for, a `NeedleTask` or a `WordNeedleTask`.
        haystack: Token ids, `[N]`, an array or a memory map; a text starts anywhere in it. Where it is shorter than
            the text it is repeated, else a text does not run over its end.
        length: Tokens of the text, a multiple of the chunk size.

    Raises:
        ValueError: If the haystack is empty or no integers, `length` is too short or no multiple of the chunk size, or
            a number is negative or above 2^32 - 1.
    """
    made = task.plan(haystack, length, index, seed, epoch)
    input_ids = np.empty(length, dtype=np.int64)
    for at, block in made.blocks(haystack, length):
        input_ids[at : at + len(block)] = block
    return replace(made.sample, input_ids=input_ids)
