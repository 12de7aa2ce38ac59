"""Sequences of tokens that a text must not hold, or is pushed towards: both sides of a slot count.

A token may complete a sequence with what stands left of its slot, right of it, or on both sides. So what is banned is
looked for around the slot, not at the end of the text, and what a step has written already is seen by the next token
of the same step. Every token is barred that would complete something; hence a text that held nothing banned never
will. What given tokens hold across an open slot is broken by a minimum of one token for its gap.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from transformers.generation import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor

from .canvas import Canvas


class Bans:
    """`bad_words_ids`, `sequence_bias` and `no_repeat_ngram_size` of a `generate` call.

    Args:
        config: An `InsertionGenerationConfig`.
        vocab_size: Number of embeddings V.

    Raises:
        ValueError: If a sequence is empty or has a token outside the vocabulary.
    """

    def __init__(self, config, vocab_size: int):
        self.ngram = config.no_repeat_ngram_size or 0
        biases = [
            *_sequences("sequence_bias", SequenceBiasLogitsProcessor, config.sequence_bias, vocab_size),
            *_sequences("bad_words_ids", NoBadWordsLogitsProcessor, config.bad_words_ids, vocab_size),
        ]
        self.banned = [words for words, bias in biases if bias == -math.inf]
        self.single_V = torch.zeros(vocab_size)
        # by a token that stands beside the slot when all of the sequence but one token does
        self.by_left, self.by_right = defaultdict(list), defaultdict(list)
        for words, bias in biases:
            if len(words) == 1:
                self.single_V[words[0]] += bias
                continue
            self.by_right[words[1]].append((words, 0, bias))
            for place in range(1, len(words)):
                self.by_left[words[place - 1]].append((words, place, bias))
        self.acts = bool(biases) or self.ngram > 0

    def with_minima(self, canvas: Canvas) -> Canvas:
        """Return the canvas with a minimum of 1 for gaps without which the given tokens would hold what is banned.

        Where several gaps of a sequence could break it, the last one does, unless one has a minimum already.
        N-grams that are given as they stand may repeat; what is written, or left empty, makes no repetition.

        Raises:
            ValueError: If what is banned stands in given text with no gap that could break it.
        """
        if not self.acts:
            return canvas
        canvas.validate()
        minima_BG, maxima_BG = canvas.min_gap_tokens.clone(), canvas.max_gap_tokens.tolist()
        for row, length in enumerate(canvas.lengths.tolist()):
            text, gap_after = canvas.input_ids[row, :length].tolist(), canvas.gap_ids[row, :length].tolist()
            open_after = [gap if gap >= 0 and maxima_BG[row][gap] != 0 else -1 for gap in gap_after]
            spans = [*self._banned_spans(text, open_after, row), *self._repeated_spans(text, open_after)]
            for first, last in sorted(spans, key=lambda span: span[1]):
                gaps = [gap for gap in open_after[first:last] if gap >= 0]
                if not any(minima_BG[row, gap] > 0 for gap in gaps):
                    minima_BG[row, gaps[-1]] = 1
        return Canvas(**{**canvas, "min_gap_tokens": minima_BG})

    def _banned_spans(self, text, open_after, row) -> Iterator[tuple[int, int]]:
        for words in self.banned:
            for first, last in _windows(text, len(words)):
                if tuple(text[first : last + 1]) == words:
                    if max(open_after[first:last], default=-1) < 0:
                        raise ValueError(
                            f"{list(words)} is banned and stands in the given text of row {row}; "
                            "suppress_tokens bars tokens from being written only"
                        )
                    yield first, last

    def _repeated_spans(self, text, open_after) -> Iterator[tuple[int, int]]:
        if not self.ngram:
            return
        seen = {
            tuple(text[first : last + 1])
            for first, last in _windows(text, self.ngram)
            if max(open_after[first:last], default=-1) < 0
        }
        for first, last in _windows(text, self.ngram):
            if max(open_after[first:last], default=-1) >= 0:
                words = tuple(text[first : last + 1])
                if words in seen:
                    yield first, last
                seen.add(words)

    def add_to(self, scores_V: torch.Tensor, text: list[int], place: int) -> torch.Tensor:
        """Return the scores of the token that is to stand at `place` of a text, with biases added and bans barred."""
        left, right = text[:place], text[place:]
        scores_V = scores_V + self.single_V.to(scores_V)
        for words, at, bias in [*self.by_left.get(left[-1] if left else None, ()),
                                *self.by_right.get(right[0] if right else None, ())]:  # fmt: skip
            if _ends_with(left, words[:at]) and tuple(right[: len(words) - at - 1]) == words[at + 1 :]:
                scores_V[words[at]] += bias
        if self.ngram:
            scores_V[list(self._repeating(left, right))] = -torch.inf
        return scores_V

    def _repeating(self, left: list[int], right: list[int]) -> set[int]:
        """Return the tokens that would make an n-gram stand twice."""
        n, barred = self.ngram, set()
        # n-grams across the slot end with the insertion
        stay = {tuple(side[first : last + 1]) for side in (left, right) for first, last in _windows(side, n)}
        for at in range(n):
            before, after = tuple(left[len(left) - at :]) if at <= len(left) else None, tuple(right[: n - 1 - at])
            if before is not None and len(after) == n - 1 - at:
                barred |= {words[at] for words in stay if words[:at] == before and words[at + 1 :] == after}
        # or two of the new ones are the same: then the token stands beside itself
        near = left[max(len(left) - n + 1, 0) :], right[: n - 1]
        for token in {*near[0], *near[1]}:
            text = [*near[0], token, *near[1]]
            counts = Counter(tuple(text[first : last + 1]) for first, last in _windows(text, n))
            if max(counts.values(), default=0) > 1:
                barred.add(token)
        return barred


def _sequences(name: str, processor, value, vocab_size: int) -> list[tuple[tuple[int, ...], float]]:
    """Return the sequences and biases of an option, read as by the processor of Transformers."""
    sequences = [] if value is None else list(processor(value).sequence_bias.items())
    for words, bias in sequences:
        if not words or math.isnan(bias) or bias == math.inf:
            raise ValueError(f"{name} must hold non-empty sequences and biases below inf, got {words}: {bias}")
        outside = [token for token in words if token >= vocab_size]
        if outside:
            raise ValueError(f"{name} must hold tokens in [0, {vocab_size}), got {outside[0]}")
    return sequences


def _windows(text: list[int], width: int) -> Iterator[tuple[int, int]]:
    """Return the first and last index of every run of `width` tokens."""
    return ((first, first + width - 1) for first in range(len(text) - width + 1))


def _ends_with(text: list[int], words: tuple[int, ...]) -> bool:
    return len(words) <= len(text) and tuple(text[len(text) - len(words) :]) == words
