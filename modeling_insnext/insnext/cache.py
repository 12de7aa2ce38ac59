"""Key/value cache of a text that grows by insertion.

Entries stand in insertion order and are only ever appended: a key or value computed once stays right, since the
offsets of its row never change (see attention). Rows of a batch have lengths of their own, so that some may be
re-encoded (EBR), cropped or grow by several tokens while others do not; entry e of row b lies at index e of the
buffers, right-padded by free room.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class InsertionLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers `[B, H, capacity, D]` with free room at the end."""

    is_compileable = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor, capacity: int = 0) -> None:
        B, H, _, D = key_states.shape
        self.keys = key_states.new_zeros(B, H, capacity, D)
        self.values = value_states.new_zeros(B, H, capacity, value_states.shape[-1])
        self.is_initialized = True

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor, entries_BQ: torch.Tensor, capacity: int):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states, capacity)
        elif self.keys.shape[2] < capacity:
            self.keys, self.values = (grown(buffer, capacity) for buffer in (self.keys, self.values))
        index_B1Q1 = entries_BQ[:, None, :, None]
        self.keys.scatter_(2, index_B1Q1.expand(key_states.shape), key_states)
        self.values.scatter_(2, index_B1Q1.expand(value_states.shape), value_states)

    def update(self, key_states, value_states, *args, **kwargs):
        raise TypeError("an InsertionLayer is written through its InsertionCache, which knows the rows' lengths")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1


class InsertionCache(Cache):
    """Append-only cache with one length a row. For inference: it does not carry gradients.

    Args:
        batch_size: Number of rows B.
        max_length: Entries a row can ever hold. Given, the buffers are allocated once and every step sees tensors of
            the same shape (for `torch.compile` and captured graphs); `None` lets them grow by doubling.
        device: Where the lengths live; the buffers follow the keys they are given.

    Attributes:
        lengths: int64 `[B]`, entries held by each row.
        turned: Copies of the keys as rotary steps read them, None where there are none (see rotary_step).
    """

    def __init__(self, batch_size: int, max_length: int | None = None, device=None):
        super().__init__(layer_class_to_replicate=InsertionLayer)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.max_length = max_length
        self.turned = None
        self._longest, self._written = 0, None

    @property
    def longest(self) -> int:
        """Entries in use of the longest row; a bound of it between two measurements while rows grow unevenly."""
        return self._longest if self.max_length is None else int(self.lengths.max())

    def entries(self, new_tokens: int) -> torch.Tensor:
        """Return the indices at which the next `new_tokens` tokens of each row will stand, int64 `[B, Q]`."""
        return self.lengths[:, None] + torch.arange(new_tokens, device=self.lengths.device)

    def key_length(self, new_tokens: int) -> int:
        """Return the number of keys K that a forward pass over `new_tokens` more tokens sees."""
        return self._longest + new_tokens if self.max_length is None else self.max_length

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Write the new keys and values behind each row's own entries and return all `K` of them.

        Raises:
            ValueError: If a row would outgrow `max_length`.
        """
        Q = key_states.shape[2]
        if layer_idx == 0:
            if self.max_length is not None and not torch.compiler.is_compiling():
                if self.longest + Q > self.max_length:
                    raise ValueError(
                        f"the cache holds at most {self.max_length} entries a row, got {self.longest} + {Q}"
                    )
            self._written = None
        while len(self.layers) <= layer_idx:
            self.layers.append(self.layer_class_to_replicate())
        layer = self.layers[layer_idx]
        held = layer.get_seq_length()
        needed = self.key_length(Q)
        layer.write(key_states, value_states, self._columns(Q), needed if needed <= held else max(needed, 2 * held))
        return layer.keys[:, :, :needed], layer.values[:, :, :needed]

    def _columns(self, new_tokens: int) -> torch.Tensor:
        # the layers of one pass write into the same columns; what a compiled graph makes is not kept outside of it
        if torch.compiler.is_compiling():
            return self.entries(new_tokens)
        if self._written is None:
            self._written = self.entries(new_tokens)
        return self._written

    def advance(self, new_tokens: int, counts: torch.Tensor | None = None) -> None:
        """Count the tokens just written: `new_tokens` in every row, or `counts` `[B]` of them, the rest padding."""
        self.lengths = self.lengths + (new_tokens if counts is None else counts)
        if self.max_length is None:
            self._longest += new_tokens

    def crop(self, lengths: torch.Tensor) -> None:
        """Forget the entries of each row from `lengths` `[B]` on."""
        self.lengths = torch.minimum(self.lengths, lengths.to(self.lengths.device))
        self._measure()

    def keep_entries(self, entries: torch.Tensor) -> None:
        """Keep the given entries `[E]` of every row, in that order, without a gap between them."""
        held = len(entries)
        for layer in self.layers:
            layer.keys[:, :, :held], layer.values[:, :, :held] = layer.keys[:, :, entries], layer.values[:, :, entries]
        self.lengths = torch.full_like(self.lengths, held)
        self._measure()

    def put_back(self, kept: torch.Tensor, removed: torch.Tensor, columns: list[tuple]) -> None:
        """Undo `keep_entries(kept)` of every row, whatever was written since.

        Args:
            kept: Entries `[E]` that were kept.
            removed: Entries `[F]` that were not.
            columns: What `columns(removed)` returned before.
        """
        for layer, (keys, values) in zip(self.layers, columns, strict=True):
            for buffer, column in ((layer.keys, keys), (layer.values, values)):
                buffer[:, :, kept] = buffer[:, :, : len(kept)].clone()
                buffer[:, :, removed] = column
        self.lengths = torch.full_like(self.lengths, len(kept) + len(removed))
        self._measure()

    def columns(self, entries: torch.Tensor) -> list[tuple]:
        """Return copies of the keys and values of some entries `[E]` of every row, layer by layer."""
        return [(layer.keys[:, :, entries], layer.values[:, :, entries]) for layer in self.layers]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the given rows, in that order; a row may be named several times."""
        self.lengths, turned = self.lengths[rows], self.turned
        # columns in use, or a bound of them, before rows are measured anew
        used = self.key_length(0)
        for layer in self.layers:
            layer.keys, layer.values = (selected(buffer, rows, used) for buffer in (layer.keys, layer.values))
        self._measure()
        if turned is not None:
            turned.select_rows(rows, used)
            self.turned = turned

    def overwrite_rows(self, rows: torch.Tensor, other: "InsertionCache") -> None:
        """Replace whole rows by the rows of another cache."""
        self.lengths[rows] = other.lengths
        self._measure()
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            width = min(other.longest, theirs.keys.shape[2])
            if mine.keys.shape[2] < width:
                mine.keys, mine.values = (grown(buffer, width) for buffer in (mine.keys, mine.values))
            mine.keys[rows, :, :width] = theirs.keys[:, :, :width]
            mine.values[rows, :, :width] = theirs.values[:, :, :width]

    def copy_rows(self, rows: torch.Tensor) -> "InsertionCache":
        """Return a cache of its own that holds copies of the given rows."""
        copy = InsertionCache(len(rows), self.max_length, self.lengths.device)
        copy.lengths = self.lengths[rows]
        for layer in self.layers:
            twin = InsertionLayer()
            twin.keys, twin.values, twin.is_initialized = layer.keys[rows], layer.values[rows], True
            copy.layers.append(twin)
        copy._measure()
        return copy

    def _measure(self) -> None:
        """Measure the rows once they have changed otherwise than by growing; turned keys do not outlive that."""
        self.turned = None
        if self.max_length is None:
            self._longest = int(self.lengths.max()) if len(self.lengths) else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.longest

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(repeats))


def grown(buffer: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return a longer buffer `[B, H, capacity, D]` that begins with this one."""
    grown = buffer.new_zeros(*buffer.shape[:2], capacity, buffer.shape[3])
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


def selected(buffer: torch.Tensor, rows: torch.Tensor, used: int) -> torch.Tensor:
    """Return a buffer `[B, H, capacity, D]` that holds its given rows, in that order.

    Where the number of rows stays, it is the same buffer: only rows that move are copied, and of them the columns that
    are in use.
    """
    if len(rows) != len(buffer):
        return buffer[rows]
    moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
    if len(moved) > 0:
        part = buffer[:, :, :used]
        part.index_copy_(0, moved, part.index_select(0, rows[moved]))
    return buffer


__all__ = ["InsertionCache"]
