"""A draft of one text that is edited: tokens come and go in any place, and the cache closes ranks.

What is left of an edited text keeps its keys and values, computed when it saw another text. An entry's row is exact
for the text as it stood when it was encoded, whatever has come or gone since: the definition, which tests hold
against one pass over the whole history.

Shape suffixes as in draft, with one row: N entries that stand in the text.
"""

import copy
from dataclasses import dataclass

import torch

from .budget import Budget
from .canvas import Canvas
from .draft import NUMBERS as ENTRY_NUMBERS
from .draft import PER_ROW, VECTORS, Draft


NUMBERS = (*ENTRY_NUMBERS, "changed_at")


@dataclass
class Work:
    """What went through the network.

    Attributes:
        tokens: Tokens, each time that it read them.
        passes: How often it was called.
    """

    tokens: int = 0
    passes: int = 0


@dataclass
class Removed:
    """What one replacement took away: enough to put it back, bit by bit.

    Attributes:
        kept: Entries that stayed, `[M]`.
        taken: Entries that did not, `[F]`.
        columns: Keys and values of `taken`, layer by layer.
        vectors: `VECTORS` of `taken` and, last, of the token left of the place, whose slot was another.
        numbers: `NUMBERS` of all entries, and `changes`, as they were.
        encoded_together: As it was.
    """

    kept: torch.Tensor
    taken: torch.Tensor
    left: int
    columns: list[tuple]
    vectors: dict[str, torch.Tensor]
    numbers: dict[str, torch.Tensor]
    changes: int
    encoded_together: torch.Tensor


class LiveDraft(Draft):
    """One text, encoded as a whole when it is made, of which any part can be replaced.

    Args:
        model: An `InsNextForInsertionLM`.
        ids: Tokens of the text, the first of which stays.
        work: Counts what is encoded.

    Attributes:
        changes: Tokens that came or went so far.
        changed_at: int64 `[1, C + 1]`, `changes` when an entry was encoded.
    """

    def __init__(self, model, ids: list[int], work: Work):
        self.work, self.changes = work, 0
        self.changed_at = torch.zeros(1, len(ids) + 2, dtype=torch.long, device=model.device)
        input_ids = torch.tensor([ids], device=model.device)
        canvas = Canvas.from_ids(input_ids, slot_mask=torch.zeros_like(input_ids, dtype=torch.bool))
        super().__init__(model, canvas, Budget(canvas, torch.zeros_like(canvas.lengths)))

    @property
    def size(self) -> int:
        """Number of entries N."""
        return int(self.lengths)

    def order(self) -> torch.Tensor:
        """Return the entries from left to right, int64 `[N]`."""
        return self.ranks[0, : self.size].argsort()

    def staleness(self) -> torch.Tensor:
        """Return for each token, from left to right, how many came or went since it was encoded, int64 `[N]`."""
        return self.changes - self.changed_at[0, self.order()]

    def replace(self, first: int, last: int, tokens: list[int]) -> Removed:
        """Put tokens in the place of those from `first` to before `last` of the text; they are encoded as one block.

        They see one another and all that stands in the text then. Nothing else is encoded.

        Args:
            first: At least 1: what begins the text stays.
            last: At least `first`; nothing is removed where it is the same.
            tokens: May be empty.
        """
        order = self.order()
        taken, left = order[first:last].sort().values, int(order[first - 1])
        mask = torch.ones(self.size, dtype=torch.bool, device=order.device)
        mask[taken] = False
        removed = self._note(mask.nonzero().squeeze(1), taken, left)
        try:
            self._exchange(removed, first, tokens)
        except BaseException:
            self.restore(removed)
            raise
        return removed

    def _exchange(self, removed: Removed, first: int, tokens: list[int]) -> None:
        kept, taken = removed.kept, removed.taken
        self.changes += len(taken) + len(tokens)
        if len(taken):
            self._close_ranks(kept, taken, first)
        self._append_ids(first, tokens)
        self._relink()
        if tokens:
            self._append(torch.full_like(self.lengths, len(tokens)))
        else:
            left = (kept == removed.left).nonzero()
            self._make_slots(self.origins[:, None], left)

    def restore(self, removed: Removed) -> None:
        """Undo a replacement, whatever other ones were made and undone since: every bit is what it was."""
        kept, taken = removed.kept, removed.taken
        size = len(kept) + len(taken)
        for name in VECTORS:
            buffer = getattr(self, name)
            buffer[:, kept] = buffer[:, : len(kept)].clone()
            buffer[:, [*taken.tolist(), removed.left]] = removed.vectors[name]
        for name in NUMBERS:
            getattr(self, name)[:, :size] = removed.numbers[name]
        self.cache.put_back(kept, taken, removed.columns)
        self.lengths = torch.full_like(self.lengths, size)
        self.changes, self.encoded_together = removed.changes, removed.encoded_together
        self._relink()

    def clone(self) -> "LiveDraft":
        """Return a draft of its own in the same state."""
        twin = copy.copy(self)
        for name in {*PER_ROW, "changed_at"}:
            setattr(twin, name, getattr(self, name).clone())
        twin.cache = self.cache.copy_rows(torch.zeros_like(self.lengths))
        return twin

    def open(self, canvas: Canvas, budget: Budget, config) -> None:
        """Let the gaps of a canvas of the same tokens be written into.

        Args:
            canvas: One row.
            budget: What may be written.
            config: Its `parallel_slots` and `reading_order` count.
        """
        N = self.size
        self._reserve(N + int(budget.limit) + config.parallel_slots)
        self.reading_order = config.reading_order
        ranks = self.ranks[:, :N]
        self.gaps[:, :N] = canvas.gap_ids.gather(1, ranks)
        self.words_end[:, :N] = canvas.word_end_mask.gather(1, ranks)
        self.steps[:, :N], self.keywords[:, :N] = -1, -1
        self.budget, self.step = budget, 1
        self.running = torch.ones_like(self.running)
        self.reencoded_at, self.reencoded_tokens = [[]], [[]]

    def close(self) -> None:
        """Let nothing be written any more."""
        self.gaps[:], self.words_end[:] = -1, False

    def write(self, slots: torch.Tensor, tokens: torch.Tensor, acts: torch.Tensor) -> None:
        super().write(slots, tokens, acts)
        self.changes += int(acts.sum())

    def _note(self, kept, taken, left: int) -> Removed:
        return Removed(
            kept,
            taken,
            left,
            self.cache.columns(taken),
            {name: getattr(self, name)[:, [*taken.tolist(), left]] for name in VECTORS},
            {name: getattr(self, name)[:, : self.size].clone() for name in NUMBERS},
            self.changes,
            self.encoded_together.clone(),
        )

    def _close_ranks(self, kept, taken, first: int) -> None:
        """Take entries out of every buffer and of the cache; they stood side by side from rank `first` on."""
        for name in (*NUMBERS, *VECTORS):
            buffer = getattr(self, name)
            buffer[:, : len(kept)] = buffer[:, kept]
        self.ranks[:, : len(kept)] -= torch.where(self.ranks[:, : len(kept)] > first, len(taken), 0)
        self.encoded_together = self.encoded_together - (taken < self.encoded_together).sum()
        self.cache.keep_entries(kept)
        self.lengths = torch.full_like(self.lengths, len(kept))

    def _append_ids(self, first: int, tokens: list[int]) -> None:
        """Add entries that stand from rank `first` on, closed on either side."""
        N, count = self.size, len(tokens)
        self._reserve(N + count)
        self.ranks[:, :N] += torch.where(self.ranks[:, :N] >= first, count, 0)
        new = slice(N, N + count)
        self.ranks[:, new] = torch.arange(first, first + count, device=self.ids.device)
        self.ids[:, new] = torch.tensor(tokens, dtype=torch.long, device=self.ids.device)
        self.steps[:, new], self.gaps[:, new], self.keywords[:, new], self.words_end[:, new] = -1, -1, -1, False
        self.lengths = self.lengths + count

    def _relink(self) -> None:
        """Set who stands right of whom by the ranks."""
        order = self.order()
        self.following[0, order] = torch.cat([order[1:], order.new_tensor([self.capacity])])

    def _reserve(self, capacity: int) -> None:
        """Make room for entries, twice what there was if it is too little; the right edge stays the last of them."""
        if capacity <= self.capacity:
            return
        old, self.capacity = self.capacity, max(capacity, 2 * self.capacity)
        for name in (*NUMBERS, *VECTORS):
            buffer = getattr(self, name)
            grown = buffer.new_zeros(1, self.capacity + 1, *buffer.shape[2:])
            grown[:, :old] = buffer[:, :old]
            grown[:, self.capacity] = buffer[:, old]
            setattr(self, name, grown)
        self._relink()

    def _forward(self, rows, cache, first, counts, Q):
        self.work.tokens += int(counts.sum())
        self.work.passes += 1
        return super()._forward(rows, cache, first, counts, Q)

    def _settle(self, rows, entries, hidden) -> None:
        super()._settle(rows, entries, hidden)
        self.changed_at[0, entries[0]] = self.changes


__all__ = ["LiveDraft", "Work"]
