"""How tokenizers write the start of a word: "Ġ" in byte-level BPE, "▁" in sentencepiece, no "##" in WordPiece."""

import re
import unicodedata
import weakref
from collections.abc import Collection
from typing import NamedTuple

import torch


JOINERS = frozenset("'’-‐‑_")
# the ids of anchor + text are cut after the anchor, by the first of these that stays apart from the text
ANCHORS = ("\n", ".", ",", "|", "x", "q", "z", "a", "e", "o", "s", "1")
BYTE_LEVEL, METASPACE, WORDPIECE = "Ġ", "▁", "##"


class Pieces(NamedTuple):
    """What a vocabulary tells about words."""

    size: int
    scheme: str
    continuation_mask_V: torch.Tensor


def continuation_mask_of(tokenizer, vocab_size: int | None = None) -> torch.Tensor:
    """Return which of `vocab_size` entries glue to the word on their left, bool `[V]`; made once a tokenizer.

    Args:
        tokenizer: Byte-level BPE: pieces without a space whose first character belongs to words, or is a part of a
            character. Sentencepiece: the same without "▁". WordPiece: pieces with "##". Special tokens never.
        vocab_size: Length of the result, at least the highest id + 1; None: exactly that.

    Raises:
        ValueError: If the tokenizer has more entries than `vocab_size`.
    """
    mask_V = _pieces(tokenizer).continuation_mask_V
    if vocab_size is None:
        return mask_V.clone()
    if vocab_size < len(mask_V):
        raise ValueError(
            f"vocabulary mismatch: the tokenizer has ids up to {len(mask_V) - 1}, the model {vocab_size} entries"
        )
    return torch.nn.functional.pad(mask_V, (0, vocab_size - len(mask_V)))


def _pieces(tokenizer) -> Pieces:
    pieces = _PIECES.get(tokenizer)
    if pieces is None or pieces.size != len(tokenizer):
        vocab = tokenizer.get_vocab()
        scheme = _scheme(vocab)
        special = set(tokenizer.all_special_ids)
        added = set(tokenizer.get_added_vocab().values())
        mask_V = torch.zeros(max(vocab.values()) + 1, dtype=torch.bool)
        for piece, index in vocab.items():
            mask_V[index] = index not in special and _glues(piece, scheme, literal=index in added)
        pieces = _PIECES[tokenizer] = Pieces(len(tokenizer), scheme, mask_V)
    return pieces


def text_of(tokenizer, ids) -> str:
    """Return what tokens say, with special ones and with every space."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def text_behind(tokenizer, before: list[int], ids: list[int]) -> str:
    """Return what tokens say behind others: a tokenizer may take a space off the beginning of what it decodes."""
    base, whole = text_of(tokenizer, before), text_of(tokenizer, [*before, *ids])
    return whole[len(base) :] if whole.startswith(base) else text_of(tokenizer, ids)


_PIECES = weakref.WeakKeyDictionary()


def _scheme(vocab: Collection[str]) -> str:
    """Return the mark with which the vocabulary tells the start of a word, or "" if it has none."""
    counts = {mark: sum(piece.startswith(mark) for piece in vocab) for mark in (BYTE_LEVEL, METASPACE, WORDPIECE)}
    mark = max(counts, key=counts.get)
    return mark if counts[mark] else ""


def _glues(piece: str, scheme: str, literal: bool) -> bool:
    if scheme in (WORDPIECE, ""):
        return scheme == WORDPIECE and piece.startswith(WORDPIECE)
    if scheme == BYTE_LEVEL and not literal and _BYTE_OF.keys() >= set(piece):
        return _starts_inside_word(bytes(_BYTE_OF[character] for character in piece))
    if scheme == METASPACE and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return _starts_inside_word(bytes([int(piece[3:5], 16)]))
    return _starts_inside_word(piece.encode())


def _starts_inside_word(data: bytes) -> bool:
    if not data:
        return False
    width = 1 + (data[0] >= 0xC0) + (data[0] >= 0xE0) + (data[0] >= 0xF0)
    try:
        first, rest = data[:width].decode(), data[width:].decode(errors="replace")
    except UnicodeDecodeError:
        return True
    if first in JOINERS:
        # two hyphens are a dash between words
        return not rest or rest[0].isalnum()
    return first.isalnum() or unicodedata.category(first).startswith("M")


def _byte_of_character() -> dict[str, int]:
    """Return the inverse of the table with which byte-level BPE writes bytes as printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_of_character()


def token_ids(tokenizer, text: str) -> list[int]:
    """Return the ids of `text` without special tokens around it; one that it spells means its letters."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def ids_inside_text(tokenizer, text: str) -> list[int]:
    """Return the ids of `text` as they are in the middle of a text: no space is added, nothing merges to the left.

    Raises:
        ValueError: If the tokenizer merges `text` with everything that may stand before it.
    """
    scheme = _pieces(tokenizer).scheme
    if scheme in (WORDPIECE, "") and not text[0].isalnum():
        return token_ids(tokenizer, text)
    for anchor in ANCHORS:
        # WordPiece writes "##" only behind a letter
        if scheme != WORDPIECE or anchor.isalnum():
            anchor_ids = token_ids(tokenizer, anchor)
            ids = token_ids(tokenizer, anchor + text)
            kept_apart = anchor_ids and ids[: len(anchor_ids)] == anchor_ids
            if kept_apart and tokenizer.unk_token_id not in anchor_ids:
                return ids[len(anchor_ids) :]
    raise ValueError(f"the tokenizer has no way to write {text!r} after other text without merging the two")


__all__ = ["continuation_mask_of", "ids_inside_text", "text_behind", "text_of", "token_ids"]
