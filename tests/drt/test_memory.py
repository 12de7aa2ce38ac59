"""The chunk memory: bytes as computed, growth, files that vanish, full disks, chunks that are sent for in time."""

import copy
import errno
import gc
import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from modeling_insnext import ChunkMemoryCache
from modeling_insnext.drt import memory
from modeling_insnext.drt.memory import (
    ChunkMemory,
    DiskSlab,
    Fetch,
    HostSlab,
    claim_space,
    map_chunks,
    wide_scores,
)
from tests.support.drt import random_ids, read, tiny_model, whole


CHUNK = (2, 2, 5, 8)
CLOSE = {"rtol": 0, "atol": 1e-10}


def numbered(low, high):
    """Return chunks, each full of its number."""
    return torch.arange(low, high).double()[:, None, None, None, None].expand(-1, *CHUNK).contiguous()


def filled_memory(location, counts, **options):
    memory = ChunkMemory(location, **options)
    memory.begin(len(counts), CHUNK, 32, torch.float64, "cpu")
    memory.reserve(counts)
    total = sum(counts)
    memory.append(numbered(0, total), torch.arange(total).double()[:, None].expand(-1, 32), counts)
    return memory


@contextmanager
def largest_file(size):
    """Let no file of this process grow beyond `size` bytes: what a full disk is to a test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("location", ["device", "host", "disk"])
def test_bytes_are_those_of_the_formula(location):
    # keys and values of G = 2 heads, S = 5 tokens, d = 8, 8 bytes each; room for 64 chunks at first
    a_chunk = 2 * 2 * 5 * 8 * 8
    memory = filled_memory(location, [30, 20])
    held = memory.device_bytes() if location == "device" else memory.host_bytes()
    landmarks, table = 64 * 32 * 8, 2 * 64 * 8
    assert held == 64 * a_chunk + (landmarks + table if location == "device" else 0)
    other = memory.host_bytes() if location == "device" else memory.device_bytes()
    assert other == (0 if location == "device" else landmarks + table)


@pytest.mark.parametrize("location", ["device", "host", "disk"])
def test_chunks_are_read_where_they_were_written_across_extents(location):
    memory = filled_memory(location, [70, 3])
    for start in (73, 200):
        memory.reserve([150, 0])
        memory.append(numbered(start, start + 127), torch.zeros(127, 32), [127, 0])
    if location != "device":
        assert len(memory.slab.parts) > 2
    chunks = torch.tensor([[[0, 69, 70, 323, -1]], [[0, 1, 2, -1, -1]]])
    keys, values, index = memory.read(chunks)
    got = keys[0, 0, :, 0, 0][index]
    expected = torch.tensor([[[0, 69, 73, 326]], [[70, 71, 72, 0]]]).double()
    expected[0, 0, 2:] = torch.tensor([73.0, 326.0])
    assert got[0, 0, :4].tolist() == expected[0, 0].tolist() and got[1, 0, :3].tolist() == [70, 71, 72]
    assert index[0, 0, 4] == -1 and (index[1, 0, 3:] == -1).all()
    # control: with a wrong table other chunks come
    memory.table = memory.table.flip(0)
    keys, _, index = memory.read(chunks)
    assert keys[0, 0, :, 0, 0][index].tolist() != got.tolist()


def test_extents_never_move_and_little_of_them_lies_idle(monkeypatch):
    monkeypatch.setattr(memory, "LARGEST_EXTENT", 100 * 160 * 8)
    slab = HostSlab(CHUNK, torch.float64, "cpu")
    places, grown = [], []
    for count in range(1, 1200, 7):
        before = [part.data_ptr() for part in slab.parts]
        slab.reserve(count)
        assert [part.data_ptr() for part in slab.parts][: len(before)] == before
        assert count <= slab.places <= max(count * 1.25, count + 64)
        if slab.places not in places:
            grown.append(slab.places - (places[-1] if places else 0))
            places.append(slab.places)
    # a quarter more than what is there, within bounds
    assert grown[:5] == [64] * 5 and 64 < grown[5] < 100 and set(grown[6:]) == {100}


def test_growth_on_the_device_copies_each_chunk_a_constant_number_of_times(monkeypatch):
    memory, copied, size = ChunkMemory("device"), 0, 0
    memory.begin(1, CHUNK, 32, torch.float64, "cpu")
    for _ in range(1000):
        memory.reserve([1])
        if memory.slab.chunks.shape[0] != size:
            copied, size = copied + size, memory.slab.chunks.shape[0]
        memory.append(numbered(0, 1), torch.zeros(1, 32), [1])
    assert copied <= 2 * 1000
    assert memory.landmarks.shape[0] == memory.table.shape[1] == 1024


def test_forgotten_places_are_used_again_unless_another_row_has_them():
    memory = filled_memory("host", [10])
    memory.forget([3])
    assert (memory.used, memory.counts) == (7, [7])
    memory.select_rows(torch.tensor([0, 0]))
    memory.forget([4, 0])
    assert (memory.used, memory.counts) == (7, [3, 7])
    memory.reserve([1, 0])
    memory.append(numbered(50, 51), torch.zeros(1, 32), [1, 0])
    chunks = torch.tensor([[[2, 3]], [[3, 6]]])
    keys, _, index = memory.read(chunks)
    assert keys[0, 0, :, 0, 0][index].tolist() == [[[2, 50]], [[3, 6]]]


def test_only_chunks_that_rows_name_are_kept_in_a_copy():
    memory = filled_memory("host", [4, 5])
    memory.select_rows(torch.tensor([1, 1]))
    kept, landmarks, table = memory.compact()
    assert kept.tolist() == [4, 5, 6, 7, 8] and landmarks[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert table.tolist() == [[0, 1, 2, 3, 4]] * 2
    twin = copy.deepcopy(memory)
    assert twin.used == 5
    chunks = torch.tensor([[[0, 4]], [[1, 2]]])
    for one in (memory, twin):
        keys, _, index = one.read(chunks)
        assert keys[0, 0, :, 0, 0][index].tolist() == [[[4, 8]], [[5, 6]]]


def maps_in(folder):
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_a_memory_on_disk_leaves_no_file_and_no_map(tmp_path):
    past = ChunkMemoryCache(tiny_model().config, "disk", folder=tmp_path / "new")
    past.memory = filled_memory("disk", [100], folder=tmp_path / "new")
    # nothing has a name, so nothing stays if the process is killed
    assert list((tmp_path / "new").iterdir()) == [] and maps_in(tmp_path)
    handle = past.memory.slab.file.fileno()
    assert os.fstat(handle).st_blocks * 512 >= 100 * 160 * 8
    del past
    gc.collect()
    assert not maps_in(tmp_path)
    with pytest.raises(OSError):
        os.fstat(handle)


@pytest.mark.parametrize("step", [1, 40])
def test_a_full_disk_is_an_error_after_which_the_cache_is_as_before(step, tmp_path):
    model, ids = tiny_model(), random_ids(2, 400)
    expected = whole(model, ids)
    past, position = ChunkMemoryCache(model.config, "disk", folder=tmp_path), 0
    # room for the first extent of 64 chunks
    with largest_file(100 * 160 * 8):
        try:
            while position < 400:
                read(model, ids[:, position : position + step], past, step)
                position += step
        except OSError as error:
            assert error.errno == errno.EFBIG and "nothing was lost" in str(error)
    assert 0 < position < 400 and past.seen == [position] * 2 and past.memory.slab.places == 64
    assert os.fstat(past.memory.slab.file.fileno()).st_size == 64 * 160 * 8
    # with space again, the same cache reads on
    logits = read(model, ids[:, position:], past, 40)
    torch.testing.assert_close(logits, expected[:, position:], **CLOSE)


def test_a_disk_that_is_full_at_once_leaves_an_empty_cache(monkeypatch):
    model, ids = tiny_model(), random_ids(2, 40)
    past = ChunkMemoryCache(model.config, "disk")

    def full(handle, offset, count):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="no space on the disk for 64 more chunks") as caught:
            read(model, ids, past, 20)
    assert caught.value.errno == errno.ENOSPC
    assert past.seen == [] and not past.is_initialized
    # one row less than the call that failed
    torch.testing.assert_close(read(model, ids[:1], past, 20), whole(model, ids[:1]), **CLOSE)


def test_other_errors_of_the_disk_stay_what_they_are(monkeypatch):
    def broken(handle, offset, count):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", broken)
    with tempfile.TemporaryFile() as file, pytest.raises(OSError, match="Input/output error"):
        claim_space(file, 100, "a test")


def test_space_is_claimed_where_the_system_has_no_call_for_it(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with tempfile.TemporaryFile() as file:
        file.write(b"abc")
        file.flush()
        claim_space(file, 5000, "a test")
        assert os.fstat(file.fileno()).st_size == 5003
        with largest_file(6000), pytest.raises(OSError, match="no space on the disk for a test"):
            claim_space(file, 5000, "a test")
        assert os.fstat(file.fileno()).st_size == 5003


def test_files_larger_than_the_ram_can_be_mapped_for_reading(tmp_path):
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = tmp_path / "sparse"
    path.touch()
    try:
        os.truncate(path, size)
    except OSError:
        pytest.skip("no sparse files here")
    chunks = map_chunks(path, 0, (size // 1280, *CHUNK), torch.float64, mode="r")
    assert chunks[-1].sum() == 0


def test_what_a_chunk_found_is_sent_for_in_the_pass_that_completes_it(monkeypatch):
    model, ids = tiny_model(), random_ids(1, 41)
    past, gathered, made = ChunkMemoryCache(model.config, "host"), [], []
    gather, fetch = HostSlab.gather, ChunkMemory.fetch
    monkeypatch.setattr(HostSlab, "gather", lambda self, n: gathered.append(past.columns) or gather(self, n))
    monkeypatch.setattr(ChunkMemory, "fetch", lambda self, n: made.append(past.columns) or fetch(self, n))
    logits = read(model, ids, past)
    # two groups; asked for before `advance` counts the column that completes the chunk, gathered behind all layers
    borders = [n for n in range(5, 42, 5) for _ in range(2)]
    # but for the chunk that is served nothing, when there is a memory for the first time
    assert made == [4, 4] + [n - 1 for n in borders]
    assert gathered == [4, 4] + borders
    torch.testing.assert_close(logits, whole(model, ids), **CLOSE)


def test_beams_do_not_send_for_the_same_chunks_again(monkeypatch):
    model, ids = tiny_model(), random_ids(2, 33)
    past = ChunkMemoryCache(model.config, "host")
    read(model, ids[:, :31], past)
    fetches = []
    fetch = Fetch.__init__
    monkeypatch.setattr(Fetch, "__init__", lambda self, *args: fetches.append(1) or fetch(self, *args))
    for column in (31, 32):
        past.reorder_cache(torch.tensor([1, 0]))
        read(model, ids[:, column : column + 1], past)
    assert not fetches
    past.crop(-5)
    read(model, ids[:, :1], past)
    # control: the chunk in progress is an earlier one now
    assert len(fetches) == 2


def test_a_fetch_reads_what_is_asked_for_and_nothing_else():
    memory = filled_memory("host", [9])
    fetch = memory.fetch(torch.tensor([[[3, 8, 3, -1]]]))
    assert fetch.nbytes() == 0
    chunks, index = fetch.arrive()
    # -1 costs the first chunk
    assert chunks[:, 0, 0, 0, 0].tolist() == [0, 3, 8] and index.tolist() == [[[1, 2, 1, -1]]]
    assert fetch.nbytes() == 3 * 160 * 8 + 4 * 8


def test_landmarks_of_bfloat16_are_told_apart():
    torch.manual_seed(0)
    queries, landmarks = torch.randn(1, 1, 256).bfloat16(), torch.randn(1, 5000, 256).bfloat16()
    scores = wide_scores(queries, landmarks)
    assert scores.dtype == torch.float32 and scores.unique().numel() > 4900
    # control: scores of the landmarks' type
    assert (queries @ landmarks.transpose(1, 2)).unique().numel() < 2000


def test_a_saved_extent_is_never_written(tmp_path):
    path = tmp_path / "chunks"
    numbered(0, 10).numpy().tofile(path)
    slab = DiskSlab(CHUNK, torch.float64, "cpu", tmp_path)
    slab.map_saved(path, 0, 10)
    memory = filled_memory("disk", [10], folder=tmp_path)
    memory.store.slab = slab
    memory.forget([4])
    # its places are not free again
    assert memory.used == 10
    memory.reserve([3])
    memory.append(numbered(70, 73), torch.zeros(3, 32), [3])
    keys, _, index = memory.read(torch.tensor([[[5, 6, 8]]]))
    assert keys[0, 0, :, 0, 0][index].tolist() == [[[5, 70, 72]]]
    assert path.read_bytes() == numbered(0, 10).numpy().tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("search", ["exact", "faiss"])
@pytest.mark.parametrize("location", ["device", "host", "disk"])
def test_on_a_gpu_streams_wait_for_one_another(location, search, tmp_path):
    if search == "faiss":
        pytest.importorskip("faiss")
    model, ids = tiny_model().cuda(), random_ids(2, 400).cuda()
    expected = whole(model, ids)
    past = ChunkMemoryCache(model.config, location, search=search)
    parts = [read(model, ids[:, :301], past, 43), read(model, ids[:, 301:340], past)]
    past.reorder_cache(torch.tensor([1, 0]).cuda())
    parts.append(read(model, ids[:, 340:360].flip(0), past).flip(0))
    past.save(tmp_path / "book", model)
    twin, loaded = copy.deepcopy(past), ChunkMemoryCache.load(tmp_path / "book", model, location, search=search)
    for one in (past, twin, loaded):
        logits = torch.cat([*parts, read(model, ids[:, 360:].flip(0), one).flip(0)], 1)
        torch.testing.assert_close(logits, expected, **CLOSE)
