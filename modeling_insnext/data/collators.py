"""Batches of texts in insertion order, for `Trainer` or any loop.

B rows, N tokens a row in insertion order. A text is laid out as given tokens in text order, then the written units in
the order drawn, each unit's pieces left to right; the state at a step is that of the token before it. Several texts
share a row, isolated by `start`, where packing is on. Without packing, one text of five tokens (BOS, three given, then
two pieces of one word at text position 2):

    input_ids   <s>  a   c   b1   b2   <pad>
    positions    0   1   4    2    3    0
    horizon      2   2   2    3    4    5
    labels       .   .   .   b1   b2    .
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .contexts import ContextMixture
from .orders import OrderMixture, OrderSpec, get_mixture
from .units import UnitText, cut_text


IGNORE_INDEX = -100
PLAIN = ContextMixture(), get_mixture("left_to_right")


@dataclass(eq=False)
class InsertionCollator:
    """Make the batch of `InsNextForInsertionLM.forward` from tokenized texts.

    A feature is a mapping with `input_ids` (`[T]` integers; BOS first) and, optional, `given` (`[T]` bool: tokens the
    caller supplies), `complete` (bool, default True; False for a document cut at its end: STOP is not supervised),
    `keywords` (`[T]` bool: tokens of keywords), `pass_number` (integer, added to the epoch; see `Passes`) and
    `progress` (float in [0, 1], default 1: where in the training). Other keys are ignored, so `Trainer` needs
    `remove_unused_columns=False` where the optional ones are used.

    What is drawn for a text depends on `seed`, the epoch, its tokens and how often the same text came before in the
    same call, and on nothing else: not on the worker, the batch, or what was collated before. `Trainer` resumes by
    skipping indices, without collating what it skips, so a generator that counted calls would not resume. Call
    `set_epoch` before each epoch, as with a distributed sampler; else every epoch repeats the draws of the first.

    Returns a dictionary of tensors `[B, N]`, N in insertion order: `input_ids`, `positions`, `start`, `horizon`,
    `labels` (-100 for tokens of a block and for pads), `stop_targets`, `target_kinds` (0 hard, 1 proportional to
    missing units, 2 equal), `unit_starts`, `step_weights`.

    Args:
        pad_token_id: Token of the padding on the right.
        order: A name, a callable, or a weighted mixture of these; see `orders.get_mixture`.
        contexts: How contexts and blocks are drawn.
        left_to_right_share: Share of texts that are written left to right without a drawn context or block, at the
            beginning of a training and at its end, linear in `progress`; the others are drawn as `order` and
            `contexts` say.
        word_starts: Boolean table over the vocabulary, see `units.word_start_table`; None makes every token a unit.
        sentence_ends: Boolean table over the vocabulary, for the order `sentence_local`.
        token_rarity: Float table over the vocabulary, for keywords by rarity.
        pieces: What each entry of the vocabulary says, see `units.piece_table`; for the order `program_lines`.
        bos_token_id: Put in front of texts that do not begin with it.
        eos_token_id: Taken off the end of texts that end with it: STOP says it.
        pack_to: Fill rows of that many tokens with whole texts, first fit.
        pad_to_multiple_of: Round the length of the rows up.
        max_length: Longest text, BOS included; `pack_to` bounds it too.
        truncate: Cut longer texts at the bound, as not complete, instead of refusing them.
        context_step_weight: Weight of the first supervised step after a block of two or more tokens.
        seed: Seed of all draws.

    Raises:
        ValueError: For a bad option, and on a call for an empty batch or text, a text that is too long, flags of
            another length than the text, a negative or special token inside a text.
        TypeError: If tokens are not integers.
    """

    pad_token_id: int
    order: OrderSpec = "uniform"
    contexts: ContextMixture = ContextMixture()
    left_to_right_share: tuple[float, float] = (0.0, 0.0)
    word_starts: np.ndarray | None = None
    sentence_ends: np.ndarray | None = None
    token_rarity: np.ndarray | None = None
    pieces: Sequence[bytes] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pack_to: int | None = None
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    truncate: bool = False
    context_step_weight: float = 1.0
    seed: int = 0
    mixture: OrderMixture = field(init=False, repr=False)
    _epoch: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self):
        for name in ("pack_to", "pad_to_multiple_of", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.truncate and self.max_length is None and self.pack_to is None:
            raise ValueError("truncate=True needs max_length or pack_to, got neither")
        shares = self.left_to_right_share
        if len(shares) != 2 or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"left_to_right_share must be two shares in [0, 1], got {shares}")
        if not 0 <= self.context_step_weight < float("inf"):
            raise ValueError(f"context_step_weight must be finite and at least 0, got {self.context_step_weight}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")
        for name in ("word_starts", "sentence_ends"):
            table = getattr(self, name)
            if table is not None and (table.dtype != bool or table.ndim != 1):
                raise ValueError(f"{name} must be a boolean table [V], got {table.dtype} {table.shape}")
        rarity = self.token_rarity
        if rarity is not None and (rarity.dtype.kind != "f" or rarity.ndim != 1):
            raise ValueError(f"token_rarity must be a float table [V], got {rarity.dtype} {rarity.shape}")
        self.mixture = get_mixture(self.order)
        # shared, so that persistent workers see the epoch too
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew: other orders and contexts for the same texts, a function of `seed` and `epoch`."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self._epoch.fill_(epoch)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if len(features) == 0:
            raise ValueError("a batch needs at least one text, got 0 features")
        texts = [self._read(feature) for feature in features]
        seen, pieces = Counter(), []
        for (text, complete), feature in zip(texts, features, strict=True):
            digest = hashlib.blake2b(text.tokens.tobytes(), digest_size=16).digest()
            epoch = self.epoch + int(feature.get("pass_number", 0))
            rng = np.random.default_rng([self.seed, epoch, seen[digest], int.from_bytes(digest, "little")])
            seen[digest] += 1
            pieces.append(self._lay_out(text, complete, float(feature.get("progress", 1.0)), rng))
        return self._stack(pieces)

    def _read(self, feature: Mapping[str, Any]) -> tuple[UnitText, bool]:
        """Check a feature and cut it into units; returns the text and whether its end is real."""
        if "input_ids" not in feature:
            raise ValueError(f"a feature needs input_ids, got {sorted(feature)}")
        tokens = np.asarray(feature["input_ids"])
        if tokens.size == 0:
            raise ValueError("a text needs at least one token (BOS), got 0 tokens")
        if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
            raise TypeError(f"input_ids must be one list of integers, got {tokens.dtype} of shape {tokens.shape}")
        if tokens.min() < 0:
            raise ValueError(f"token ids must be at least 0, got {tokens.min()}")
        flags = {}
        for name in ("given", "keywords"):
            if feature.get(name) is not None:
                flags[name] = np.asarray(feature[name]).astype(bool)
                if flags[name].shape != tokens.shape:
                    raise ValueError(f"{name} needs one flag per token, {len(tokens)}, got {flags[name].shape}")
        tokens, flags = self._normalize(tokens.astype(np.int64), flags)
        complete = bool(feature.get("complete", True))
        limit = min(bound for bound in (self.max_length, self.pack_to, len(tokens)) if bound is not None)
        if len(tokens) > limit:
            if not self.truncate:
                raise ValueError(f"a text must have at most {limit} tokens (max_length, pack_to), got {len(tokens)}")
            tokens, complete = tokens[:limit], False
            flags = {name: values[:limit] for name, values in flags.items()}
        self._refuse_special(tokens, flags.get("given"))
        tables = (self.word_starts, self.sentence_ends, flags.get("given"), flags.get("keywords"), self.token_rarity)
        return cut_text(tokens, *tables, self.pieces), complete

    def _normalize(self, tokens: np.ndarray, flags: dict) -> tuple[np.ndarray, dict]:
        """Put BOS in front, take EOS off the end, and move the flags along."""
        if self.eos_token_id is not None and len(tokens) > 1 and tokens[-1] == self.eos_token_id:
            tokens, flags = tokens[:-1], {name: values[:-1] for name, values in flags.items()}
        if self.bos_token_id is not None and tokens[0] != self.bos_token_id:
            tokens = np.append(self.bos_token_id, tokens)
            flags = {name: np.append(False, values) for name, values in flags.items()}
        return tokens, flags

    def _refuse_special(self, tokens: np.ndarray, given: np.ndarray | None) -> None:
        """BOS, EOS and PAD are never written, so a text may hold them as its first or as given tokens only."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            found = tokens[1:] == getattr(self, name)
            if given is not None:
                found &= ~given[1:]
            if found.any():
                raise ValueError(
                    f"{name} is never written, so only a given token may be one, got {getattr(self, name)} "
                    f"at index {found.argmax() + 1} of a text of {len(tokens)} tokens"
                )

    def _recipe(self, progress: float, rng: np.random.Generator) -> tuple[ContextMixture, OrderMixture]:
        """Return how a text is drawn: plainly left to right, or as contexts and orders say."""
        first, last = self.left_to_right_share
        share = first + (last - first) * progress
        if share and rng.random() < share:
            return PLAIN
        return self.contexts, self.mixture

    def _lay_out(self, text: UnitText, complete: bool, progress: float, rng: np.random.Generator) -> dict:
        """Draw context, order and blocks of one text; returns its columns of the batch, `[T]` in insertion order."""
        contexts, mixture = self._recipe(progress, rng)
        given_units = contexts.draw_given(text, rng)
        units, unit_kinds = mixture.draw(text, given_units, rng)
        context, written = text.tokens_of(np.flatnonzero(given_units)), text.tokens_of(units)
        positions = np.concatenate([context, written])
        num_tokens = len(positions)
        joined, window = contexts.draw_blocks(len(written), rng)
        first_end = len(context) + joined
        first_label = first_end + window
        horizon = np.arange(num_tokens)
        horizon[:first_end] = first_end - 1
        horizon[first_end:first_label] = first_label - 1
        tokens = text.tokens[positions]
        supervised = np.arange(num_tokens) >= first_label
        kinds = np.zeros(num_tokens, dtype=np.int64)
        kinds[len(context) :][text.unit_starts[written]] = unit_kinds
        weights = np.ones(num_tokens, dtype=np.float32)
        if first_label > 1:
            weights[first_label : first_label + 1] = self.context_step_weight
        return {
            "input_ids": tokens,
            "positions": positions,
            "start": np.zeros(num_tokens, dtype=np.int64),
            "horizon": horizon,
            "labels": np.where(supervised, tokens, IGNORE_INDEX),
            "stop_targets": (np.arange(num_tokens) == num_tokens - 1) & complete,
            "target_kinds": np.where(supervised, kinds, 0),
            "unit_starts": text.unit_starts[positions],
            "step_weights": weights,
        }

    def _stack(self, texts: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Put texts into rows and pad the rows on the right."""
        lengths = [len(text["input_ids"]) for text in texts]
        if self.pack_to is None:
            width, places = max(lengths), [(row, 0) for row in range(len(texts))]
        else:
            width, places = self.pack_to, first_fit(lengths, self.pack_to)
        width += -width % (self.pad_to_multiple_of or 1)
        num_rows = 1 + max(row for row, _ in places)
        batch = {
            name: np.zeros((num_rows, width), dtype=np.int64)
            for name in ("input_ids", "positions", "start", "horizon", "labels")
        }
        batch["input_ids"][:] = self.pad_token_id
        batch["start"][:] = batch["horizon"][:] = np.arange(width)
        batch["labels"][:] = IGNORE_INDEX
        batch["stop_targets"] = np.zeros((num_rows, width), dtype=bool)
        batch["target_kinds"] = np.zeros((num_rows, width), dtype=np.int64)
        batch["unit_starts"] = np.zeros((num_rows, width), dtype=bool)
        batch["step_weights"] = np.zeros((num_rows, width), dtype=np.float32)
        for text, length, (row, offset) in zip(texts, lengths, places, strict=True):
            for name, column in text.items():
                shift = offset if name in ("start", "horizon") else 0
                batch[name][row, offset : offset + length] = column + shift if shift else column
        return {name: torch.from_numpy(columns) for name, columns in batch.items()}


def first_fit(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Return (row, offset) of each text: the first row of `width` tokens with room for it, after what is there.

    Raises:
        ValueError: If a text is longer than a row.
    """
    if max(lengths) > width:
        raise ValueError(f"a text must fit into a row of {width} tokens, got {max(lengths)}")
    used = np.full(len(lengths), 0)
    places = []
    for length in lengths:
        row = int(np.argmax(used + length <= width))
        places.append((row, int(used[row])))
        used[row] += length
    return places
