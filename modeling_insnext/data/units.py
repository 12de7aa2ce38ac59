"""Texts as units: the words that orders and contexts act on, made of one or more tokens.

A text of T tokens has U units; a unit is a maximal run of tokens in which only the first begins one:

    tokens        <s>  Ġthe  Ġplay  ers  Ġleft  .
    unit_starts     x     x      x    .      x  x
    unit            0     1      2    2      3  4

The tables over a vocabulary are computed once per tokenizer; a text is then cut by indexing.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


SENTENCE_ENDS = ".!?…。！？"
CLOSING_MARKS = "\"'”’)]»"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, eq=False)
class UnitText:
    """One text in text order, cut into units.

    Args:
        tokens: Token ids, `[T]` int64; the first one is BOS.
        unit_starts: True where a token begins a unit, `[T]`; the first token always does.
        sentences: Non-decreasing sentence index of each unit, `[U]`, or None where unknown.
        given: True for tokens that the caller supplies, whole units, `[T]`; None stands for BOS alone.
        keywords: True for units that are keywords, `[U]`, or None where unknown.
        rarity: Score of each unit, high for rare ones, `[U]`, or None where unknown.
        pieces: What each token says, T byte strings that are the text together, or None where unknown.

    Raises:
        ValueError: If the text is empty, a shape is wrong, or a unit is given in part.
    """

    tokens: np.ndarray
    unit_starts: np.ndarray
    sentences: np.ndarray | None = None
    given: np.ndarray | None = None
    keywords: np.ndarray | None = None
    rarity: np.ndarray | None = None
    pieces: list[bytes] | None = None

    def __post_init__(self):
        if len(self.tokens) == 0:
            raise ValueError("a text needs at least one token (BOS), got 0 tokens")
        for name in ("unit_starts", "given"):
            flags = getattr(self, name)
            if flags is not None and flags.shape != self.tokens.shape:
                raise ValueError(f"{name} needs one flag per token, {len(self.tokens)}, got {len(flags)}")
            if flags is not None and not flags[0]:
                raise ValueError(f"{name}[0] must be True: BOS is a unit and always given, got {flags[0]}")
        for name in ("sentences", "keywords", "rarity"):
            scores = getattr(self, name)
            if scores is not None and scores.shape != (self.num_units,):
                raise ValueError(f"{name} needs one entry per unit, {self.num_units}, got {len(scores)}")
        if self.given is not None and (self.given != self.given[self.first_tokens][self.unit_of]).any():
            raise ValueError("given must cover whole units, got a unit that is given in part")
        if self.pieces is not None and len(self.pieces) != len(self.tokens):
            raise ValueError(f"pieces needs one entry per token, {len(self.tokens)}, got {len(self.pieces)}")

    @property
    def num_units(self) -> int:
        return len(self.first_tokens)

    @cached_property
    def first_tokens(self) -> np.ndarray:
        """Index of the first token of each unit, `[U]`."""
        return np.flatnonzero(self.unit_starts)

    @cached_property
    def unit_lengths(self) -> np.ndarray:
        """Number of tokens of each unit, `[U]`."""
        return np.diff(self.first_tokens, append=len(self.tokens))

    @cached_property
    def unit_of(self) -> np.ndarray:
        """Unit of each token, `[T]`."""
        return np.cumsum(self.unit_starts) - 1

    @cached_property
    def given_units(self) -> np.ndarray:
        """True for the units that the caller supplies, `[U]`."""
        if self.given is None:
            return np.arange(self.num_units) == 0
        return self.given[self.first_tokens]

    def tokens_of(self, units: np.ndarray) -> np.ndarray:
        """Return the token indices of `units`, unit after unit, each unit's tokens left to right."""
        lengths = self.unit_lengths[units]
        shifts = self.first_tokens[units] - (np.cumsum(lengths) - lengths)
        return np.repeat(shifts, lengths) + np.arange(lengths.sum())


def cut_text(
    tokens: np.ndarray,
    word_starts: np.ndarray | None = None,
    sentence_ends: np.ndarray | None = None,
    given: np.ndarray | None = None,
    keywords: np.ndarray | None = None,
    token_rarity: np.ndarray | None = None,
    pieces: Sequence[bytes] | None = None,
) -> UnitText:
    """Cut a tokenized text into units.

    A unit begins at BOS, at the token after it, where `word_starts` says so, and where `given` changes: the missing
    rest of a word that is given in part is a unit of its own. A unit is a keyword when one of its tokens is, and as
    rare as its rarest token. A sentence ends with a unit whose last token is in `sentence_ends`.

    Args:
        tokens: Token ids, `[T]` integers, BOS first.
        word_starts: Boolean table over the vocabulary, `[V]`; None makes every token a unit (pieces).
        sentence_ends: Boolean table over the vocabulary, `[V]`.
        given: True for tokens that the caller supplies, `[T]`; BOS is given whatever it says.
        keywords: True for tokens of keywords, `[T]`.
        token_rarity: Float table over the vocabulary, `[V]`.
        pieces: What each entry of the vocabulary says, see `piece_table`.

    Raises:
        ValueError: If the text is empty, flags do not match it in length, or a token lies outside a table.
    """
    if len(tokens) == 0:
        raise ValueError("a text needs at least one token (BOS), got 0 tokens")
    for name, flags in (("given", given), ("keywords", keywords)):
        if flags is not None and len(flags) != len(tokens):
            raise ValueError(f"{name} needs one flag per token, {len(tokens)}, got {len(flags)}")
    for table in (word_starts, sentence_ends, token_rarity, pieces):
        if table is not None and (tokens.min() < 0 or tokens.max() >= len(table)):
            raise ValueError(f"token ids must be in [0, {len(table)}), got {tokens.min()} to {tokens.max()}")
    starts = np.ones(len(tokens), dtype=bool) if word_starts is None else word_starts[tokens]
    starts[:2] = True
    if given is not None:
        given = given.astype(bool)
        given[0] = True
        starts[1:] |= given[1:] != given[:-1]
    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(tokens)) - 1
    sentences = None
    if sentence_ends is not None:
        ends = sentence_ends[tokens[last]]
        sentences = np.cumsum(ends) - ends
    return UnitText(
        tokens=tokens,
        unit_starts=starts,
        sentences=sentences,
        given=given,
        keywords=None if keywords is None else np.logical_or.reduceat(keywords.astype(bool), first),
        rarity=None if token_rarity is None else np.maximum.reduceat(token_rarity[tokens], first),
        pieces=None if pieces is None else [pieces[token] for token in tokens],
    )


def word_start_table(tokenizer: Any) -> np.ndarray:
    """Return a boolean table over the vocabulary, `[V]`: True where a token begins a word.

    Understands byte-level (`Ġ`), sentencepiece (`▁`) and WordPiece (`##`) vocabularies, told apart by the mark that
    most entries carry. Special tokens, and pieces whose first character is neither a letter, a digit nor a combining
    mark (punctuation), begin their own unit. Pieces that are a part of a character continue.

    Raises:
        ValueError: If no entry carries a known mark.
    """
    pieces, style = _vocabulary(tokenizer)
    mark = "##" if style == "##" else style
    starts = np.array([piece.startswith(mark) for piece in pieces])
    if style == "##":
        starts = ~starts
    for i in np.flatnonzero(~starts):
        starts[i] = _begins_with_punctuation(_plain(pieces[i], style))
    starts[_special_ids(tokenizer, len(pieces))] = True
    return starts


def sentence_end_table(tokenizer: Any, ends: str = SENTENCE_ENDS) -> np.ndarray:
    """Return a boolean table over the vocabulary, `[V]`: True where a token ends a sentence.

    A token does when its text, closing quotes and brackets aside, ends with a character of `ends`. Special tokens
    do not.

    Raises:
        ValueError: If no entry of the vocabulary carries a known mark.
    """
    pieces, style = _vocabulary(tokenizer)
    table = np.array([_plain(piece, style).rstrip(CLOSING_MARKS).endswith(tuple(ends)) for piece in pieces])
    table[_special_ids(tokenizer, len(pieces))] = False
    return table


def piece_table(tokenizer: Any) -> list[bytes]:
    """Return what each entry of the vocabulary says, V byte strings: joined, they are the text; special tokens: none.

    Raises:
        ValueError: If the vocabulary is neither byte-level nor sentencepiece: WordPiece keeps no line feeds.
    """
    pieces, style = _vocabulary(tokenizer)
    if style == "##":
        raise ValueError("a WordPiece vocabulary keeps no white space, so the text of its tokens is not known")
    special = set(tokenizer.all_special_ids)
    return [b"" if index in special else _said(piece, style) for index, piece in enumerate(pieces)]


def rarity_table(texts: Iterable[Iterable[int]], vocab_size: int) -> np.ndarray:
    """Return `-log((count_v + 1) / (total + V))` for each token v, `[V]` float64, counted over tokenized texts."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in texts:
        counts += np.bincount(np.asarray(tokens, dtype=np.int64), minlength=vocab_size)
    return -np.log((counts + 1) / (counts.sum() + vocab_size))


def _vocabulary(tokenizer: Any) -> tuple[list[str], str]:
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    counts = {mark: sum(piece.startswith(mark) for piece in pieces) for mark in ("Ġ", "▁", "##")}
    style = max(counts, key=counts.get)
    if counts[style] == 0:
        raise ValueError(
            f"no entry of the vocabulary of {type(tokenizer).__name__} begins with 'Ġ', '▁' or '##': "
            "its words cannot be told, use word_starts=None (every token a unit)"
        )
    return pieces, style


def _special_ids(tokenizer: Any, size: int) -> list[int]:
    return [i for i in tokenizer.all_special_ids if i < size]


def _byte_of() -> dict[str, int]:
    """Invert the byte-level alphabet: printable Latin-1 bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of()


def _plain(piece: str, style: str) -> str:
    """Return the text of a vocabulary entry without its mark; undecodable bytes are U+FFFD."""
    if style == "Ġ":
        if any(char not in _BYTE_OF for char in piece):
            return piece
        return _said(piece, style).decode("utf-8", errors="replace").lstrip(" ")
    if style == "▁" and BYTE_PIECE.fullmatch(piece):
        return _said(piece, style).decode("utf-8", errors="replace")
    return piece.removeprefix(style)


def _said(piece: str, style: str) -> bytes:
    """Return the bytes that an entry of a byte-level or sentencepiece vocabulary stands for."""
    if style == "Ġ":
        known = all(char in _BYTE_OF for char in piece)
        return bytes(_BYTE_OF[char] for char in piece) if known else piece.encode()
    byte = BYTE_PIECE.fullmatch(piece)
    # "▁" is a space wherever it stands
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _begins_with_punctuation(plain: str) -> bool:
    if not plain or plain[0] == "\ufffd":
        return False
    return not plain[0].isalnum() and not unicodedata.category(plain[0]).startswith("M")
