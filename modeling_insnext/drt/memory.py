"""The chunk memory: keys, values and landmarks of every complete chunk, on the device, in host memory or on disk.

All rows share one slab of chunks, `[N, 2, G, S, D]` (keys, then values). A row is a table of places in it: what is
written never changes, so beams and returned sequences share their prompt, and reordering rows moves numbers only.
Landmarks stay on the device; they are what a retrieval searches. (With faiss they lie in host memory.)

Shape suffixes: B rows, C chunks that ask, K chunks found, N places of the slab, G key heads, S tokens a chunk, D
width.
"""

import errno
import hashlib
import os
import re
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .retrieval import best_chunks, gumbel_like, wide_scores


LOCATIONS = ("device", "host", "disk")
SMALLEST_EXTENT = 64
# bytes; pinned memory is handed out in powers of two
LARGEST_EXTENT = 1 << 30
# bytes that are copied at a time where chunks leave or enter a slab as a whole
PIECE = 1 << 24


class DeviceSlab:
    """Chunks on the device, read in place; grown by doubling."""

    frozen = 0

    def __init__(self, chunk_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.chunk_shape, self.dtype, self.device = tuple(chunk_shape), dtype, torch.device(device)
        self.chunks = torch.empty((0, *chunk_shape), dtype=dtype, device=device)

    def reserve(self, places: int) -> None:
        held = self.chunks.shape[0]
        if places > held:
            grown = self.chunks.new_empty((max(places, 2 * held, SMALLEST_EXTENT), *self.chunk_shape))
            grown[:held] = self.chunks
            self.chunks = grown

    def write(self, place: int, chunks: torch.Tensor) -> None:
        self.chunks[place : place + chunks.shape[0]] = chunks

    def gather(self, places_N: torch.Tensor) -> torch.Tensor:
        """Return the chunks at these places, on the device."""
        return self.chunks.index_select(0, places_N.to(self.device))

    def device_bytes(self) -> int:
        return self.chunks.nbytes

    def host_bytes(self) -> int:
        return 0


class HostSlab:
    """Chunks in (pinned) host memory, in extents that never move; what is asked for is gathered and copied at once."""

    def __init__(self, chunk_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.chunk_shape, self.dtype, self.device = tuple(chunk_shape), dtype, torch.device(device)
        self.starts, self.parts = [], []
        # places before this one must not be written
        self.frozen = 0
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def places(self) -> int:
        return self.starts[-1] + self.parts[-1].shape[0] if self.parts else 0

    @property
    def chunk_bytes(self) -> int:
        return int(np.prod(self.chunk_shape)) * self.dtype.itemsize

    def reserve(self, places: int) -> None:
        held = self.places
        if places > held:
            # at most a quarter lies idle, in some 40 extents a GiB
            spare = min(held // 4, LARGEST_EXTENT // self.chunk_bytes)
            self.add_extent(self.allocate(max(places - held, spare, SMALLEST_EXTENT)))

    def add_extent(self, part: torch.Tensor) -> None:
        self.starts.append(self.places)
        self.parts.append(part)

    def allocate(self, places: int) -> torch.Tensor:
        return self.staging(places)

    def staging(self, places: int) -> torch.Tensor:
        return torch.empty((places, *self.chunk_shape), dtype=self.dtype, pin_memory=self.stream is not None)

    def write(self, place: int, chunks: torch.Tensor) -> None:
        if self.stream is not None and chunks.is_cuda:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            chunks.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            for start, part in zip(self.starts, self.parts, strict=True):
                low, high = max(place, start), min(place + chunks.shape[0], start + part.shape[0])
                if low < high:
                    part[low - start : high - start].copy_(chunks[low - place : high - place], non_blocking=True)

    def gather(self, places_N: torch.Tensor) -> torch.Tensor:
        """Return the chunks at these places, which must ascend, in (pinned) host memory."""
        if self.stream is not None:
            # what is still being written must be there before the CPU reads
            self.stream.synchronize()
        staging = self.staging(len(places_N))
        bounds = torch.searchsorted(places_N, torch.tensor([*self.starts, self.places])).tolist()
        for start, part, low, high in zip(self.starts, self.parts, bounds, bounds[1:], strict=False):
            if low < high:
                torch.index_select(part, 0, places_N[low:high] - start, out=staging[low:high])
        return staging

    def device_bytes(self) -> int:
        return 0

    def host_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def chunk_checksums(chunks: torch.Tensor) -> torch.Tensor:
    """Return eight bytes of BLAKE2b over the bytes of each chunk, int64 `[N]`."""
    if not len(chunks):
        return torch.zeros(0, dtype=torch.int64)
    rows = chunks.detach().cpu().contiguous().view(len(chunks), -1).view(torch.uint8).numpy()
    digests = (hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


class SavedChunks(NamedTuple):
    """Chunks in a file: their checksums, if it has any, and which have been compared with them."""

    path: str | os.PathLike
    checksums_N: torch.Tensor | None
    checked_N: torch.Tensor

    def check(self, places_N: torch.Tensor, chunks: torch.Tensor) -> None:
        """Compare those of the chunks that lie in the file and were not read before.

        Raises:
            ValueError: If one is not what was written.
        """
        new = places_N < len(self.checked_N)
        new &= ~self.checked_N[places_N.clamp_max(len(self.checked_N) - 1)]
        if not new.any():
            return
        places_N = places_N[new]
        wrong = places_N[chunk_checksums(chunks[new]) != self.checksums_N[places_N]]
        if len(wrong):
            raise ValueError(f"{self.path} is damaged: chunk {int(wrong[0])} is not what was written")
        self.checked_N[places_N] = True


class DiskSlab(HostSlab):
    """Chunks in a memory-mapped file without a name: the system takes it back with the memory, or with the process.

    The page cache decides what of it is in RAM.

    Raises:
        OSError: If the file cannot grow (no space left): what is held stays valid.
    """

    def __init__(self, chunk_shape, dtype, device, folder: str | os.PathLike | None = None):
        super().__init__(chunk_shape, dtype, device)
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.saved: SavedChunks | None = None
        self.file = tempfile.TemporaryFile(prefix="drt-", suffix=".memory", dir=folder)
        weakref.finalize(self, self.file.close)

    def allocate(self, places: int) -> torch.Tensor:
        offset = os.fstat(self.file.fileno()).st_size
        claim_space(self.file, places * self.chunk_bytes, f"{places} more chunks of the memory of {self.places}")
        return map_chunks(self.file, offset, (places, *self.chunk_shape), self.dtype, mode="r+")

    def map_saved(self, path, offset: int, places: int, checksums_N: torch.Tensor | None = None) -> None:
        """Take the chunks that lie in a file at `offset`; they are read there and never written.

        A chunk is compared with its checksum when it is first read.
        """
        self.add_extent(map_chunks(path, offset, (places, *self.chunk_shape), self.dtype, mode="r"))
        self.frozen = self.places
        self.saved = SavedChunks(path, checksums_N, torch.zeros(places, dtype=torch.bool))

    def gather(self, places_N: torch.Tensor) -> torch.Tensor:
        chunks = super().gather(places_N)
        if self.saved is not None and self.saved.checksums_N is not None:
            self.saved.check(places_N, chunks)
        return chunks


def claim_space(file, count: int, purpose: str) -> None:
    """Lengthen an open file by `count` bytes that are on the disk, not promised.

    Raises:
        OSError: If there is no space for them; the file is as before.
    """
    offset = end = os.fstat(file.fileno()).st_size
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), offset, count)
        else:
            while end < offset + count:
                end += os.pwrite(file.fileno(), bytes(min(PIECE, offset + count - end)), end)
    except OSError as error:
        os.ftruncate(file.fileno(), offset)
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(error.errno, f"no space on the disk for {purpose} ({count} bytes), nothing was lost") from error


def map_chunks(file, offset: int, shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> torch.Tensor:
    """Return chunks that lie in a file at `offset`; mode "r+", or "r" to read only (a write would end the process)."""
    size = int(np.prod(shape)) * dtype.itemsize
    # not copy-on-write: Linux refuses such a map if the file is larger than the RAM
    raw = np.memmap(file, dtype=np.uint8, mode=mode, offset=offset, shape=(size,))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(raw).view(dtype).view(shape)


def roomy_location(size: int, device: torch.device) -> str:
    """Return where so many bytes of chunks go: the device, else host memory, else the disk.

    A place has room if they take at most half of what is free there. What a CPU reads in place lies on the "device".

    Raises:
        ValueError: If the system does not say how much is free.
    """
    host = _free_host_bytes()
    if torch.device(device).type == "cpu":
        return "device" if size <= host / 2 else "disk"
    if size <= torch.cuda.mem_get_info(device)[0] / 2:
        return "device"
    return "host" if size <= host / 2 else "disk"


def _free_host_bytes() -> int:
    facts = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s*(\d+) kB", facts.read_text() if facts.is_file() else "", re.MULTILINE)
    if found is None:
        raise ValueError('location="auto" needs /proc/meminfo, which this system does not have: choose one')
    return 1024 * int(found[1])


class Fetch:
    """Chunks on their way to the device, for places `[B, C, K]` of a slab.

    Three steps, between which the device computes: to make it copies the places to the host, `send` gathers the chunks
    in pinned memory and starts their copy, `arrive` lets the compute stream wait for them.
    """

    def __init__(self, slab: HostSlab, places_BCK: torch.Tensor):
        self.slab = slab
        self.chunks = self.index = self.asked = self.sent = None
        if slab.stream is None:
            self.places = places_BCK.cpu()
        else:
            self.places = torch.empty(places_BCK.shape, dtype=places_BCK.dtype, pin_memory=True)
            self.places.copy_(places_BCK, non_blocking=True)
            self.asked = torch.cuda.current_stream(slab.device).record_event()

    def send(self) -> None:
        if self.chunks is not None:
            return
        if self.asked is not None:
            self.asked.synchronize()
        wanted, index = self.places.clamp_min(0).unique(return_inverse=True)
        index = index.masked_fill(self.places < 0, -1)
        staging, stream = self.slab.gather(wanted), self.slab.stream
        with torch.cuda.stream(stream):
            self.index = index.to(self.slab.device)
            self.chunks = staging.to(self.slab.device, non_blocking=True)
            self.sent = stream.record_event() if stream is not None else None

    def arrive(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return chunks `[N, 2, G, S, D]` on the device and where in them each asked place is, -1 for none."""
        self.send()
        if self.sent is not None:
            current = torch.cuda.current_stream(self.slab.device)
            current.wait_event(self.sent)
            for tensor in (self.chunks, self.index):
                tensor.record_stream(current)
        return self.chunks, self.index

    def select_rows(self, indices: torch.Tensor) -> None:
        self.index = self.arrive()[1].index_select(0, indices.to(self.slab.device))

    def nbytes(self) -> int:
        return 0 if self.chunks is None else self.chunks.nbytes + self.index.nbytes


SLABS = {"device": DeviceSlab, "host": HostSlab, "disk": DiskSlab}


class ParallelMemory:
    """The chunks of one forward pass without a past, gradients included.

    Args:
        chunks_BN2GSD: Keys and values.
        landmarks_BND: What is searched.
    """

    def __init__(self, chunks_BN2GSD: torch.Tensor, landmarks_BND: torch.Tensor):
        self.chunks, self.landmarks = chunks_BN2GSD, landmarks_BND

    @property
    def total(self) -> int:
        return self.landmarks.shape[1]

    def find(self, queries_BCD: torch.Tensor, asking_BC: torch.Tensor, k: int, noisy: bool = False) -> torch.Tensor:
        """Return the numbers of the k best chunks before each asking one; `noisy` adds Gumbel noise to the choice."""

        def score(start, stop):
            scores = wide_scores(queries_BCD, self.landmarks[:, start:stop])
            return scores * queries_BCD.shape[-1] ** -0.5 + gumbel_like(scores) if noisy else scores

        return best_chunks(score, asking_BC, self.total, k)

    def landmarks_of(self, chunks_BCK: torch.Tensor) -> torch.Tensor:
        row_B11 = torch.arange(chunks_BCK.shape[0], device=chunks_BCK.device)[:, None, None]
        return self.landmarks[row_B11, chunks_BCK.clamp_min(0)]

    def read(self, chunks_BCK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, values = self.chunks.unbind(2)
        return keys.transpose(1, 2), values.transpose(1, 2), chunks_BCK


class ChunkStore:
    """A slab with the landmarks of its chunks, and who has places in it.

    Several memories may share a store: each takes new places behind all that any of them has.
    """

    def __init__(self, slab: DeviceSlab | HostSlab, landmarks_ND: torch.Tensor):
        self.slab, self.landmarks = slab, landmarks_ND
        self.lock = threading.Lock()
        self.memories = weakref.WeakSet()

    @property
    def used(self) -> int:
        """Places up to the last one that somebody has."""
        return max([self.slab.frozen, *(memory.high for memory in self.memories)])

    def reserve(self, places: int) -> None:
        self.slab.reserve(places)
        self.landmarks = _grown(self.landmarks, places, dim=0)


class ChunkMemory:
    """The chunks of B rows.

    Args:
        location: Where keys and values lie: `"device"`, `"host"` (pinned where there is a GPU), `"disk"`, or `"auto"`:
            the first of them with room, once it is known how many chunks there will be (:func:`roomy_location`).
        folder: For `"disk"`, where the file is made; the system's temporary folder by default.
        search: How landmarks are searched: `"exact"`, on the device, or `"faiss"` (extra `faiss`), as exact, but on
            the CPU and with the landmarks in host memory.
    """

    def __init__(self, location: str = "device", folder: str | os.PathLike | None = None, search: str = "exact"):
        if location not in (*LOCATIONS, "auto"):
            raise ValueError(f"location must be one of {(*LOCATIONS, 'auto')}, got {location!r}")
        if folder is not None and location not in ("disk", "auto"):
            raise ValueError(f'folder needs location="disk" or "auto", got location={location!r}')
        self.location, self.folder, self.search = location, folder, search
        self.store: ChunkStore | None = None
        self.table = None
        # what `find_with_faiss` keeps: an index a row, made anew where it is missing
        self.indexes: list = []
        # one past the last place that is this memory's
        self.high = 0
        self.counts: list[int] = []

    @property
    def slab(self) -> DeviceSlab | HostSlab | None:
        return None if self.store is None else self.store.slab

    @property
    def landmarks(self) -> torch.Tensor | None:
        return None if self.store is None else self.store.landmarks

    @property
    def used(self) -> int:
        return 0 if self.store is None else self.store.used

    def begin(
        self, rows: int, chunk_shape: tuple[int, ...], landmark_width: int, dtype, device, expected: int = 0
    ) -> None:
        """Set up an empty memory of `rows` rows; chunks are `[2, G, S, D]`, about `expected` of them for `"auto"`."""
        if self.location == "auto":
            self.location = roomy_location(expected * int(np.prod(chunk_shape)) * dtype.itemsize, device)
        options = {"folder": self.folder} if self.location == "disk" else {}
        slab = SLABS[self.location](chunk_shape, dtype, device, **options)
        landmark_device = "cpu" if self.search == "faiss" else device
        self._join(ChunkStore(slab, torch.empty((0, landmark_width), dtype=dtype, device=landmark_device)))
        self.table = torch.zeros((rows, 0), dtype=torch.long, device=device)
        self.indexes, self.high, self.counts = [None] * rows, 0, [0] * rows

    def _join(self, store: ChunkStore) -> None:
        self.store = store
        store.memories.add(self)

    def fork(self) -> "ChunkMemory":
        """Return a memory of the same chunks that goes on by itself; nothing is copied but the table of places."""
        twin = ChunkMemory(self.location, self.folder, self.search)
        if self.store is not None:
            with self.store.lock:
                twin.high = self.high
                twin._join(self.store)
            twin.table, twin.counts = self.table.clone(), list(self.counts)
            twin.indexes = [None] * len(self.counts)
        return twin

    def reserve(self, new: list[int]) -> None:
        """Make room for `new[b]` chunks of each row, before anything changes.

        Raises:
            OSError: If there is no space left on the disk; nothing is lost.
        """
        with self.store.lock:
            self.store.reserve(self.used + sum(new))
        longest = max(held + more for held, more in zip(self.counts, new, strict=True))
        self.table = _grown(self.table, longest, dim=1)

    def append(self, chunks: torch.Tensor, landmarks_ND: torch.Tensor, new: list[int]) -> None:
        """Add chunks `[sum(new), 2, G, S, D]` that stand row after row."""
        total = sum(new)
        with self.store.lock:
            place = self.used
            # another one of the store may have taken what was reserved
            self.store.reserve(place + total)
            self.slab.write(place, chunks)
            self.landmarks[place : place + total] = landmarks_ND.to(self.landmarks.device)
            self.high = place + total
        for row, more in enumerate(new):
            held = self.counts[row]
            self.table[row, held : held + more] = torch.arange(place, place + more, device=self.table.device)
            self.counts[row] += more
            place += more

    def fill(self, pieces: Iterable[torch.Tensor], landmarks_ND, table_BN, counts: list[int]) -> None:
        """Fill an empty memory: chunks in pieces, landmarks and table as :meth:`compact` returns them."""
        place = 0
        for piece in pieces:
            self.slab.write(place, piece)
            place += len(piece)
        self.store.landmarks = landmarks_ND.to(self.landmarks.device)
        self.table = table_BN.to(self.table.device)
        self.high, self.counts = len(landmarks_ND), list(counts)

    def compact(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the places that rows still refer to, ascending; their landmarks; and the table in terms of them."""
        longest = self.total
        table_BN = self.table[:, :longest].cpu()
        held_BN = torch.arange(longest) < torch.tensor(self.counts)[:, None]
        kept_N, named = table_BN[held_BN].unique(return_inverse=True)
        table_BN = torch.zeros_like(table_BN).masked_scatter(held_BN, named)
        return kept_N, self.landmarks[kept_N.to(self.landmarks.device)], table_BN

    def pieces(self, places_N: torch.Tensor) -> Iterator[torch.Tensor]:
        """Return the chunks at these places, which must ascend, some megabytes at a time."""
        chunk_bytes = int(np.prod(self.slab.chunk_shape)) * self.slab.dtype.itemsize
        for some in places_N.split(max(PIECE // chunk_bytes, 1)):
            if len(some):
                yield self.slab.gather(some)

    def __deepcopy__(self, memo: dict) -> "ChunkMemory":
        """Return a memory of its own slab, or file, with the chunks that rows still refer to."""
        twin = ChunkMemory(self.location, self.folder, self.search)
        memo[id(self)] = twin
        if self.slab is not None:
            slab = self.slab
            twin.begin(len(self.counts), slab.chunk_shape, self.landmarks.shape[1], slab.dtype, slab.device)
            kept_N, landmarks_ND, table_BN = self.compact()
            twin.slab.reserve(len(kept_N))
            twin.fill(self.pieces(kept_N), landmarks_ND, table_BN, self.counts)
        return twin

    @property
    def total(self) -> int:
        return max(self.counts)

    def find(self, queries_BCD: torch.Tensor, asking_BC: torch.Tensor, k: int, noisy: bool = False) -> torch.Tensor:
        """Return the numbers of the k best chunks before each asking one, `[B, C, K]`, -1 where there are fewer.

        Raises:
            ValueError: If `noisy`: noise is for training, which has no past.
        """
        if noisy:
            raise ValueError("a cache cannot be used in training, whose choice of chunks is noisy; use_cache=False")
        if self.search == "faiss":
            # faiss takes a while to import, and is asked for here alone
            from .search import find_with_faiss

            return find_with_faiss(self, queries_BCD, asking_BC, k)

        def score(start, stop):
            return wide_scores(queries_BCD, self.row_landmarks(start, stop))

        return best_chunks(score, asking_BC, self.total, k)

    def row_landmarks(self, start: int, stop: int) -> torch.Tensor:
        """Return landmarks start..stop-1 of every row, `[B, stop - start, D]`."""
        if self.counts == [self.high]:
            # a single row that owns every place
            return self.landmarks[None, start:stop]
        return self.landmarks[self.table[:, start:stop].to(self.landmarks.device)]

    def landmarks_of_row(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Return landmarks start..stop-1 of one row, `[stop - start, D]`, in host memory."""
        return self.landmarks[self.table[row, start:stop].to(self.landmarks.device)].cpu()

    def landmarks_of(self, chunks_BCK: torch.Tensor) -> torch.Tensor:
        """Return the landmarks `[B, C, K, D]` of chunks given by their numbers; anything for -1."""
        places_BCK = self.places(chunks_BCK).clamp_min(0)
        return self.landmarks[places_BCK.to(self.landmarks.device)].to(chunks_BCK.device)

    def places(self, chunks_BCK: torch.Tensor) -> torch.Tensor:
        """Return the places in the slab of chunks given by their numbers in the row, -1 for none."""
        if not self.table.shape[1]:
            return torch.full_like(chunks_BCK, -1)
        places = self.table.gather(1, chunks_BCK.clamp_min(0).flatten(1)).view_as(chunks_BCK)
        return places.masked_fill(chunks_BCK < 0, -1)

    def fetch(self, chunks_BCK: torch.Tensor) -> Fetch | None:
        """Begin to bring chunks to the device; `None` if they are there."""
        return None if self.location == "device" else Fetch(self.slab, self.places(chunks_BCK))

    def read(self, chunks_BCK: torch.Tensor, fetch: Fetch | None = None):
        """Return keys and values `[1, G, N, S, D]` on the device, and where in them each chunk is (-1: none).

        `fetch` is what :meth:`fetch` returned for the same chunks, if it was called before.
        """
        if self.location == "device":
            chunks, index = self.slab.chunks, self.places(chunks_BCK)
        else:
            chunks, index = (fetch or self.fetch(chunks_BCK)).arrive()
        keys, values = chunks.unbind(1)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None], index

    def select_rows(self, indices: torch.Tensor) -> None:
        """Keep the given rows, in the given order, as often as they are named."""
        self.table = self.table.index_select(0, indices.to(self.table.device))
        self.counts = [self.counts[row] for row in indices.tolist()]
        self.indexes = [None] * len(self.counts)

    def forget(self, chunks: list[int]) -> None:
        """Drop the last `chunks[b]` chunks of each row. Places behind the last one still named are free again."""
        if not any(chunks):
            return
        self.counts = [held - fewer for held, fewer in zip(self.counts, chunks, strict=True)]
        last = [self.table[row, held - 1] for row, held in enumerate(self.counts) if held]
        self.high = max([self.slab.frozen, *(int(place) + 1 for place in last)])
        self.indexes = [None] * len(self.counts)

    def device_bytes(self) -> int:
        """Bytes on the device: table, landmarks unless faiss has them, keys and values unless they are offloaded."""
        landmarks = 0 if self.search == "faiss" else self.landmarks.nbytes
        return landmarks + self.table.nbytes + self.slab.device_bytes()

    def host_bytes(self) -> int:
        """Bytes of keys and values in host memory or in the file; with faiss also of landmarks, and of its copies."""
        if self.search != "faiss":
            return self.slab.host_bytes()
        copies = sum(4 * index.ntotal * index.d for index in self.indexes if index is not None)
        return self.slab.host_bytes() + self.landmarks.nbytes + copies


def _grown(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Return the tensor with at least `size` entries along `dim`, doubled if it must grow; new ones are zero."""
    held = tensor.shape[dim]
    if size <= held:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = max(size, 2 * held, SMALLEST_EXTENT)
    grown = tensor.new_zeros(shape)
    grown.narrow(dim, 0, held).copy_(tensor)
    return grown
