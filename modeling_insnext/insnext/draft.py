"""A batch of texts that grow by insertion: tokens, slots, cache, re-encoding (EBR). `generate` chooses, this writes.

Shape suffixes: R rows (texts, or hypotheses of a beam), C capacity of a row, Q new entries, G gaps, D hidden size.

Entries stand in insertion order, in the cache as everywhere. `ranks` says where an entry stands in the text as it is
now, and `following` which entry is right of it; the slot right of entry e is called slot e. Index C is the right edge
of the text.
"""

import torch

from .attention import Interval
from .cache import InsertionCache


PER_ROW = (
    "origins", "ids", "ranks", "following", "lengths", "steps", "gaps", "words_end", "minima", "maxima", "written",
    "encoded_together", "encoded_tokens", "left", "right", "slots", "keys", "state",
)  # fmt: skip


class Draft:
    """Texts under construction and everything needed to score what may be written next.

    Args:
        model: An `InsNextForInsertionLM`.
        canvas: Complete, checked canvas (see canvas), text order, right-padded.
        capacity: Most tokens a row may ever hold.
        static: Whether the cache has one shape for good (`cache_implementation="static"`).
        encoder: What encodes: the model's base model, or a compiled form of it.

    Attributes:
        ids: int64 `[R, C + 1]`, tokens in insertion order.
        ranks: int64 `[R, C + 1]`, index of each entry in the text.
        following: int64 `[R, C + 1]`, the entry right of each entry, C at the right edge.
        lengths: int64 `[R]`, tokens in each text.
        steps: int64 `[R, C + 1]`, the step at which an entry was written, -1 for given ones.
        gaps: int64 `[R, C + 1]`, gap that the slot right of each entry belongs to, -1 where it is closed.
        words_end: bool `[R, C + 1]`, whether nothing that continues a word may be written right of an entry.
        written: int64 `[R, G]`, tokens written into each gap.
        encoded_together: int64 `[R]`, b of the EBR rule: entries covered by the last encoding of the text.
        encoded_tokens: int64 `[R]`, tokens that went through the network so far.
        reencoded_at: for each row the steps after which EBR struck.
        state: `[R, D]`, hidden state of each row's last entry.
        origins: int64 `[R]`, row of the canvas that each row grew from.
    """

    def __init__(self, model, canvas, capacity: int, static: bool = False, encoder=None):
        self.model, self.head = model, model.slot_head
        self.encoder = model.model if encoder is None else encoder
        device = canvas["input_ids"].device
        R, T = canvas["input_ids"].shape
        self.capacity, self.static = capacity, static
        self.lengths = canvas["attention_mask"].sum(1)
        index_T = torch.arange(T, device=device)

        def buffer(tensor, fill, dtype=torch.long):
            wide = torch.full((R, capacity + 1), fill, dtype=dtype, device=device)
            wide[:, :T] = tensor
            return wide

        present_RT = index_T < self.lengths[:, None]
        self.ids = buffer(canvas["input_ids"], 0)
        self.ranks = buffer(index_T, 0)
        after_RT = torch.where(index_T < self.lengths[:, None] - 1, index_T + 1, capacity)
        self.following = buffer(after_RT, capacity)
        self.steps = buffer(-1, -1)
        self.gaps = buffer(torch.where(canvas["slot_mask"] & present_RT, canvas["gap_ids"], -1), -1)
        self.words_end = buffer(canvas["word_end_mask"] & present_RT, False, torch.bool)
        self.minima, self.maxima = canvas["min_gap_tokens"], canvas["max_gap_tokens"]
        self.written = torch.zeros_like(self.minima)
        self.encoded_together = torch.zeros_like(self.lengths)
        self.encoded_tokens = torch.zeros_like(self.lengths)
        self.reencoded_at = [[] for _ in range(R)]
        self.origins = torch.arange(R, device=device)
        self.step = 0

        D = model.config.hidden_size
        self.left = torch.zeros(R, capacity + 1, D, device=device, dtype=model.dtype)
        self.right, self.slots, self.keys = (torch.zeros_like(self.left) for _ in range(3))
        self.right[:, capacity] = self.head.edge_side()
        self.state = torch.zeros(R, D, device=device, dtype=model.dtype)
        self.cache = InsertionCache(R, capacity if static else None, device)
        self.encode_block(torch.arange(R, device=device), torch.zeros_like(self.lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Number of entries of the longest row (with a static cache: the capacity, so that shapes stay)."""
        return self.capacity if self.static else int(self.lengths.max())

    def texts(self, pad: int) -> torch.Tensor:
        """Return the texts as they are now, `[R, T]`, left to right, padded on the right."""
        return self._in_text_order(self.ids, pad)

    def written_at(self) -> torch.Tensor:
        """Return the step at which each token of :meth:`texts` was written, -1 for given ones, -2 for padding."""
        return self._in_text_order(self.steps, -2)

    def _in_text_order(self, values: torch.Tensor, pad: int) -> torch.Tensor:
        width = int(self.lengths.max())
        present = torch.arange(width, device=values.device) < self.lengths[:, None]
        # padding goes to a column of its own, so that it does not write over a token
        rank = torch.where(present, self.ranks[:, :width], width)
        out = values.new_full((len(self), width + 1), pad)
        return out.scatter(1, rank, values[:, :width])[:, :width].where(present, pad)

    def insert(self, slots: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Write tokens into slots, in one step; they are not encoded yet.

        Args:
            slots: int64 `[R, Q]` or wider, distinct slots of a row, by the entry left of them.
            tokens: int64 `[R, Q]`.
            counts: int64 `[R]`, how many of the Q a row really writes; the rest is ignored.
        """
        self.step += 1
        row_R = torch.arange(len(self), device=slots.device)
        for q in range(tokens.shape[1]):
            acts = q < counts
            slot, entry = slots[:, q], torch.where(acts, self.lengths, self.capacity)
            rank = self.ranks[row_R, slot] + 1
            moved = (self.ranks >= rank[:, None]) & acts[:, None]
            self.ranks += moved
            kept = self.following[row_R, self.capacity].clone()
            self.ids[row_R, entry] = tokens[:, q]
            self.ranks[row_R, entry] = rank
            self.following[row_R, entry] = self.following[row_R, slot]
            self.following[row_R, slot] = torch.where(acts, entry, self.following[row_R, slot])
            self.following[row_R, self.capacity] = kept
            self.gaps[row_R, entry] = self.gaps[row_R, slot]
            self.steps[row_R, entry] = self.step
            self.words_end[row_R, entry] = False
            gap = self.gaps[row_R, slot].clamp_min(0)
            self.written[row_R, gap] += acts.long()
            self.lengths = self.lengths + acts.long()

    def encode_new(self, counts: torch.Tensor, ratio: float | None = None, window: int | None = None) -> None:
        """Encode the last `counts` entries of each row, or, where EBR strikes, the whole text anew.

        EBR strikes in a row when more than `ratio` times the entries encoded together were written since. Rows strike
        alone.

        Args:
            counts: int64 `[R]`, entries not encoded yet, 0 for rows that rest.
            ratio: `ebr_ratio`; `None` switches EBR off.
            window: `ebr_window`; `None` encodes the whole text anew.
        """
        strikes = torch.zeros_like(counts, dtype=torch.bool)
        if ratio is not None:
            strikes = (self.lengths - self.encoded_together > ratio * self.encoded_together) & (counts > 0)
        if bool((~strikes & (counts > 0)).any()):
            self._append(torch.where(strikes, 0, counts))
        if bool(strikes.any()):
            rows = strikes.nonzero().squeeze(1)
            first = torch.zeros_like(rows)
            if window is not None:
                first = torch.minimum((self.lengths[rows] - window).clamp_min(0), self.lengths[rows] - counts[rows])
            self.encode_block(rows, first)
            for row in rows.tolist():
                self.reencoded_at[row].append(self.step)

    def _append(self, counts: torch.Tensor) -> None:
        """Encode the last `counts` entries of each row behind its cache; they see one another."""
        rows = torch.arange(len(self), device=counts.device)
        Q = int(counts.max())
        before = self.cache.lengths
        hidden, entries = self._forward(rows, self.cache, before, counts, Q)
        self.cache.advance(Q, counts)
        acts = counts > 0
        self.encoded_tokens = self.encoded_tokens + counts
        self._settle(rows[acts], entries[acts], hidden[acts])

    def encode_block(self, rows: torch.Tensor, first: torch.Tensor) -> None:
        """Encode the entries from `first` on of the given rows anew, as one block over the untouched older ones."""
        counts = self.lengths[rows] - first
        if bool((first > 0).any()):
            part = self.cache.copy_rows(rows)
            part.crop(first)
        else:
            part = InsertionCache(len(rows), self.cache.max_length, self.lengths.device)
        Q = int(counts.max())
        hidden, entries = self._forward(rows, part, first, counts, Q)
        part.advance(Q, counts)
        if len(rows) == len(self):
            self.cache = part
        else:
            self.cache.overwrite_rows(rows, part)
        self.encoded_tokens[rows] += counts
        self.encoded_together[rows] = self.lengths[rows]
        self._settle(rows, entries, hidden)

    def _forward(self, rows, cache, first, counts, Q):
        """Return hidden states `[r, Q, D]` and indices `[r, Q]` of entries from `first` on, the last one repeated."""
        offset = torch.arange(Q, device=rows.device)
        entries = first[:, None] + offset
        real = offset < counts[:, None]
        horizon = torch.where(real, (first + counts - 1)[:, None], entries)
        start = torch.where(real, 0, entries)
        ids = self.ids[rows[:, None], entries.clamp_max(self.capacity)]
        positions = self.ranks[rows][:, : cache.key_length(Q)]
        if positions.shape[1] < cache.key_length(Q):
            positions = torch.nn.functional.pad(positions, (0, cache.key_length(Q) - positions.shape[1]))
        interval = Interval(positions, start, horizon, entries)
        hidden = self.encoder(
            input_ids=ids, past_key_values=cache, interval=interval, advance_cache=False
        ).last_hidden_state
        last = torch.minimum(offset, (counts - 1).clamp_min(0)[:, None])
        index = last[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index), first[:, None] + last

    def _settle(self, rows, entries, hidden) -> None:
        """Take in the hidden states of newly encoded entries: the state, their sides, and every slot they touch."""
        self.state[rows] = hidden[:, -1]
        row_r1 = rows[:, None]
        self.left[row_r1, entries], self.right[row_r1, entries] = self.head.sides(hidden)
        touched = torch.cat([entries, self._preceding(rows, entries)], 1)
        slots = self.head.slot(self.left[row_r1, touched], self.right[row_r1, self.following[row_r1, touched]])
        self.slots[row_r1, touched] = slots
        self.keys[row_r1, touched] = self.head.key_proj(slots)

    def _preceding(self, rows, entries) -> torch.Tensor:
        """Return the entry left of each entry; of the first token of the text, itself."""
        width = int(self.lengths[rows].max())
        present = torch.arange(width, device=rows.device) < self.lengths[rows][:, None]
        rank = torch.where(present, self.ranks[rows][:, :width], width)
        by_rank = torch.zeros(len(rows), width + 1, dtype=torch.long, device=rows.device)
        by_rank.scatter_(1, rank, torch.arange(width, device=rows.device).expand(len(rows), -1))
        return by_rank.gather(1, (self.ranks[rows[:, None], entries] - 1).clamp_min(0))

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the given rows, in that order; a row may be named several times."""
        for name in PER_ROW:
            setattr(self, name, getattr(self, name)[rows])
        self.reencoded_at = [list(self.reencoded_at[row]) for row in rows.tolist()]
        self.cache.select_rows(rows)

    def open_slots(self, remaining: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which slots may be written into, bool `[R, W]`, and how many tokens of a gap, int64 `[R, G]`.

        Args:
            remaining: int64 `[R]`, tokens each row may still write.
            window: `slot_window`: only slots beside one of the last `window` written tokens, if any such is open.
        """
        W = self.width
        entry_W = torch.arange(W, device=self.ids.device)
        room = torch.where(self.maxima < 0, self.capacity, self.maxima - self.written)
        deficit = (self.minima - self.written).clamp_min(0)
        # once the minima need all that is left, they get it
        room = torch.where((remaining <= deficit.sum(1))[:, None], deficit, room)
        gaps = self.gaps[:, :W]
        allowed = (gaps >= 0) & (room.gather(1, gaps.clamp_min(0)) > 0) & (entry_W < self.lengths[:, None])
        if window is not None:
            first = (self.lengths - window)[:, None]
            beside = (entry_W >= first) | ((self.following[:, :W] >= first) & (self.following[:, :W] < self.capacity))
            written = (self.steps[:, :W] >= 0).sum(1)
            near = allowed & beside
            narrows = (written >= window) & near.any(1)
            allowed = torch.where(narrows[:, None], near, allowed)
        return allowed, room

    def slot_scores(self, allowed: torch.Tensor, may_stop: torch.Tensor) -> torch.Tensor:
        """Return the logits of the slots and, in the last column, of STOP, `[R, W + 1]`; `-inf` where not allowed."""
        query_R1D = self.head.query_proj(self.state)[:, None]
        scores = self.head.choice_logits(query_R1D, self.keys[:, : allowed.shape[1]], allowed[:, None])[:, 0]
        scores[:, -1].masked_fill_(~may_stop, -torch.inf)
        return scores

    def must_go_on(self, min_new_tokens: int) -> torch.Tensor:
        """Return, bool `[R]`, which rows may not stop yet: too few tokens written, or a gap below its minimum."""
        return (self.written.sum(1) < min_new_tokens) | (self.written < self.minima).any(1)

    def around(self, rows: torch.Tensor, slots: torch.Tensor, pad: int) -> torch.Tensor:
        """Return what logits processors see, `[r, T]`, padded on the left: the text right, then left of the slot.

        So the last token is the slot's left neighbour, every token of the text is there, and so is every n-gram but
        one; the seam holds BOS, which is never written.
        """
        width = int(self.lengths[rows].max())
        present = torch.arange(width, device=rows.device) < self.lengths[rows][:, None]
        turn = self.ranks[rows, slots] + 1
        place = (self.ranks[rows][:, :width] - turn[:, None]) % self.lengths[rows][:, None]
        place = torch.where(present, place + (width - self.lengths[rows])[:, None], width)
        out = self.ids.new_full((len(rows), width + 1), pad)
        return out.scatter(1, place, self.ids[rows][:, :width])[:, :width]
