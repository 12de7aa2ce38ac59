"""From the text of a request to what the model is given, and back. Runs in the thread that writes: tokenizers are no
place for two threads at once.

Shape suffixes as in canvas: B rows, T tokens of the longest row, G gaps.
"""

import re
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from modeling_insnext.insnext.budget import Budget
from modeling_insnext.insnext.canvas import Canvas
from modeling_insnext.insnext.canvas_pieces import continuation_mask_of, text_behind, text_of
from modeling_insnext.insnext.canvas_text import given_ids

from .errors import refused


# least tokens of a context that a time limit leaves
LEAST_CONTEXT = 64


@dataclass(frozen=True)
class Prepared:
    """The given tokens of a row.

    Attributes:
        ids: In text order.
        canvas: None: written from left to right.
        bos: Number of tokens in front that are no text.
        left: Tokens left of the only gap, None for a canvas of our own, whose whole text is the answer.
        cut_space: The space with which a word begins stands in the prompt already.
        add_space: The suffix begins inside the words, so a space is put before it.
        truncated: Given text was left out because it is too long.
    """

    ids: list[int]
    canvas: Canvas | None
    bos: int
    left: int | None = None
    cut_space: bool = False
    add_space: bool = False
    truncated: bool = False


class Source(Protocol):
    """What a row starts from."""

    def prepare(self, model, tokenizer, max_tokens: int) -> Prepared:
        """Return the given tokens, which leave room for `max_tokens` more."""


@dataclass(frozen=True)
class Around:
    """Text left and right of one gap; without a right side it is continued from left to right.

    Attributes:
        left: Text before the gap.
        right: Text behind it.
        extra: More context, put in front.
        context: Most tokens of `extra`, `left` and `right` that are kept, nearest to the gap first; None: all, and too
            long a text is refused.
    """

    left: str
    right: str = ""
    extra: str = ""
    context: int | None = None

    def prepare(self, model, tokenizer, max_tokens: int) -> Prepared:
        """Return the given tokens.

        Raises:
            ApiError: If the text is too long, or empty where a model needs a token.
        """
        bos, longest = leading_tokens(model, tokenizer), longest_given(model, max_tokens)
        add_space = self.left.endswith(" ") and self.right[:1].isalnum()
        cut_space = bool(self.right) and (self.left.endswith(" ") or not self.left)
        left = self.left[:-1] if self.right and self.left.endswith(" ") else self.left
        extra_ids = ids_of(tokenizer, self.extra)
        left_ids = ids_of(tokenizer, left, first=not extra_ids)
        right_ids = ids_of(tokenizer, " " + self.right if add_space else self.right, first=False)
        given = len(extra_ids) + len(left_ids) + len(right_ids)
        if self.context is not None:
            room = self.context if longest is None else min(self.context, longest - len(bos))
            extra_ids, left_ids, right_ids = nearest(extra_ids, left_ids, right_ids, max(room, 1))
        kept = len(extra_ids) + len(left_ids) + len(right_ids)
        ids = [*bos, *extra_ids, *left_ids, *right_ids]
        check_length(len(ids), longest)
        if not ids:
            raise refused("prompt must hold text: this model has no token that begins one", "prompt")
        prepared = Prepared(ids, None, len(bos), len(ids) - len(right_ids), truncated=kept < given)
        if not self.right:
            return prepared
        slot = torch.arange(len(ids)) == prepared.left - 1
        canvas = Canvas.from_ids(
            torch.tensor([ids]),
            slot_mask=slot[None],
            word_end_mask=slot[None] & (self.left.endswith(" ") and bool(left)),
            continuation_mask=continuation_mask_of(tokenizer, model.config.vocab_size),
        )
        return replace(prepared, canvas=canvas, cut_space=cut_space, add_space=add_space)


@dataclass(frozen=True)
class Marks:
    """A canvas as `model.canvas` reads it: text with marks, or keywords.

    Attributes:
        text: Text with marks, or None.
        keywords: Words, phrases, and tuples of alternatives, or None.
        options: Options of `model.canvas`.
    """

    text: str | None
    keywords: tuple | None
    options: tuple[tuple[str, object], ...] = ()

    def prepare(self, model, tokenizer, max_tokens: int) -> Prepared:
        """Return the given tokens.

        Raises:
            ApiError: If the canvas breaks a rule.
        """
        keywords = self.keywords
        if keywords is not None:
            # a list of lists alone would be a batch
            keywords = [[one if isinstance(one, str) else list(one) for one in keywords]]
        try:
            canvas = model.canvas(tokenizer, self.text, keywords, **dict(self.options)).to("cpu")
            canvas.validate(model.config.vocab_size, max_tokens, model.config.max_position_embeddings)
            Budget(canvas, torch.full_like(canvas.lengths, max_tokens)).check_pending()
        except ValueError as error:
            raise refused(str(error), "text" if self.text is not None else "keywords") from error
        ids = canvas.input_ids[0].tolist()
        check_length(len(ids), longest_given(model, max_tokens))
        return Prepared(ids, canvas, bos=1)


def longest_given(model, max_tokens: int) -> int | None:
    """Return how many given tokens leave room for what is to be written; None: any number."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return None if longest is None else longest - max_tokens


def check_length(tokens: int, longest: int | None) -> None:
    """Refuse a text that leaves no room.

    Raises:
        ApiError: If it has more than `longest` tokens.
    """
    if longest is not None and tokens > longest:
        raise refused(
            f"given text must have at most {longest} tokens, so that what is to be written fits into the model, "
            f"got {tokens}",
            "prompt",
            "context_length_exceeded",
        )


def leading_tokens(model, tokenizer) -> list[int]:
    """Return what stands in front of every text: BOS, where insertion needs it or the tokenizer puts it."""
    bos = tokenizer.bos_token_id
    inserts = model.config.model_type == "insnext"
    return [bos] if bos is not None and (inserts or tokenizer("")["input_ids"][:1] == [bos]) else []


def ids_of(tokenizer, text: str, first: bool = True) -> list[int]:
    """Return the ids of text at the beginning or inside another; what spells a special token means its letters.

    Raises:
        ApiError: If the tokenizer has no token for a part of it.
    """
    try:
        return given_ids(tokenizer, text, first)
    except ValueError as error:
        raise refused(str(error), "prompt") from error


def nearest(extra: list[int], left: list[int], right: list[int], room: int) -> tuple[list[int], list[int], list[int]]:
    """Return what is kept of a context: three quarters of the room left of the gap, what is over to the other side.

    What is left over after both sides goes to the extra context, its end first.
    """
    keep_right = min(len(right), max(room // 4, room - len(left)))
    keep_left = min(len(left), room - keep_right)
    keep_extra = min(len(extra), room - keep_left - keep_right)
    return extra[len(extra) - keep_extra :], left[len(left) - keep_left :], right[:keep_right]


def decoded(tokenizer, prepared: Prepared, tokens: list[int], written: int) -> str:
    """Return what was written behind the left side, or of a canvas of our own the whole text."""
    if prepared.left is None:
        return text_of(tokenizer, tokens[prepared.bos :]).removeprefix(" ")
    before, middle = tokens[prepared.bos : prepared.left], tokens[prepared.left : prepared.left + written]
    text = text_behind(tokenizer, before, middle)
    if prepared.cut_space or not before:
        text = text.removeprefix(" ")
    return text


def pieces_of(tokenizer, ids: list[int], pieces: list[str]) -> list[str]:
    """Return the text of each token such that all of them make the text.

    Of tokens that are parts of characters the last one has the characters, the others nothing.

    Args:
        tokenizer: Tokenizer of the model.
        ids: A text.
        pieces: What each token of the vocabulary is decoded to alone.
    """
    texts, start = [pieces[index] for index in ids], 0
    for end in range(1, len(ids) + 1):
        if "\ufffd" not in texts[end - 1]:
            start = end
        elif end == len(ids) or "\ufffd" not in texts[end]:
            texts[start:end] = [*[""] * (end - start - 1), text_of(tokenizer, ids[start:end])]
    return texts


def cut_place(text: str, stops: tuple[str, ...], indent: int) -> tuple[int | None, str]:
    """Return where a text is cut, and the stop string there: before the first one, or a line indented too little."""
    places = [(text.index(stop), stop) for stop in stops if stop in text]
    if indent:
        line = re.search(rf"\n(?=[ \t]{{0,{indent - 1}}}[^ \t\n])", text)
        places += [(line.start(), "")] if line else []
    return min(places, default=(None, ""))
