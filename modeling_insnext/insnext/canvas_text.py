"""From text with marks, or keywords, to a canvas: rows of token ids and the gaps between them."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from numbers import Integral
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .canvas import Canvas, padded_forms
from .canvas_pieces import continuation_mask_of, ids_inside_text, text_of, token_ids


logger = logging.get_logger(__name__)

Bounds = int | None | Sequence[Any]
# words and phrases; a list among them holds the forms of one keyword
Keywords = list[str | list[str]]

CLOSING = re.compile(r"""[.,;:!?)\]}%…’”»›、。，；：！？）】」』]+(\s|$)""")
OPENING = re.compile(r"""(^|\s)[(\[{¿¡‘“«‹（【「『]+$""")


class Segment(NamedTuple):
    """Given text between two gaps, the space on its left included; `ends_word`: what follows begins with a space."""

    text: str
    ends_word: bool


class Gap(NamedTuple):
    """Bounds written after a mark, None where there are none."""

    minimum: int | None = None
    maximum: int | None = None


class Given(NamedTuple):
    """What is given: a text, or a form of a keyword, and its tokens."""

    text: str
    ids: list[int]


class Row(NamedTuple):
    """A canvas before padding; `gap_after[i]` is the gap right of token i, -1 where the slot is closed."""

    ids: list[int]
    gap_after: list[int]
    word_end: list[bool]
    gaps: list[Gap]
    given: str
    pending: list[list[Given]] = []


def build_canvas(
    tokenizer,
    text: str | list[str] | None = None,
    keywords: Keywords | list[Keywords] | None = None,
    gap: str = "___",
    min_gap_tokens: Bounds = None,
    max_gap_tokens: Bounds = None,
    ordered: bool = True,
    choose: Callable[[list[list[list[int]]]], Sequence[int]] | None = None,
    vocab_size: int | None = None,
    device: torch.device | str | None = None,
) -> Canvas:
    """Return the canvas of `text` with marks, or of `keywords` with a gap before, between and after them.

    With `ordered=False` the keywords are pending: the canvas is one gap, or that of `text` where both are given, and
    `generate` writes each keyword in one of its forms wherever it likes best. So a prompt can go before them:
    `text="A note to a friend: ___", keywords=["lunch", "Friday"], ordered=False`.

    One space beside a mark is the border of a word: the mark stands for words, and no piece glues to the given word
    there. A mark without one, as in "un___able", stands for a part of the word. Before closing punctuation, after
    opening punctuation and before the end of a line that space is dropped. All else is given text: tabs, newlines and
    every further space. A longer run of the same character is still one mark. A text that spells a special token, as
    "<pad>", means its letters. Where the tokenizer cannot write the given text as it is, because it normalises
    quotes, say, a warning names the first difference.

    Args:
        tokenizer: Tokenizer of the model; byte-level BPE, sentencepiece or WordPiece.
        text: One text or a batch; each mark, `gap`, is a gap. Bounds of the number of tokens may follow a mark:
            `___{3}`, `___{2,5}`, `___{2,}`, `___{,5}`.
        keywords: Words or phrases, one list or a batch of lists. Phrases stay whole; white space around one is not
            part of it. A list beside strings is a keyword with alternatives, `[["look", "looks"], "field"]`: it stands
            in the text in one of these forms. A list of lists alone is a batch, so a text of which every keyword has
            alternatives is written as one: `[[["look", "looks"], ["field", "fields"]]]`. Beside
            one text it is a row, beside a list of texts one row a text.
        gap: The mark.
        min_gap_tokens: Least number of tokens in each gap without bounds of its own: one for all, a list with one a
            gap, or a list of such lists, one a row. None is 0.
        max_gap_tokens: Largest number of tokens, likewise. None is no bound.
        ordered: Whether keywords keep their order. If not, nothing of them is chosen before anything is written.
        choose: Called with the token ids of the forms of each keyword of a row, if they keep their order and there is
            something to choose; returns the number of the form that each has.
        vocab_size: Number of embeddings of the model, `len(tokenizer)` if None; length of `continuation_mask`.
        device: Device of the tensors.

    Raises:
        ValueError: If there is no text, mark or keyword, keywords beside a text have an order, bounds contradict each
            other, gaps touch, a text is no Unicode, the tokenizer has no BOS or no token for a given word, or its ids
            exceed `vocab_size`.
    """
    if text is None and keywords is None:
        raise ValueError("give text with marks, keywords or both, got neither")
    if text is not None and (keywords is None) == (not ordered):
        raise ValueError(
            "ordered=False is for keywords, which go into the gaps of a text in any order: got "
            f"text={text!r}, keywords={keywords!r} and ordered={ordered}"
        )
    if tokenizer.bos_token_id is None:
        raise ValueError("a canvas starts with BOS, and this tokenizer has no bos_token")
    if not isinstance(gap, str) or not gap.strip():
        raise ValueError(f"gap must be a mark that is not blank, got {gap!r}")
    continuation_mask = continuation_mask_of(tokenizer, vocab_size)
    rows = [] if text is None else [_text_row(tokenizer, one, gap) for one in _texts(text)]
    if keywords is not None:
        batch = _keyword_lists(keywords, is_row=isinstance(text, str))
        batch = [_pieces_of(tokenizer, row, gap) for row in batch]
        rows = _ordered_rows(tokenizer, batch, choose) if ordered else _pending_rows(tokenizer, rows, batch)
    _warn_of_changes(tokenizer, rows)
    bounds = _gap_bounds(rows, min_gap_tokens, max_gap_tokens)
    canvas = _canvas_of(tokenizer, rows, bounds, continuation_mask)
    return canvas if device is None else canvas.to(device)


def canvas_at(tokenizer, text: str, at: int, vocab_size: int) -> tuple[Canvas, str, str]:
    """Return the canvas of a text with one gap, at a character, and what is given on the left and on the right of it.

    As if a mark stood there, see :func:`build_canvas`: one space beside the gap is the border of a word, so left,
    what is written and right are the text.

    Raises:
        ValueError: As there.
    """
    left, right = _segment(text[:at], after_gap=False, before_gap=True), _segment(text[at:], True, False)
    row = _gap_row(tokenizer, [left, right], [Gap()], text, "")
    canvas = _canvas_of(tokenizer, [row], [([0], [-1])], continuation_mask_of(tokenizer, vocab_size))
    return canvas, left.text, right.text


def _canvas_of(tokenizer, rows: list[Row], bounds, continuation_mask: torch.Tensor) -> Canvas:
    pending = [[[form.ids for form in forms] for forms in row.pending] for row in rows]
    highest = max(chain.from_iterable([*(row.ids for row in rows), *chain.from_iterable(chain(*pending))]))
    if highest >= len(continuation_mask):
        raise ValueError(f"vocabulary mismatch: token id {highest} in a vocabulary of {len(continuation_mask)}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.bos_token_id
    minima, maxima = zip(*bounds, strict=True)
    return Canvas(
        input_ids=_pad([row.ids for row in rows], pad),
        attention_mask=_pad([[1] * len(row.ids) for row in rows], 0),
        slot_mask=_pad([[index >= 0 for index in row.gap_after] for row in rows], False),
        gap_ids=_pad([row.gap_after for row in rows], -1),
        min_gap_tokens=_pad(minima, 0),
        max_gap_tokens=_pad(maxima, -1),
        word_end_mask=_pad([row.word_end for row in rows], False),
        continuation_mask=continuation_mask,
        pending_ids=padded_forms(pending) if any(pending) else None,
    )


def _texts(text: str | list[str]) -> list[str]:
    if not isinstance(text, Iterable):
        raise ValueError(f"text must be a string or a list of strings, got {text!r}")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("empty canvas: text is an empty list")
    for one in texts:
        if not isinstance(one, str):
            raise ValueError(f"text must be a string or a list of strings, got {one!r}")
    return texts


def _keyword_lists(keywords: Keywords | list[Keywords], is_row: bool) -> list[list[list[str]]]:
    """Return of each row its keywords, and of each of these its forms; `is_row`: lists are forms, not rows."""
    if isinstance(keywords, str) or not isinstance(keywords, Sequence):
        raise ValueError(f"keywords must be a list of phrases, got {keywords!r}")
    if not keywords:
        raise ValueError("empty canvas: keywords is an empty list")
    is_row = is_row or any(isinstance(entry, str) or not isinstance(entry, Sequence) for entry in keywords)
    batch = []
    for row, entries in enumerate([keywords] if is_row else keywords):
        if not entries:
            raise ValueError(f"empty canvas: keywords of row {row} is an empty list")
        batch.append([[entry] if isinstance(entry, str) else entry for entry in entries])
        for forms in batch[-1]:
            if not isinstance(forms, Sequence) or not forms:
                raise ValueError(f"a keyword must be a string or a list of its forms, got {forms!r} in row {row}")
            for form in forms:
                if not isinstance(form, str) or not form.strip():
                    raise ValueError(f"a keyword must be a string that is not blank, got {form!r} in row {row}")
    return batch


def _text_row(tokenizer, text: str, mark: str) -> Row:
    segments, gaps = _split(text, mark)
    if not gaps:
        raise ValueError(
            f"a text needs at least one mark {mark!r} to open a gap, got {text!r}; "
            "words that must occur go to keywords=[...]"
        )
    return _gap_row(tokenizer, segments, gaps, text, mark)


def _gap_row(tokenizer, segments: list[Segment], gaps: list[Gap], text: str, mark: str) -> Row:
    ids, gap_after, word_end = [tokenizer.bos_token_id], [-1], [False]
    for index, segment in enumerate(segments):
        pieces = given_ids(tokenizer, segment.text, first=index == 0)
        if not pieces and 0 < index < len(gaps):
            raise ValueError(
                f"gaps {index - 1} and {index} touch: no given token stands between them in {text!r}; "
                f"one mark with bounds, as {mark}{{2,}}, asks for a longer gap"
            )
        ids += pieces
        gap_after += [-1] * len(pieces)
        word_end += [False] * len(pieces)
        if index < len(gaps):
            gap_after[-1] = index
            word_end[-1] = bool(pieces) and segment.ends_word
    return Row(ids, gap_after, word_end, gaps, "".join(segment.text for segment in segments))


def _pieces_of(tokenizer, keywords: list[list[str]], mark: str) -> list[list[Given]]:
    """Return of each keyword its forms, in the middle of a text."""
    for phrase in chain.from_iterable(keywords):
        if mark in phrase:
            raise ValueError(
                f"a keyword is given whole and has no mark {mark!r}, got {phrase!r}; "
                "if these are letters of the word, choose another mark, as gap='<gap>'"
            )
    texts = [[_segment(f" {form.strip()} ", True, True).text for form in forms] for forms in keywords]
    return [[Given(text, given_ids(tokenizer, text, first=False)) for text in forms] for forms in texts]


def _ordered_rows(tokenizer, batch: list[list[list[Given]]], choose) -> list[Row]:
    if choose is None and any(len(forms) > 1 for row in batch for forms in row):
        raise ValueError("alternatives in a given order need choose, which chooses; model.canvas has one")
    return [_keyword_row(tokenizer, pieces, choose) for pieces in batch]


def _pending_rows(tokenizer, rows: list[Row], batch: list[list[list[Given]]]) -> list[Row]:
    """Return the rows of texts, or where there are none rows of one gap, with pending keywords."""
    rows = rows or [Row([tokenizer.bos_token_id], [0], [False], [Gap()], "")] * len(batch)
    if len(rows) != len(batch):
        raise ValueError(f"keywords beside a list of texts are one row a text, got {len(batch)} for {len(rows)} texts")
    return [row._replace(pending=pieces) for row, pieces in zip(rows, batch, strict=True)]


def _keyword_row(tokenizer, pieces: list[list[Given]], choose) -> Row:
    ids, gap_after, word_end = [tokenizer.bos_token_id], [0], [False]
    chosen = [0] * len(pieces)
    if any(len(forms) > 1 for forms in pieces):
        chosen = [int(form) for form in choose([[form.ids for form in forms] for forms in pieces])]
        if len(chosen) != len(pieces) or any(
            not 0 <= form < len(forms) for form, forms in zip(chosen, pieces, strict=True)
        ):
            raise ValueError(
                f"choose must return a form of each of {len(pieces)} keywords with {[len(forms) for forms in pieces]} "
                f"forms, got {chosen}"
            )
    standing = [forms[form] for forms, form in zip(pieces, chosen, strict=True)]
    for place, phrase in enumerate(standing):
        ids += phrase.ids
        gap_after += [-1] * (len(phrase.ids) - 1) + [place + 1]
        word_end += [False] * (len(phrase.ids) - 1) + [True]
    return Row(ids, gap_after, word_end, [Gap()] * (len(standing) + 1), "".join(phrase.text for phrase in standing))


def _split(text: str, mark: str) -> tuple[list[Segment], list[Gap]]:
    """Cut a text at its marks into n + 1 segments and n gaps."""
    longer = f"(?:{re.escape(mark[0])})*" if len(set(mark)) == 1 else ""
    pattern = re.compile(re.escape(mark) + longer + r"(\{[^{}\s]*\})?")
    matches = list(pattern.finditer(text))
    edges = [0, *(edge for match in matches for edge in match.span()), len(text)]
    segments = [
        _segment(text[edges[i] : edges[i + 1]], after_gap=i > 0, before_gap=i + 2 < len(edges))
        for i in range(0, len(edges), 2)
    ]
    return segments, [_inline_bounds(index, match[1]) for index, match in enumerate(matches)]


def _segment(raw: str, after_gap: bool, before_gap: bool) -> Segment:
    """Take the one space beside each mark out of `raw`; put that on the left back where it parts two words."""
    text = raw
    border_left = after_gap and text.startswith(" ")
    text = text[border_left:]
    border_right = before_gap and text.endswith(" ")
    text = text[: len(text) - border_right]
    if border_left and text and not (CLOSING.match(text) or text[0] in "\r\n"):
        text = " " + text
    # a straight quote opens as often as it closes, so what follows it is the model's choice
    return Segment(text, border_right and not (OPENING.search(text) or text.endswith('"')))


def _inline_bounds(index: int, bounds: str | None) -> Gap:
    if bounds is None:
        return Gap()
    match = re.fullmatch(r"\{(\d*)(,?)(\d*)\}", bounds)
    if match is None or not (match[1] or match[3]):
        raise ValueError(f"bounds of gap {index} must be {{n}}, {{n,}}, {{,m}} or {{n,m}}, got {bounds}")
    minimum = int(match[1] or 0)
    if not match[2]:
        return Gap(minimum, minimum)
    return Gap(minimum, int(match[3]) if match[3] else -1)


def given_ids(tokenizer, text: str, first: bool = True) -> list[int]:
    """Return the ids that `text` has in the middle of a text, or at its start if `first`.

    Raises:
        ValueError: If it is no Unicode, or the tokenizer has no token for a part of it.
    """
    if not text:
        return []
    surrogate = re.search("[\ud800-\udfff]", text)
    if surrogate is not None:
        raise ValueError(f"given text must be Unicode, got the lone surrogate {surrogate[0]!r} in {text!r}")
    ids = token_ids(tokenizer, text) if first else ids_inside_text(tokenizer, text)
    special = set(tokenizer.all_special_ids)
    for index in ids:
        if index in special:
            what = "has no token for a part of" if index == tokenizer.unk_token_id else "reads a special token in"
            token = tokenizer.convert_ids_to_tokens(index)
            raise ValueError(f"given text must survive as it is, but the tokenizer {what} {text!r}: {token!r}")
    return ids


def _warn_of_changes(tokenizer, rows: list[Row]) -> None:
    """Name the first place where the given text, its gaps left out, is decoded as something else."""
    texts = [(row, Given(canvas.given, canvas.ids[1:])) for row, canvas in enumerate(rows)]
    texts += [(row, form) for row, canvas in enumerate(rows) for forms in canvas.pending for form in forms]
    for row, (given, ids) in texts:
        decoded = text_of(tokenizer, ids)
        # a tokenizer may put one space before every text, or take one away
        given, decoded = given.removeprefix(" "), decoded.removeprefix(" ")
        if given != decoded:
            at = len(os.path.commonprefix([given, decoded]))
            around = slice(max(at - 15, 0), at + 15)
            logger.warning(
                f"the tokenizer changes the given text of row {row}: {given[around]!r} becomes {decoded[around]!r}"
            )
            return


def _gap_bounds(rows: list[Row], minimum: Bounds, maximum: Bounds) -> list[tuple[list[int], list[int]]]:
    minima = _bounds_by_row("min_gap_tokens", minimum, rows)
    maxima = _bounds_by_row("max_gap_tokens", maximum, rows)
    for row, canvas in enumerate(rows):
        for index, own in enumerate(canvas.gaps):
            low = next(bound for bound in (own.minimum, minima[row][index], 0) if bound is not None)
            high = next(bound for bound in (own.maximum, maxima[row][index], -1) if bound is not None)
            if 0 <= high < low:
                raise ValueError(f"bounds of gap {index} in row {row} contradict: minimum {low}, maximum {high}")
            minima[row][index], maxima[row][index] = low, high
    return list(zip(minima, maxima, strict=True))


def _bounds_by_row(name: str, bounds: Bounds, rows: list[Row]) -> list[list[int | None]]:
    """Spread one number, a list with one a gap or a list of lists over the gaps of all rows."""
    if bounds is not None and not isinstance(bounds, (Integral, Sequence)):
        raise ValueError(f"{name} must be an integer of at least 0, a list or None, got {bounds!r}")
    if bounds is None or isinstance(bounds, Integral):
        by_row = [[bounds] * len(row.gaps) for row in rows]
    elif any(isinstance(entry, Sequence) for entry in bounds):
        if len(bounds) != len(rows):
            raise ValueError(f"{name} has {len(bounds)} lists for {len(rows)} rows")
        by_row = [
            list(entry) if isinstance(entry, Sequence) else [entry] * len(row.gaps)
            for entry, row in zip(bounds, rows, strict=True)
        ]
    else:
        by_row = [list(bounds) for _ in rows]
    for row, (entries, canvas) in enumerate(zip(by_row, rows, strict=True)):
        if len(entries) != len(canvas.gaps):
            raise ValueError(f"{name} has {len(entries)} entries {entries} for {len(canvas.gaps)} gaps in row {row}")
        for index, entry in enumerate(entries):
            if entry is not None and (isinstance(entry, bool) or not isinstance(entry, Integral) or entry < 0):
                raise ValueError(f"{name} of gap {index} in row {row} must be an integer of at least 0, got {entry!r}")
    return by_row


def _pad(rows: Sequence[list], value: int | bool) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


__all__ = ["build_canvas", "canvas_at", "given_ids"]
