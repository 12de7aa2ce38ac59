"""One request on its way: what is asked, the rows that answer it, what it tells the client."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import ApiError
from .texts import Prepared, Source, cut_place, decoded


class Settings(NamedTuple):
    """How is written. Rows of equal settings may share the steps of a batch.

    Attributes:
        insert: Write by insertion; else from left to right.
        reading_order: Insert from left to right, so that text becomes final as it grows.
        max_tokens: Most tokens a row.
        samplers: (name, value) of what narrows the choice of a token, in order; None: greedy.
        slot_temperature: Divides the logits of the places.
        slot_top_p: Nucleus of the places.
        min_tokens: Least tokens a row.
        repetition_penalty: None: what the checkpoint says.
        logit_bias: (token, bias).
        ebr: None: what the checkpoint says.
    """

    insert: bool
    max_tokens: int
    reading_order: bool = False
    samplers: tuple[tuple[str, float], ...] | None = None
    slot_temperature: float = 1.0
    slot_top_p: float = 1.0
    min_tokens: int = 0
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    ebr: bool | None = None

    @property
    def grows_right(self) -> bool:
        """Whether what is written comes behind what was written before."""
        return self.reading_order or not self.insert


class Cuts(NamedTuple):
    """What ends a text early.

    Attributes:
        stops: Strings in front of which it is cut.
        indent: It is cut before the first new line that is indented less.
        line_seconds: Once it has a new line, it ends after so many seconds of writing.
    """

    stops: tuple[str, ...] = ()
    indent: int = 0
    line_seconds: float | None = None


class Insertion(NamedTuple):
    """A token that was written: at which step, at which place of the text as it then stood, and how likely it was.

    `log_p` and those of `top`, (token, log p), are of the token given the place, before temperature and nuclei.
    """

    step: int
    place: int
    token: int
    log_p: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Event:
    """Something that a job tells: `started`, `piece`, `inserted`, `row`, `finished` or `failed`.

    `pause`, that nothing has happened for long, is the event loop's own.
    """

    kind: str
    row: "Row | None" = None
    text: str = ""
    insertion: Insertion | None = None
    error: ApiError | None = None


class Row:
    """One text of a job, from the given tokens to the end.

    Attributes:
        tokens: The text as it stands, in text order.
        origin: For each token its number in `written`, -1 for given ones.
        written: What was written, in order.
        finish: Why it ended: "stop" (by itself), "word" (a stop string), "length"; None while it grows.
        text: What was written as a client gets it: between prompt and suffix, or the whole text of a canvas.
        pieces: The text of each token, when all is written.
        reencoded: After which steps EBR struck, and how many tokens it encoded.
        encoded_tokens: Tokens that went through the network.
        started: `time.monotonic()` of the first token.
    """

    def __init__(self, job: "Job", index: int, prepared: Prepared):
        self.job, self.index, self.prepared = job, index, prepared
        self.tokens = list(prepared.ids)
        self.origin = [-1] * len(self.tokens)
        self.written: list[Insertion] = []
        self.finish: str | None = None
        self.text, self.stop_word, self.shown = "", "", 0
        self.started = time.monotonic()
        self.pieces: list[str] = []
        self.reencoded: tuple[list[int], list[int]] = ([], [])
        self.encoded_tokens: int | None = None

    def insert(self, insertion: Insertion) -> None:
        """Take in a token."""
        if not self.written:
            self.started = time.monotonic()
        self.tokens.insert(insertion.place, insertion.token)
        self.origin.insert(insertion.place, len(self.written))
        self.written.append(insertion)

    def reading_order(self) -> list[Insertion]:
        """Return what was written, from left to right."""
        return [self.written[k] for k in self.origin if k >= 0]

    def settle(self, tokenizer) -> str:
        """Return the text as the client gets it: cut where it ends, and while it grows without what may still change.

        A stop string ends a text that grows from left to right.
        """
        text = decoded(tokenizer, self.prepared, self.tokens, len(self.written))
        if self.finish is not None and self.prepared.add_space and text:
            text += " "
        place, self.stop_word = cut_place(text, self.job.cuts.stops, self.job.cuts.indent)
        if place is not None:
            self.finish = "word" if self.stop_word else "length"
            return text[:place]
        return text[: len(text) - held_back(text, self.job.cuts)] if self.finish is None else text


def held_back(text: str, cuts: Cuts) -> int:
    """Return how many characters at the end may yet be cut off, or are half a character."""
    # the bytes of one character may come in several tokens
    held = len(text) - len(text.rstrip("\ufffd"))
    if cuts.indent:
        # how far a line is indented shows with its first letter
        line = re.search(rf"\n[ \t]{{0,{cuts.indent - 1}}}\ufffd*$", text)
        held = max(held, len(line[0])) if line else held
    for stop in cuts.stops:
        for length in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:length]):
                held = length
                break
    return held


@dataclass
class Job:
    """A request in the queue.

    Args:
        settings: How is written.
        sources: What each row starts from.
        tell: Takes events, from the thread that writes.
        choices: How many sources in a row are the same one.
        deadline: `time.monotonic()` after which writing ends.
        seed: None: the job may share a batch with others.
        cuts: What ends a text early.
        pieces: Whether to tell the text as it becomes final, or each insertion.
        traced: Whether to wait for what `generate` returns: which steps encoded anew, and how much.
        tops: How many alternatives of each token to keep; None: no log p either.
    """

    settings: Settings
    sources: list[Source]
    tell: Callable[[Event], Any]
    deadline: float
    choices: int = 1
    seed: int | None = None
    cuts: Cuts = Cuts()
    pieces: str | None = None
    traced: bool = False
    tops: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    rows: list[Row] = field(default_factory=list)

    @property
    def shares(self) -> bool:
        """Whether rows of others may stand in its batch.

        A batch of another size rounds otherwise, so whoever sends a seed is alone; a bias may bar every token, which
        must not end the texts of others.
        """
        return self.seed is None and not self.settings.logit_bias

    @property
    def prompt_tokens(self) -> int:
        """Given tokens, those of each text once for all of its choices, without BOS."""
        return sum(len(row.prepared.ids) - row.prepared.bos for row in self.rows[:: self.choices])

    @property
    def completion_tokens(self) -> int:
        """Tokens written in all rows."""
        return sum(len(row.written) for row in self.rows)

    def end(self, row: Row) -> None:
        """Tell that a row has ended, and if it was the last one that the job has, though others may still write."""
        self.tell(Event("row", row))
        if not self.traced and all(one.finish is not None for one in self.rows):
            self.tell(Event("finished", row))

    def fail(self, error: ApiError) -> None:
        """Tell that nothing (more) comes."""
        self.tell(Event("failed", error=error))
