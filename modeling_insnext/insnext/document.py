"""A text that stays encoded while it is edited: what is untouched is not encoded again.

Text is the authority, positions are its characters: the tokens of a document are at any time those that the tokenizer
gives its whole text, behind BOS. An edit replaces the smallest run of tokens outside of which those of the old and the
new text agree, the common beginning taken first. So a letter typed inside a word changes the tokens of that word,
whatever the cursor was between.

What equals what (float64, to 1e-9; `tests/insnext/test_document.py`):

    after open(), refresh()        the text encoded as a whole, as `generate` encodes the given text of a canvas
    after edits that only insert   forward(ids, positions, horizon) over the insertions in their order, tokens of one
                                   edit sharing a horizon
    after any edits                one pass over the whole history, removed tokens included, in which every token sees
                                   what stood in the text when it was encoded, from where it then stood
    after undo()                   what was there before the edit, bit by bit
    write() after open(),          generate(**canvas) with the gap in that place, if no token lies across it, which
    refresh()                      would first be cut in two, an edit; so is, afterwards, what the tokenizer would have
                                   cut otherwise than the model wrote it
    score()                        model.score of the span in its text: it reads no cache, since that of the other
                                   tokens was made when they saw the span

Stale is a token of a document that has not seen every other one as it stands now. `staleness` says for each how many
tokens came or went since it was encoded; it is 0 for all after `refresh()` and never more than what was edited since.
Keys are kept without positions and removed ones leave no hole, so staleness is in what the states know, not in where
tokens are thought to be: new tokens see all others where they stand now, with either position encoding.

With `max_drift` a document refreshes by itself. The token right of an edit, or left of it at the end of the text, is
then encoded with it, and the relative change of its state, |h' - h| / |h|, is added to `drift`; once `drift` reaches
`max_drift`, everything is encoded anew. At 0 that is after every edit.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real

import torch

from .canvas import Canvas
from .canvas_pieces import text_behind
from .canvas_text import canvas_at, given_ids
from .generation_configuration import asked_options, merge_generation_configs
from .generation_insnext import Voices
from .live_draft import LiveDraft, Removed, Work


# options of `generate` -> the value that a document needs
ONE_TEXT = {
    "num_beams": 1, "num_return_sequences": 1, "left_to_right": False, "cache_implementation": (None, "dynamic"),
    "stop_strings": None,
}  # fmt: skip


@dataclass
class Before:
    """A document before a change: its text and drift, its draft, and what the change has replaced in that."""

    text: str
    drift: float
    draft: LiveDraft
    removed: list[Removed] = field(default_factory=list)


class DocumentMixin:
    """Adds `open` to a model."""

    def open(self, tokenizer, text: str = "", max_drift: float | None = None, undo_limit: int = 100) -> "Document":
        """Return a text that stays encoded while it is edited; see :class:`Document`.

        Raises:
            ValueError: As there.
        """
        return Document(self, tokenizer, text, max_drift, undo_limit)


class Document:
    """A text with its cache; see the module. Made by `model.open(...)`, as many of a model as one likes.

    Every method checks its arguments before any work, and leaves the document as it was if it fails.

    Args:
        model: An `InsNextForInsertionLM`.
        tokenizer: Its tokenizer; `score` needs a fast one.
        text: May be empty.
        max_drift: Drift at which the document refreshes by itself, at least 0; None: never.
        undo_limit: Number of edits that can be undone. An edit keeps the keys and values of the tokens it replaced, a
            refresh or `write` those of the whole text.

    Attributes:
        text: The text.
        ids: Its tokens, BOS first.
        drift: Sum of what the edits since the last refresh have changed beside them; 0 without `max_drift`.
        encoded_tokens: Tokens that went through the network so far, by whatever method.
        passes: How often the network was called.

    Raises:
        ValueError: If an option is out of range, the tokenizer has no BOS or no token for a part of the text, or the
            model takes no text that long.
    """

    def __init__(self, model, tokenizer, text: str = "", max_drift: float | None = None, undo_limit: int = 100):
        if max_drift is not None and (isinstance(max_drift, bool) or not isinstance(max_drift, Real) or max_drift < 0):
            raise ValueError(f"max_drift must be a number of at least 0 or None, got {max_drift!r}")
        if isinstance(undo_limit, bool) or not isinstance(undo_limit, int) or undo_limit < 0:
            raise ValueError(f"undo_limit must be an integer of at least 0, got {undo_limit!r}")
        if tokenizer.bos_token_id is None:
            raise ValueError("a document starts with BOS, and this tokenizer has no bos_token")
        self.model, self.tokenizer, self.max_drift = model, tokenizer, max_drift
        self.ids = self._ids_of(_checked_text(text))
        self.text, self.drift = text, 0.0
        self._work = Work()
        self._past = deque(maxlen=undo_limit)
        self._replaced = []
        self.draft = self._encoded()

    @property
    def encoded_tokens(self) -> int:
        return self._work.tokens

    @property
    def passes(self) -> int:
        return self._work.passes

    @property
    def staleness(self) -> list[int]:
        """For each token, BOS first, how many came or went since it was encoded."""
        return self.draft.staleness().tolist()

    def insert(self, at: int, text: str) -> None:
        """Insert text before the character `at`, 0 to the length of the text.

        Raises:
            ValueError: If `at` is no place, the text no string that the tokenizer can write, or the result too long.
        """
        self.replace(at, at, text)

    def delete(self, start: int, end: int) -> None:
        """Delete the characters from `start` to before `end`.

        Raises:
            ValueError: If these are no places, from left to right.
        """
        self.replace(start, end, "")

    @torch.no_grad()
    def replace(self, start: int, end: int, text: str) -> None:
        """Put text in the place of the characters from `start` to before `end`.

        Where that leaves the text as it is, nothing happens, and there is nothing to undo.

        Raises:
            ValueError: As `insert` and `delete`.
        """
        self._check_span(start, end)
        after = self.text[:start] + _checked_text(text) + self.text[end:]
        ids = self._ids_of(after)
        if after != self.text:
            with self._undoable():
                self._become(after, ids)
                self._refresh_if_drifted()

    @torch.no_grad()
    def write(
        self,
        at: int,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        streamer=None,
        **options,
    ) -> str:
        """Let the model write before the character `at`, and return what it wrote; "" if it chose to write nothing.

        As if a mark stood there in a text for `model.canvas`: one space beside the place is the border of a word.

        Args:
            at: The place.
            generation_config: As in `generate`, likewise the next four.
            **options: Options of `generate` for one text: no beams, no several texts, no stop strings, no static
                cache, nothing of a canvas. `return_dict_in_generate` has no effect here and is refused.

        Raises:
            TypeError: As `generate`.
            ValueError: As `insert` and `generate`, or if an option is none for one text. What `generate` refuses in
                its course leaves the document as it was.
        """
        self._check_span(at, at)
        config, fields = merge_generation_configs(self.model.generation_config, generation_config, **options)
        asked = asked_options(self.model.generation_config, generation_config, options)
        _check_for_one_text(config, fields, asked)
        canvas, left, right = canvas_at(self.tokenizer, self.text, at, self.model.config.vocab_size)
        voices = Voices(logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer)
        task = self.model.writing_task(config, {**fields, **canvas}, asked, voices)
        before = self.text
        with self._undoable(whole=True):
            self._become(left + right, task.canvas.input_ids[0].tolist())
            self.draft.open(task.canvas, task.budget, config)
            task.write(self.draft, streamer)
            self.draft.close()
            written = self._take_in(left, right, int(task.canvas.slot_mask[0].int().argmax()) + 1)
            if not written:
                self._become(before, self._ids_of(before))
            self._refresh_if_drifted()
        return written

    @torch.no_grad()
    def score(self, start: int, end: int, stop: bool = True) -> float:
        """Return the log-likelihood in nats of the tokens that hold the characters from `start` to before `end`.

        Of writing them from left to right into the rest of the text and, with `stop`, nothing else: `model.score`
        with the rest as context and that order. It reads the whole text once and leaves the document as it is.

        Raises:
            ValueError: If these are no places, or no token holds a character between them.
        """
        self._check_span(start, end)
        span = self._tokens_of(start, end)
        count = len(self.ids)
        ids = torch.tensor([self.ids], device=self.model.device)
        context = torch.ones_like(ids, dtype=torch.bool)
        context[0, span] = False
        score = self.model.score(ids, context_mask=context, orders=torch.arange(len(span))[None], stop=stop)
        self._work.tokens += count
        self._work.passes += 1
        return float(score)

    @torch.no_grad()
    def refresh(self) -> None:
        """Encode the whole text anew, as when it is opened; `undo` goes back past it, to before the last edit."""
        # the old draft stays as it is, for whom it is still the past
        self.draft, self.drift = self._encoded(), 0.0

    def undo(self) -> None:
        """Take the last edit back: text, tokens, cache and states are what they were, bit by bit.

        What was encoded stays counted.

        Raises:
            ValueError: If there is no edit to undo.
        """
        if not self._past:
            raise ValueError("there is no edit to undo")
        self._restore(self._past.pop())

    @contextmanager
    def _undoable(self, whole: bool = False) -> Iterator[None]:
        """Note what the document was, to be put back by `undo`, or at once if something fails.

        Args:
            whole: Keep a copy of everything, where more happens than replacements.
        """
        before = Before(self.text, self.drift, self.draft)
        if whole:
            self.draft = before.draft.clone()
        self._replaced = [] if whole else before.removed
        try:
            yield
        except BaseException:
            self._restore(before)
            raise
        if self.text != before.text:
            self._past.append(before)
        elif whole:
            self._restore(before)

    def _restore(self, before: Before) -> None:
        self.draft, self.text, self.drift = before.draft, before.text, before.drift
        for removed in reversed(before.removed):
            self.draft.restore(removed)
        self.ids = self.draft.ids[0, self.draft.order()].tolist()

    def _become(self, text: str, ids: list[int]) -> None:
        """Change text and tokens, and encode what is new."""
        first, last, tokens = changed_run(self.ids, ids)
        if first < last or tokens:
            self._replace_tokens(first, last, tokens)
        self.text, self.ids = text, ids

    def _replace_tokens(self, first: int, last: int, tokens: list[int]) -> None:
        """Replace a run of tokens and, where drift is watched, encode the one beside it with it."""
        beside = self._beside(first, last)
        if beside is None:
            self._replaced.append(self.draft.replace(first, last, tokens))
            return
        before, ends_text = self._state(beside), beside < first
        tokens = [self.ids[beside], *tokens] if ends_text else [*tokens, self.ids[beside]]
        first, last = min(first, beside), max(last, beside + 1)
        self._replaced.append(self.draft.replace(first, last, tokens))
        self._add_drift(before, first if ends_text else first + len(tokens) - 1)

    def _beside(self, first: int, last: int) -> int | None:
        """Return the token that is watched when a run changes, None if there is none."""
        if self.max_drift is None:
            return None
        return last if last < len(self.ids) else first - 1 or None

    def _state(self, place: int) -> torch.Tensor:
        # a copy: the buffer is written into
        return self.draft.hidden[0, self.draft.order()[place]].clone()

    def _add_drift(self, before: torch.Tensor, place: int) -> None:
        self.drift += float((self._state(place) - before).norm() / before.norm())

    def _take_in(self, left: str, right: str, first: int) -> str:
        """Make what the draft has written between two texts a part of the document; return it."""
        grown = self.draft.ids[0, self.draft.order()].tolist()
        last = first + len(grown) - len(self.ids)
        written = text_behind(self.tokenizer, grown[1:first], grown[first:last])
        self.ids = grown
        beside = self._beside(first, last) if first < last else None
        if beside is not None:
            before = self._state(beside)
            self.draft.replace(beside, beside + 1, [grown[beside]])
            self._add_drift(before, beside)
        self._become(left + written + right, self._ids_of(left + written + right))
        return written

    def _refresh_if_drifted(self) -> None:
        if self.max_drift is not None and self.drift >= self.max_drift:
            self.refresh()

    def _encoded(self) -> LiveDraft:
        with torch.no_grad():
            return LiveDraft(self.model, self.ids, self._work)

    def _ids_of(self, text: str) -> list[int]:
        ids = [self.tokenizer.bos_token_id, *given_ids(self.tokenizer, text)]
        size, longest = self.model.config.vocab_size, self.model.config.max_position_embeddings
        if max(ids) >= size:
            raise ValueError(f"vocabulary mismatch: token id {max(ids)} in a vocabulary of {size}")
        if len(ids) > longest:
            raise ValueError(f"a text holds at most max_position_embeddings={longest} tokens, got {len(ids)}")
        return ids

    def _tokens_of(self, start: int, end: int) -> list[int]:
        if not self.tokenizer.is_fast:
            raise ValueError("score needs a fast tokenizer, which says what characters a token holds")
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        offsets = self.tokenizer(self.text, **options)["offset_mapping"]
        span = [place for place, (first, last) in enumerate(offsets, 1) if first < end and start < last]
        if start == end or not span:
            raise ValueError(f"no token holds a character from {start} to before {end}")
        return span

    def _check_span(self, start: int, end: int) -> None:
        for place in (start, end):
            if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place <= len(self.text):
                raise ValueError(f"a place is an integer from 0 to {len(self.text)}, got {place!r}")
        if start > end:
            raise ValueError(f"a span goes from left to right, got {start} to {end}")


def changed_run(old: list[int], new: list[int]) -> tuple[int, int, list[int]]:
    """Return the smallest run that makes one list the other: its ends in the old one, and what stands there now.

    Of several the one furthest right: the common beginning is taken first.
    """
    shorter = min(len(old), len(new))
    first = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    room = shorter - first
    behind = next((i for i in range(room) if old[-1 - i] != new[-1 - i]), room)
    return first, len(old) - behind, new[first : len(new) - behind]


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, got {text!r}")
    return text


def _check_for_one_text(config, fields: dict, asked: set[str]) -> None:
    for name, needed in ONE_TEXT.items():
        value = getattr(config, name)
        if value not in (needed if isinstance(needed, tuple) else (needed,)):
            raise ValueError(f"{name} has no meaning where one text is written into its document, got {value!r}")
    if "return_dict_in_generate" in asked:
        raise ValueError("write returns the text that was written, return_dict_in_generate has no effect")
    for name in fields:
        if name in Canvas.field_names() or name == "inputs":
            raise ValueError(f"{name} belongs to a canvas, and a document makes its own")


__all__ = ["Document", "DocumentMixin"]
