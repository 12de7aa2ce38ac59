"""The cache of a DRT model: a window of self-attention keys, the chunk memory, and the chunk in progress.

Its size on the device does not grow with the text but for the landmarks, if keys and values of chunks are kept in host
memory or on disk. Rows may stand at different places of a chunk; everything that has a time axis ends at a row's last
position (right-aligned).
"""

import copy
import os

import torch
from transformers.cache_utils import Cache

from .layout import Layout, shift_rows
from .memory import ChunkMemory, Fetch
from .retrieval import Retrieved


# what decides the shape and meaning of what a cache holds
MADE_FOR = (
    "hidden_size",
    "num_key_value_heads",
    "head_dim",
    "num_lower_layers",
    "retrieval_groups",
    "chunk_size",
    "num_retrieved_chunks",
    "cross_attention_layers",
    "keys_per_layer",
    "sliding_window",
    "num_sink_tokens",
    "landmark_source",
    "retriever",
    "retrieval_by",
    "self_attention",
    "position_encoding",
)


class Tail:
    """The last entries of B sequences along one dimension, right-aligned, at most `limit` of them.

    `valid[b]` is how many of the places of row b, counted from the right, hold something.
    """

    def __init__(self, limit: int | None, dim: int = 1):
        self.limit, self.dim = limit, dim
        self.tensor: torch.Tensor | None = None
        self.valid: list[int] = []

    @property
    def places(self) -> int:
        return 0 if self.tensor is None else self.tensor.shape[self.dim]

    def joined(self, new: torch.Tensor) -> torch.Tensor:
        """Return what is held, followed by `new`."""
        return new if self.tensor is None else torch.cat([self.tensor, new], dim=self.dim)

    def keep(self, joined: torch.Tensor, lengths: list[int]) -> None:
        """Keep the end of `joined`, of whose new entries the first `lengths[b]` are row b's."""
        held = self.places
        valid = self.valid or [0] * len(lengths)
        most = max(n + m for n, m in zip(valid, lengths, strict=True))
        places = most if self.limit is None else min(most, self.limit)
        kept = shift_rows(joined, [held + n - places for n in lengths], places, self.dim)
        # a view would keep all of a long input alive
        self.tensor = kept.clone() if joined.shape[self.dim] > 2 * places else kept
        self.valid = [min(n + m, places) for n, m in zip(valid, lengths, strict=True)]

    def drop(self, counts: list[int]) -> None:
        """Drop the last `counts[b]` entries of each row."""
        self.tensor = shift_rows(self.tensor, [-n for n in counts], self.places, self.dim)
        self.valid = [max(n - m, 0) for n, m in zip(self.valid, counts, strict=True)]

    def fork(self) -> "Tail":
        """Return a tail of the same entries; tensors are replaced, never written."""
        twin = Tail(self.limit, self.dim)
        twin.tensor, twin.valid = self.tensor, list(self.valid)
        return twin

    def select_rows(self, indices: torch.Tensor) -> None:
        if self.tensor is not None:
            self.tensor = self.tensor.index_select(0, indices.to(self.tensor.device))
            self.valid = [self.valid[row] for row in indices.tolist()]

    def nbytes(self) -> int:
        return 0 if self.tensor is None else self.tensor.untyped_storage().nbytes()


class ChunkMemoryCache(Cache):
    """Past of a DRT model.

    Args:
        config: Configuration of the model.
        location: Where keys and values of past chunks lie: `"device"`, `"host"` (pinned where there is a GPU),
            `"disk"` (a memory-mapped file), or `"auto"`: the first of these in whose free memory they take at most
            half, reckoned when the first tokens are read from what `prefill` or `generate` is about to read.
        folder: Folder of that file; the system's temporary folder by default.
        search: `"exact"`, or `"faiss"`: as exact, but on the CPU, with the landmarks in host memory.
        crop_margin: How many tokens :meth:`crop` may remove once more than a window has been read. They cost
            memory of so many positions a layer.

    Raises:
        ValueError: If a choice is unknown or `crop_margin` is negative.
        ImportError: If faiss is asked for and not installed.
    """

    def __init__(
        self,
        config,
        location: str = "device",
        folder: str | os.PathLike | None = None,
        search: str = "exact",
        crop_margin: int | None = None,
    ):
        super().__init__(layers=[])
        crop_margin = config.chunk_size if crop_margin is None else crop_margin
        if crop_margin < 0:
            raise ValueError(f"crop_margin must be at least 0, got {crop_margin}")
        if search not in ("exact", "faiss"):
            raise ValueError(f'search must be "exact" or "faiss", got {search!r}')
        if search == "faiss":
            from .search import require_faiss

            require_faiss()
        self.grid, self.window = config.grid, config.sliding_window
        # what a model must have in common with the one that this cache is for
        self.made_for = {name: getattr(config, name) for name in MADE_FOR}
        self.dtype: torch.dtype | None = None
        self.keys = [Tail(None, dim=2) for _ in range(config.num_hidden_layers)]
        self.values = [Tail(None, dim=2) for _ in range(config.num_hidden_layers)]
        # keys and values of the first positions, which stay visible
        self.sinks = [Tail(None, dim=3) for _ in range(config.num_hidden_layers if config.num_sink_tokens else 0)]
        # lower states (and features of a fixed retriever) of the chunk in progress
        self.states = Tail(None)
        self.found = [(Tail(None), Tail(None)) for _ in config.retrieval_groups]
        self.served: list[Fetch | None] = [None] * len(config.retrieval_groups)
        self.memory = ChunkMemory(location, folder, search)
        self.seen: list[int] = []
        self.columns = 0
        # of a row, as far as somebody knows before they are read
        self.expected_tokens = 0
        self.recent = Tail(None)
        self._set_limits(crop_margin)

    def _set_limits(self, crop_margin: int) -> None:
        """Keep from now on what :meth:`crop` needs to remove so many tokens."""
        self.crop_margin = crop_margin
        self.margin = self.grid.positions(crop_margin) + 1 if crop_margin else 0
        for tail in (*self.keys, *self.values):
            tail.limit = None if self.window is None else self.window - 1 + self.margin
        self.states.limit = self.grid.length - 1 + self.margin
        for tail in (tail for pair in self.found for tail in pair):
            tail.limit = 1 + -(-self.margin // self.grid.length)
        self.recent.limit = None if self.window is None else crop_margin + self.window

    def allow_crop(self, tokens: int) -> None:
        """Let :meth:`crop` remove so many of the tokens read from now on; `generate` asks for what it drafts."""
        if tokens > self.crop_margin:
            self._set_limits(tokens)

    def check(self, config, dtype: torch.dtype, rows: int) -> None:
        """Check that what is held can be gone on from.

        Raises:
            ValueError: If the cache is for another configuration, was filled in another data type, or holds another
                number of rows.
        """
        for name, held in self.made_for.items():
            if held != getattr(config, name):
                raise ValueError(
                    f"the cache is for a model of another configuration: {name} is {held!r} in it, "
                    f"{getattr(config, name)!r} in the model"
                )
        if self.dtype not in (None, dtype):
            raise ValueError(f"the cache was filled in {self.dtype}, got a model in {dtype}")
        self.dtype = dtype
        if self.seen and len(self.seen) != rows:
            held = len(self.seen)
            way = f": call batch_repeat_interleave({rows // held}) on it before" if rows % held == 0 else ""
            raise ValueError(f"the cache holds {held} rows, got input of {rows} rows{way}")

    def expect(self, tokens: int) -> None:
        """Say how many tokens of a row are about to be read; `location="auto"` goes by it."""
        self.expected_tokens = max(self.expected_tokens, self.columns + tokens)

    def begin(self, rows: int, chunk_shape, landmark_width: int, dtype, device) -> None:
        """Set up for so many rows; called by the model before the first columns are read."""
        if not self.columns and self.served:
            expected = rows * (self.expected_tokens // self.grid.chunk_size)
            self.memory.begin(rows, chunk_shape, landmark_width, dtype, device, expected)

    def append(self, layer: int, key_BGLD, value_BGLD, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values of the new slots to a layer's window; return remembered and new ones together."""
        joined = []
        for tail, new in ((self.keys[layer], key_BGLD), (self.values[layer], value_BGLD)):
            joined.append(tail.joined(new))
            tail.keep(joined[-1], lengths)
        return tuple(joined)

    def retrieved_for_current(self, group: int) -> Retrieved | None:
        """Return what serves the chunk in progress, `[B, 1, K]`; `None` before the first retrieval."""
        chunks, weights = self.found[group]
        if chunks.tensor is None:
            return None
        return Retrieved(chunks.tensor[:, -1:], weights.tensor[:, -1:])

    def keep_retrieved(self, group: int, joined: Retrieved, completed: list[int]) -> None:
        """Remember what serves the chunk in progress from now on; `joined` begins with what served until now.

        Its chunks are sent for at once: they are read in the next forward pass.
        """
        if not any(completed) and self.found[group][0].tensor is not None:
            return
        for tail, tensor in zip(self.found[group], joined, strict=True):
            tensor = tensor.detach()
            tensor = torch.cat([tail.tensor[:, :-1], tensor], 1) if tail.tensor is not None else tensor
            if tail.tensor is None:
                tail.tensor, tail.valid = tensor[:, :1], [1] * len(completed)
            tail.keep(tensor, completed)
        if any(completed):
            self.served[group] = self.memory.fetch(self.found[group][0].tensor[:, -1:])

    def read(self, group: int, retrieved: Retrieved) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys, values and indices of what serves the chunk in progress; fetched once a chunk."""
        if self.served[group] is None:
            self.served[group] = self.memory.fetch(retrieved.chunks_BCK)
        return self.memory.read(retrieved.chunks_BCK, self.served[group])

    def advance(self, layout: Layout, columns: int) -> None:
        """Count the columns of a forward pass, once everything has been kept."""
        after = [self.grid.tokens(end) for end in layout.ends]
        real = layout.real_BQ
        if real is None:
            real = torch.ones((len(after), columns), dtype=torch.bool)
        self.recent.keep(self.recent.joined(real.cpu()), [columns] * len(after))
        self.seen, self.columns = after, self.columns + columns
        for fetch in self.served:
            if fetch is not None:
                fetch.send()

    # what Transformers asks a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns read, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.seen)

    @property
    def is_sliding(self) -> list[bool]:
        return [self.window is not None] * len(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"ChunkMemoryCache(tokens={self.seen}, location={self.memory.location!r})"

    def named_tails(self) -> dict[str, Tail]:
        """Return everything with a time axis, by the name it has in a file."""
        named = {f"keys.{i}": tail for i, tail in enumerate(self.keys)}
        named |= {f"values.{i}": tail for i, tail in enumerate(self.values)}
        named |= {f"sinks.{i}": tail for i, tail in enumerate(self.sinks)}
        for group, (chunks, weights) in enumerate(self.found):
            named |= {f"found.{group}.chunks": chunks, f"found.{group}.weights": weights}
        return {**named, "states": self.states, "recent": self.recent}

    def fork(self, rows: int = 1) -> "ChunkMemoryCache":
        """Return a cache behind the same text that goes on by itself: one for each question to a book.

        Chunks and landmarks are shared, and what either reads from now on is its own. Windows are copied only where
        one of the two changes them. `rows` repeats every row, for a batch of questions.
        """
        twin = type(self).__new__(type(self))
        twin.__dict__ = dict(self.__dict__)
        for name in ("keys", "values", "sinks"):
            setattr(twin, name, [tail.fork() for tail in getattr(self, name)])
        twin.found = [(chunks.fork(), weights.fork()) for chunks, weights in self.found]
        twin.states, twin.recent = self.states.fork(), self.recent.fork()
        twin.served = [copy.copy(fetch) for fetch in self.served]
        twin.memory, twin.seen = self.memory.fork(), list(self.seen)
        if rows > 1:
            twin.batch_repeat_interleave(rows)
        return twin

    def __deepcopy__(self, memo: dict) -> "ChunkMemoryCache":
        """Return a cache of its own; keys and values on disk are copied to another file."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            setattr(twin, name, [None] * len(value) if name == "served" else copy.deepcopy(value, memo))
        return twin

    def _select_rows(self, indices: torch.Tensor) -> None:
        indices = indices.cpu()
        for tail in self.named_tails().values():
            tail.select_rows(indices)
        if self.memory.slab is not None:
            self.memory.select_rows(indices)
        for fetch in self.served:
            if fetch is not None:
                fetch.select_rows(indices)
        self.seen = [self.seen[row] for row in indices.tolist()]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Put row `beam_idx[b]` at b. Chunks stay where they are; rows share them."""
        if self.seen and beam_idx.tolist() != list(range(len(self.seen))):
            self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; the repeated rows share their chunks."""
        self._select_rows(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows."""
        self._select_rows(torch.arange(len(self.seen))[indices.cpu()])

    def reset(self) -> None:
        """Forget everything."""
        for tail in self.named_tails().values():
            tail.tensor, tail.valid = None, []
        self.memory = ChunkMemory(self.memory.location, self.memory.folder, self.memory.search)
        self.served = [None] * len(self.served)
        self.seen, self.columns, self.dtype = [], 0, None

    def activate_past_recording(self) -> None:
        """Nothing to do: `crop_margin` tokens can be taken back at any time."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns; as for every cache of Transformers the number is negative.

        Raises:
            ValueError: If the number is positive, or what lies before them is no longer held (see `crop_margin`).
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        columns = -tokens_to_remove
        if not columns:
            return
        if columns > self.columns:
            raise ValueError(f"crop can remove at most the {self.columns} tokens there are, got {columns}")
        if columns > self.recent.places:
            raise ValueError(self._crop_rule(columns))
        removed = self.recent.tensor[:, self.recent.places - columns :].sum(1).tolist()
        seen = [n - m for n, m in zip(self.seen, removed, strict=True)]
        before, after = ([self.grid.positions(n) for n in counts] for counts in (self.seen, seen))
        slots = [n - m for n, m in zip(before, after, strict=True)]
        P = self.grid.length
        chunks = [n // P - m // P for n, m in zip(before, after, strict=True)]
        self._check_crop(columns, slots, after, chunks)
        for tail in (*self.keys, *self.values, self.states):
            if tail.tensor is not None:
                tail.drop(slots)
        for tail in (tail for pair in self.found for tail in pair):
            if tail.tensor is not None:
                tail.drop(chunks)
        self.recent.drop([columns] * len(seen))
        if self.memory.slab is not None:
            self.memory.forget(chunks)
        if any(chunks):
            self.served = [None] * len(self.served)
        self.seen, self.columns = seen, self.columns - columns

    def _crop_rule(self, columns: int) -> str:
        return (
            f"crop can remove at most crop_margin={self.crop_margin} tokens of a text longer than the window, got "
            f"{columns}: make the cache with a larger crop_margin"
        )

    def _check_crop(self, columns, slots, after, chunks) -> None:
        P = self.grid.length
        for row, (gone, end) in enumerate(zip(slots, after, strict=True)):
            window = end if self.window is None else min(self.window - 1, end)
            short = any(t.tensor is not None and t.valid[row] - gone < window for t in self.keys)
            short |= self.states.tensor is not None and self.states.valid[row] - gone < end % P
            short |= any(t.tensor is not None and t.valid[row] <= chunks[row] for t, _ in self.found)
            if short:
                raise ValueError(self._crop_rule(columns))

    def device_bytes(self) -> int:
        """Bytes this cache holds on the device."""
        held = sum(tail.nbytes() for tail in self.named_tails().values() if tail is not self.recent)
        served = sum(fetch.nbytes() for fetch in self.served if fetch is not None)
        return held + served + (self.memory.device_bytes() if self.memory.slab is not None else 0)

    def host_bytes(self) -> int:
        """Bytes of keys and values of past chunks in host memory or in the file."""
        return self.memory.host_bytes() if self.memory.slab is not None else 0

    def save(self, path: str | os.PathLike, model) -> None:
        """Write everything to one file, first under a temporary name; see :func:`cache_file.save_cache`."""
        from .cache_file import save_cache

        save_cache(self, path, model)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model,
        location: str = "disk",
        folder: str | os.PathLike | None = None,
        search: str = "exact",
    ) -> "ChunkMemoryCache":
        """Read a file of :meth:`save`; see :func:`cache_file.load_cache`."""
        from .cache_file import load_cache

        return load_cache(cls, path, model, location, folder, search)


__all__ = ["ChunkMemoryCache"]
