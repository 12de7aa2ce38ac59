"""A batch of texts that grow by insertion: tokens, slots, cache, re-encoding (EBR). `generate` chooses, this writes.

Shape suffixes: R rows (texts, or hypotheses of a beam), C capacity of a row, Q new entries, W entries of the longest
row, D hidden size.

Entries stand in insertion order, in the cache as everywhere. `ranks` says where an entry stands in the text as it is
now, and `following` which entry is right of it; the slot right of entry e is called slot e. Index C is the right edge
of the text.
"""

import torch

from .attention import Interval
from .cache import InsertionCache
from .pending import Pending, TokenSets


# buffers `[R, C + 1]` and `[R, C + 1, D]` with a column for each entry
NUMBERS = ("ids", "ranks", "following", "steps", "gaps", "words_end", "keywords")
VECTORS = ("left", "right", "slots", "keys", "hidden")
PER_ROW = ("origins", "margins", "running", "lengths", "encoded_together", "encoded_tokens", *NUMBERS, *VECTORS)


class Draft:
    """Texts under construction and everything needed to score what may be written next.

    Rows stay where they are from the first step to the last: what is finished rests, so that whoever looks on sees
    the rows of the batch, all of them and in order.

    Args:
        model: An `InsNextForInsertionLM`.
        canvas: Complete, checked canvas (see canvas), text order, right-padded.
        budget: What may be written into it.
        parallel: Most tokens that a row writes in one step.
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
        keywords: int64 `[R, C + 1]`, the pending keyword that an entry was written for, -1 for all others.
        pending: the keywords that are to be written, None without any.
        encoded_together: int64 `[R]`, b of the EBR rule: entries covered by the last encoding of the text.
        encoded_tokens: int64 `[R]`, tokens that went through the network so far.
        reencoded_at: for each row the steps after which EBR struck.
        reencoded_tokens: for each row how many tokens it encoded anew each time.
        hidden: `[R, C + 1, D]`, hidden state of each encoded entry.
        origins: int64 `[R]`, row of the canvas that each row grew from.
        margins: int64 `[R]`, padding that stood left of the given tokens.
        running: bool `[R]`, rows that still grow.
        pad: what stands left and right of a text.
        reading_order: whether the slot left of a token closes once that is written.
        step: number of the step, from 1, that the next tokens belong to.
    """

    def __init__(self, model, canvas, budget, parallel: int = 1, static: bool = False, encoder=None):
        self.model, self.head, self.budget = model, model.slot_head, budget
        self.encoder = model.model if encoder is None else encoder
        self.causal_blocks = model.config.block_attention == "causal"
        device = canvas.input_ids.device
        R, T = canvas.input_ids.shape
        # never changed in place: what was measured of them holds for this very tensor
        self.lengths = canvas.lengths
        self._measured = None, 0
        self.capacity, self.static = int((self.lengths + budget.limit).max()) + parallel, static
        index_T = torch.arange(T, device=device)

        def buffer(tensor, fill, dtype=torch.long):
            wide = torch.full((R, self.capacity + 1), fill, dtype=dtype, device=device)
            wide[:, :T] = tensor
            return wide

        present_RT = index_T < self.lengths[:, None]
        self.ids = buffer(canvas.input_ids, 0)
        self.ranks = buffer(index_T, 0)
        after_RT = torch.where(index_T < self.lengths[:, None] - 1, index_T + 1, self.capacity)
        self.following = buffer(after_RT, self.capacity)
        self.steps = buffer(-1, -1)
        self.gaps = buffer(torch.where(canvas.slot_mask & present_RT, canvas.gap_ids, -1), -1)
        self.words_end = buffer(canvas.word_end_mask & present_RT, False, torch.bool)
        self.keywords = buffer(-1, -1)
        self.pending = None if canvas.pending_ids is None else Pending(canvas)
        self.encoded_together = torch.zeros_like(self.lengths)
        self.encoded_tokens = torch.zeros_like(self.lengths)
        self.reencoded_at, self.reencoded_tokens = [[] for _ in range(R)], [[] for _ in range(R)]
        self.origins = torch.arange(R, device=device)
        self.margins = torch.zeros_like(self.lengths)
        self.running = torch.ones_like(self.lengths, dtype=torch.bool)
        self.pad = model.config.pad_token_id or 0
        self.reading_order = False
        self.step = 0

        D = model.config.hidden_size
        self.left = torch.zeros(R, self.capacity + 1, D, device=device, dtype=model.dtype)
        self.right, self.slots, self.keys, self.hidden = (torch.zeros_like(self.left) for _ in range(4))
        self.right[:, self.capacity] = self.head.edge_side()
        self.cache = InsertionCache(R, self.capacity if static else None, device)
        self.encode_block(torch.arange(R, device=device), torch.zeros_like(self.lengths))
        self.step = 1

    @classmethod
    def start(cls, model, canvas, budget, config, attention_mask=None) -> "Draft":
        """Return the encoded canvas of a `generate` call: `num_beams` or `num_return_sequences` rows a text.

        Args:
            model: As above, likewise canvas and budget.
            config: The options.
            attention_mask: `[B, T]` as it was given, with the padding on the left that the texts keep.
        """
        static = config.cache_implementation == "static"
        draft = cls(model, canvas, budget, config.parallel_slots, static, step_encoder(model, config, static))
        draft.pad = draft.pad if config.pad_token_id is None else config.pad_token_id
        draft.reading_order = config.reading_order
        if attention_mask is not None:
            draft.margins = attention_mask.to(draft.ids.device).long().argmax(1)
        copies = config.num_beams if config.num_beams > 1 else config.num_return_sequences
        if copies > 1:
            draft.select_rows(torch.arange(len(draft), device=draft.ids.device).repeat_interleave(copies))
        return draft

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def state(self) -> torch.Tensor:
        """The hidden state of each row's last encoded entry, `[R, D]`."""
        return self.hidden[torch.arange(len(self), device=self.ids.device), self.cache.lengths - 1]

    @property
    def width(self) -> int:
        """Number of entries of the longest row (with a static cache: the capacity, so that shapes stay)."""
        return self.capacity if self.static else self.longest

    @property
    def longest(self) -> int:
        """Number of entries of the longest row; of the same lengths the device is asked once."""
        if self._measured[0] is not self.lengths:
            self._measured = self.lengths, int(self.lengths.max())
        return self._measured[1]

    def token_sets(self, slots: torch.Tensor) -> TokenSets | None:
        """Return what tokens mean in one slot of each row, `[R]`; None where no keywords are pending."""
        return None if self.pending is None else self.pending.token_sets(self, slots)

    def texts(self) -> torch.Tensor:
        """Return the texts as they are now, `[R, T]`, left to right, each behind the padding it was given with."""
        width = self.longest
        present = torch.arange(width, device=self.ids.device) < self.lengths[:, None]
        # padding goes to a column of its own, so that it does not write over a token
        total = int((self.lengths + self.margins).max())
        place = torch.where(present, self.ranks[:, :width] + self.margins[:, None], total)
        out = self.ids.new_full((len(self), total + 1), self.pad)
        return out.scatter(1, place, self.ids[:, :width])[:, :total]

    def texts_as_lists(self, rows: torch.Tensor) -> list[list[int]]:
        """Return the tokens of some texts, left to right, without padding."""
        columns = (self.texts()[rows], self.margins[rows], self.margins[rows] + self.lengths[rows])
        return [text[first:end] for text, first, end in zip(*(column.tolist() for column in columns), strict=True)]

    def write(self, slots: torch.Tensor, tokens: torch.Tensor, acts: torch.Tensor) -> None:
        """Write a token into a slot of each row that acts; it is not encoded yet.

        Args:
            slots: int64 `[R]`, by the entry left of them; a slot is written into once before the text is encoded.
            tokens: int64 `[R]`.
            acts: bool `[R]`, rows that write.
        """
        entry_R1 = torch.where(acts, self.lengths, self.capacity)[:, None]
        slot_R1, acts_R1, counts = slots[:, None], acts[:, None], acts.long()
        rank_R1 = self.ranks.gather(1, slot_R1) + 1
        after_R1, gap_R1 = self.following.gather(1, slot_R1), self.gaps.gather(1, slot_R1)
        kept = self.following[:, self.capacity].clone()
        self.ranks += (self.ranks >= rank_R1) & acts_R1
        self.ids.scatter_(1, entry_R1, tokens[:, None])
        self.ranks.scatter_(1, entry_R1, rank_R1)
        self.following.scatter_(1, entry_R1, after_R1)
        self.following.scatter_(1, slot_R1, torch.where(acts_R1, entry_R1, after_R1))
        self.following[:, self.capacity] = kept
        self.gaps.scatter_(1, entry_R1, gap_R1)
        if self.reading_order:
            self.gaps.scatter_(1, slot_R1, torch.where(acts_R1, -1, gap_R1))
        self.steps.scatter_(1, entry_R1, self.step)
        self.words_end.scatter_(1, entry_R1, False)
        self.budget.take(gap_R1.squeeze(1), counts)
        self.lengths = self.lengths + counts
        if self.pending is not None:
            self.pending.advance(self, slots, entry_R1.squeeze(1), acts)

    def encode(self, config) -> None:
        """Encode what was written since the last call or, where EBR strikes, the whole text anew; this ends a step.

        EBR strikes in a row when more than `ebr_ratio` times the entries encoded together were written since. Rows
        strike alone. With `ebr_window` only the last entries are encoded anew.

        Args:
            config: Its `ebr`, `ebr_ratio` and `ebr_window` count.
        """
        counts, rows = self.lengths - self.cache.lengths, ()
        if config.ebr:
            strikes = self.lengths - self.encoded_together > config.ebr_ratio * self.encoded_together
            rows = (strikes & (counts > 0)).nonzero().squeeze(1)
        self._append(counts if len(rows) == 0 else counts.index_fill(0, rows, 0))
        if len(rows) > 0:
            first = torch.zeros_like(rows)
            if config.ebr_window is not None:
                first = torch.minimum(
                    (self.lengths[rows] - config.ebr_window).clamp_min(0), self.lengths[rows] - counts[rows]
                )
            self.encode_block(rows, first)
            for row, count in zip(rows.tolist(), (self.lengths[rows] - first).tolist(), strict=True):
                self.reencoded_at[row].append(self.step)
                self.reencoded_tokens[row].append(count)
        self.step += 1

    def _append(self, counts: torch.Tensor) -> None:
        """Encode the last `counts` entries of each row behind its cache, if there are any; they see one another."""
        asked, lengths = torch.stack([counts, self.lengths]).tolist()
        self._measured = self.lengths, max(lengths)
        Q, all_act = max(asked), min(asked) > 0
        if Q == 0:
            return
        rows = torch.arange(len(self), device=counts.device)
        hidden, entries = self._forward(rows, self.cache, self.cache.lengths, counts, Q)
        self.cache.advance(Q, counts)
        self.encoded_tokens = self.encoded_tokens + counts
        if not all_act:
            acts = counts > 0
            rows, entries, hidden = rows[acts], entries[acts], hidden[acts]
        self._settle(rows, entries, hidden)

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
        positions = self.ranks[:, : cache.key_length(Q)][rows]
        if positions.shape[1] < cache.key_length(Q):
            positions = torch.nn.functional.pad(positions, (0, cache.key_length(Q) - positions.shape[1]))
        # behind a cache the tokens of a causal block are missing left of some keys that are there
        ranked = Q == 1 or not self.causal_blocks or not bool((first > 0).any())
        interval = Interval(positions, start, horizon, entries, ranked)
        hidden = self.encoder(
            input_ids=ids, past_key_values=cache, interval=interval, advance_cache=False
        ).last_hidden_state
        if Q == 1:
            return hidden, entries
        last = torch.minimum(offset, (counts - 1).clamp_min(0)[:, None])
        index = last[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index), first[:, None] + last

    def _settle(self, rows, entries, hidden) -> None:
        """Take in the hidden states of newly encoded entries: their sides, and every slot they touch."""
        row_r1 = rows[:, None]
        self.hidden[row_r1, entries] = hidden
        self.left[row_r1, entries], self.right[row_r1, entries] = self.head.sides(hidden)
        self._make_slots(row_r1, torch.cat([entries, self._preceding(rows, entries)], 1))

    def _make_slots(self, row_r1, entries) -> None:
        """Make the slots right of entries `[r, E]` from the sides of the tokens around them."""
        slots = self.head.slot(self.left[row_r1, entries], self.right[row_r1, self.following[row_r1, entries]])
        self.slots[row_r1, entries] = slots
        self.keys[row_r1, entries] = self.head.key_proj(slots)

    def _preceding(self, rows, entries) -> torch.Tensor:
        """Return the entry left of each entry; of the first token of the text, itself."""
        if entries.shape[1] == 1:
            # no room behind a text and no right edge has an entry on its right
            return (self.following[rows, : self.capacity] == entries).int().argmax(1, keepdim=True)
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
        for name in ("reencoded_at", "reencoded_tokens"):
            setattr(self, name, [list(getattr(self, name)[row]) for row in rows.tolist()])
        self.budget.select_rows(rows)
        if self.pending is not None:
            self.pending.select_rows(rows)
        self.cache.select_rows(rows)

    def room(self, slots: torch.Tensor) -> torch.Tensor:
        """Return how many tokens the gaps of the given slots `[R, S]` may still take, 0 where a slot is closed."""
        gaps = self.gaps.gather(1, slots)
        if not self.budget.is_bounded:
            return torch.where(gaps >= 0, self.budget.remaining[:, None], 0)
        return torch.where(gaps >= 0, self.budget.room().gather(1, gaps.clamp_min(0)), 0)

    def open_slots(self, window: int | None) -> torch.Tensor:
        """Return which slots may be written into, bool `[R, W]`.

        Args:
            window: `slot_window`: only slots beside one of the last `window` written tokens, if any such is open.
        """
        W = self.width
        entry_RW = torch.arange(W, device=self.ids.device).expand(len(self), W)
        lengths = self.lengths[:, None]
        allowed = (self.room(entry_RW) > 0) & (entry_RW < lengths) & self.running[:, None]
        if window is not None:
            first, following = lengths - window, self.following[:, :W]
            near = allowed & ((entry_RW >= first) | ((following >= first) & (following < self.capacity)))
            written = (self.steps[:, :W] >= 0).sum(1)
            narrows = (written >= window) & near.any(1)
            allowed = torch.where(narrows[:, None], near, allowed)
        return allowed

    def choices(self, config, at_stop: bool = False) -> torch.Tensor:
        """Return the logits of every slot and, in the last column, of STOP, `[R, W + 1]`; `-inf` where not allowed.

        A row that rests may only stop.

        Args:
            config: Its `slot_window` counts.
            at_stop: Whether rows with pending keywords may choose STOP, to have one written then; see `Pending`.
        """
        allowed, may_stop = self.open_slots(config.slot_window), ~self.budget.must_go_on()
        if self.pending is not None:
            allowed, may_stop = self.pending.choices(self, allowed, may_stop, at_stop)
        return self.slot_scores(allowed, may_stop=may_stop | ~allowed.any(1))

    def slot_scores(self, allowed: torch.Tensor, may_stop: torch.Tensor) -> torch.Tensor:
        """Return the logits of the slots and, in the last column, of STOP, `[R, W + 1]`; `-inf` where not allowed."""
        query_R1D = self.head.query_proj(self.state)[:, None]
        scores = self.head.choice_logits(query_R1D, self.keys[:, : allowed.shape[1]], allowed[:, None])[:, 0]
        scores[:, -1].masked_fill_(~may_stop, -torch.inf)
        return scores

    def around(self, slots: torch.Tensor) -> torch.Tensor:
        """Return what logits processors see, `[R, T]`, padded on the left: the text right, then left of the slot.

        So the last token is the slot's left neighbour, every token of the text is there, and so is every n-gram but
        one; the seam holds BOS, which is never written. Nor is what stands in the padding, so that a processor which
        counts tokens counts none of a wider neighbour.

        Args:
            slots: int64 `[R]`.
        """
        never = self.model.config.never_inserted
        pad = self.pad if self.pad in never or not never else never[0]
        width = self.longest
        lengths = self.lengths[:, None]
        present = torch.arange(width, device=self.ids.device) < lengths
        turn = self.ranks.gather(1, slots[:, None]) + 1
        place = torch.where(present, (self.ranks[:, :width] - turn) % lengths + width - lengths, width)
        out = self.ids.new_full((len(self), width + 1), pad)
        return out.scatter(1, place, self.ids[:, :width])[:, :width]

    def last_slots(self) -> torch.Tensor:
        """Return the slot at the right edge of each text, int64 `[R]`."""
        present = torch.arange(self.capacity + 1, device=self.ids.device) < self.lengths[:, None]
        return ((self.following == self.capacity) & present).int().argmax(1)


def step_encoder(model, config, static: bool):
    """Return what encodes: with a static cache, on GPUs or if a `compile_config` asks, single tokens run compiled."""
    asked = config.compile_config is not None
    if not static or config.disable_compile or not (asked or model.device.type == "cuda"):
        return model.model
    if not hasattr(model, "_compiled_encoder"):
        options = config.compile_config.to_dict() if asked else {}
        # set past nn.Module, which would take it for a submodule and save it
        object.__setattr__(model, "_compiled_encoder", torch.compile(model.model, **options))

    def encode(input_ids, **kwargs):
        # blocks have a length of their own each time, which would be compiled anew
        encoder = model._compiled_encoder if input_ids.shape[1] == 1 else model.model
        return encoder(input_ids=input_ids, **kwargs)

    return encode
