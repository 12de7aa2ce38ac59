"""A saved cache: goes on as the original, to the last bit; belongs to its model; is written whole or not at all."""

import errno
import fcntl
import json
import math
import os
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_insnext import ChunkMemoryCache
from modeling_insnext.drt import cache_file
from modeling_insnext.drt.cache_file import decoder_of, header_digest, read_header, weights_digest
from tests.support.drt import MEMORY, padded, random_ids, read, tiny_model
from tests.support.equality import same_bits, within_rounding


LOCATIONS = ("device", "host", "disk")
VARIANTS = {
    "plain": {},
    "window None": {"sliding_window": None},
    "fixed": {"retriever": "fixed"},
    "mean": {"landmark_source": "mean"},
    "memory": MEMORY,
    "by token": {"retrieval_by": "token"},
    "no retrieval": {"retrieval_groups": [], "num_lower_layers": 3},
}


def saved(model, path, length=33, rows=2, location="device"):
    past = ChunkMemoryCache(model.config, location)
    read(model, random_ids(rows, length), past, 9)
    past.save(path, model)
    return past


def go_on_alike(model, past, path, location, rows=2, step=4, mask=None):
    """Check that the loaded cache goes on as the saved one does, bit by bit."""
    more = random_ids(rows, 21, seed=1)
    mask = None if mask is None else torch.cat([mask, torch.ones_like(more)], 1)
    loaded = ChunkMemoryCache.load(path, model, location)
    assert within_rounding(read(model, more, loaded, step, mask), read(model, more, past, step, mask))


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_cache_gives_equal_logits(variant, location, tmp_path):
    model = tiny_model(**VARIANTS[variant])
    past = saved(model, tmp_path / "book", location=LOCATIONS[len(variant) % 3])
    go_on_alike(model, past, tmp_path / "book", location)


@pytest.mark.parametrize("length", range(1, 13))
def test_any_place_of_a_chunk_is_a_place_to_save(length, tmp_path):
    model = tiny_model()
    go_on_alike(model, saved(model, tmp_path / "book", length), tmp_path / "book", "disk", step=7)


def test_ragged_rows_lower_only_prefills_and_beams_are_saved(tmp_path):
    model, path = tiny_model(), tmp_path / "book"
    text, mask = padded(random_ids(2, 37), [37, 22], "left")
    past = ChunkMemoryCache(model.config)
    read(model, text, past, 8, mask)
    past.save(path, model)
    go_on_alike(model, past, path, "host", mask=mask)
    past = model.prefill(random_ids(2, 90), segment_length=20, lower_only=True)
    past.save(path, model)
    go_on_alike(model, past, path, "disk")
    past = ChunkMemoryCache(model.config, "host")
    read(model, random_ids(3, 33), past, 11)
    past.reorder_cache(torch.tensor([2, 0, 2, 2]))
    read(model, random_ids(4, 6, seed=2), past)
    past.batch_select_indices(torch.tensor([0, 2, 3]))
    past.save(path, model)
    # six chunks of one row, shared by three, and one of each; not those of the rows that are gone
    assert past.memory.used == 3 * 6 + 4
    assert read_header(path)[1]["memory.chunks"].shape[0] == 6 + 3
    go_on_alike(model, past, path, "disk", rows=3)


def test_a_loaded_cache_can_be_saved_over_the_file_it_maps(tmp_path):
    model, path = tiny_model(), tmp_path / "book"
    saved(model, path)
    past = ChunkMemoryCache.load(path, model, "disk")
    read(model, random_ids(2, 30, seed=3), past, 10)
    past.save(path, model)
    go_on_alike(model, past, path, "disk")
    assert os.listdir(tmp_path) == ["book"]


def test_any_safetensors_tool_reads_the_file(tmp_path):
    model, path = tiny_model(), tmp_path / "book"
    past = saved(model, path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "drt-chunk-memory"
        assert json.loads(file.metadata()["state"])["seen"] == [33, 33]
        chunks = file.get_tensor("memory.chunks")
        assert same_bits(chunks, past.memory.slab.chunks[:12])
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    # and what it writes is read again, in its order of tensors
    save_file(tensors, tmp_path / "again", metadata)
    go_on_alike(model, past, tmp_path / "again", "disk")


def test_chunks_in_a_file_begin_at_a_page(tmp_path):
    model = tiny_model()
    saved(model, tmp_path / "book")
    entries = read_header(tmp_path / "book")[1]
    assert entries["memory.chunks"].begin % 4096 == 0
    assert all(entry.begin % entry.dtype.itemsize == 0 for entry in entries.values())


def test_opening_a_book_on_disk_copies_nothing_and_changes_nothing(tmp_path):
    model, path = tiny_model(), tmp_path / "book"
    saved(model, path, length=200)
    before = path.read_bytes()
    past = ChunkMemoryCache.load(path, model, "disk", folder=tmp_path / "new")
    slab = past.memory.slab
    assert len(slab.parts) == 1 and os.fstat(slab.file.fileno()).st_size == 0
    read(model, random_ids(2, 60, seed=1), past, 20)
    assert os.fstat(slab.file.fileno()).st_size == slab.parts[1].nbytes
    past.crop(-3)
    read(model, random_ids(2, 60, seed=2), past, 20)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"num_retrieved_chunks": 3}, "another model: num_retrieved_chunks is 2 in it, 3 in the model"),
        ({"retrieval_groups": [2]}, r"another model: retrieval_groups is \[1, 1\] in it, \[2\]"),
        ({"residual": "stream"}, "another model: residual is 'bypass' in it, 'stream' in the model"),
        ({"gated_retrieval": True}, "another model: gated_retrieval is False in it, True in the model"),
        ({"seed": 1}, "another model: the weights differ"),
    ],
)
def test_a_memory_of_another_model_is_refused(changes, rule, tmp_path):
    model, path = tiny_model(), tmp_path / "book"
    saved(model, path)
    with pytest.raises(ValueError, match=rule):
        ChunkMemoryCache.load(path, tiny_model(**changes))
    # what does not touch the memory may differ
    ChunkMemoryCache.load(path, tiny_model(attention_dropout=0.5))


def test_one_changed_weight_makes_another_model_but_not_in_the_head(tmp_path):
    model, path = tiny_model(tie_word_embeddings=False), tmp_path / "book"
    saved(model, path)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    ChunkMemoryCache.load(path, model)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] += 1e-12
    with pytest.raises(ValueError, match="weights differ"):
        ChunkMemoryCache.load(path, model)


def test_frozen_features_of_the_fixed_retriever_count_as_weights():
    model = tiny_model(retriever="fixed")
    before = weights_digest(decoder_of(model))
    model.model.bag_of_tokens[7, 7] += 1
    assert weights_digest(decoder_of(model)) != before


def test_another_data_type_is_refused_by_name(tmp_path):
    model, path = tiny_model(), tmp_path / "book"
    saved(model, path)
    with pytest.raises(ValueError, match="memory of the model in torch.float64, got the model in torch.bfloat16"):
        ChunkMemoryCache.load(path, model.bfloat16())


def test_bfloat16_is_saved_as_it_is(tmp_path):
    model, path = tiny_model().bfloat16(), tmp_path / "book"
    past = saved(model, path)
    assert read_header(path)[1]["memory.chunks"].dtype == torch.bfloat16
    go_on_alike(model, past, path, "disk")


def spoiled(change, sign=True):
    """Return a function that rewrites the JSON header of a file, and its digest unless it is to show."""

    def spoil(data):
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        metadata = header["__metadata__"]
        if sign and {"model", "state", "digests"} <= set(metadata):
            facts = {name: json.loads(metadata[name]) for name in ("model", "state", "digests")}
            shapes = {name: [entry["dtype"], entry["shape"]] for name, entry in header.items() if "dtype" in entry}
            metadata["digest"] = header_digest(facts, shapes)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return spoil


def as_version_1(header):
    metadata = header["__metadata__"]
    metadata.update(version="1")
    del metadata["digests"], metadata["digest"]


def change_state(header, **values):
    metadata = header["__metadata__"]
    metadata["state"] = json.dumps({**json.loads(metadata["state"]), **values})


# how a file is spoiled, and what the error says
BAD_FILES = {
    "truncated": (lambda data: data[:-1], "truncated or damaged: its header demands"),
    "longer": (lambda data: data + b" ", "truncated or damaged: its header demands"),
    "half a header": (lambda data: data[:100], "must be a saved chunk memory"),
    "empty": (lambda data: b"", "must be a saved chunk memory"),
    "noise": (lambda data: bytes(range(256)) * 20, "must be a saved chunk memory"),
    "another version": (spoiled(lambda h: h["__metadata__"].update(version="3")), "version 2, got .* version 3"),
    "other safetensors": (spoiled(lambda h: h.update(__metadata__={"format": "pt"})), "must be a saved chunk memory"),
    "a hole": (spoiled(lambda h: h["states"]["data_offsets"].__setitem__(0, 1)), "damaged header"),
    "odd type": (spoiled(lambda h: h["states"].update(dtype="F8")), "damaged header: 'F8'"),
    "no state": (spoiled(lambda h: h["__metadata__"].update(state="{}")), "damaged header"),
    "other lengths": (spoiled(lambda h: change_state(h, seen=[33, 60])), r"does not fit the \[33, 60\] tokens"),
    "no chunks": (spoiled(lambda h: change_state(h, chunks=[6])), "does not fit"),
    "unsigned": (spoiled(lambda h: change_state(h, columns=34), sign=False), "it does not say what was written"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_as_such(kind, tmp_path):
    model, path = tiny_model(), tmp_path / "book"
    saved(model, path)
    spoil, rule = BAD_FILES[kind]
    # control: rewritten without a change it is fine
    path.write_bytes(spoiled(lambda header: None)(path.read_bytes()))
    ChunkMemoryCache.load(path, model)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rule) as caught:
        ChunkMemoryCache.load(path, model)
    assert str(path) in str(caught.value)


def test_places_that_do_not_exist_are_noticed(tmp_path):
    model, path = tiny_model(), tmp_path / "book"
    saved(model, path)
    begin = read_header(path)[1]["memory.table"].begin
    data = bytearray(path.read_bytes())
    data[begin : begin + 8] = (12).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="memory.table is not what was written"):
        ChunkMemoryCache.load(path, model)
    # without digests as well
    path.write_bytes(spoiled(as_version_1)(bytes(data)))
    with pytest.raises(ValueError, match="places outside of the 12 chunks"):
        ChunkMemoryCache.load(path, model)


@pytest.mark.parametrize("location", LOCATIONS)
def test_any_flipped_bit_is_found_before_an_answer(location, tmp_path):
    """On loading, or for chunks on disk when the first pass reads them: every chunk is asked for here."""
    model, path, more = tiny_model(num_retrieved_chunks=8), tmp_path / "book", random_ids(2, 5, seed=1)
    past = saved(model, path)
    expected, data = read(model, more, past, 5), path.read_bytes()

    def answer():
        return read(model, more, ChunkMemoryCache.load(path, model, location), 5)

    assert within_rounding(answer(), expected)
    entries = read_header(path)[1]
    starts = [0, 8, 300, *(entry.begin for entry in entries.values() if 0 not in entry.shape)]
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(data), (40,), generator=generator).tolist()
    for place in [*starts, *places, len(data) - 1]:
        bit = 1 << int(torch.randint(0, 8, (1,), generator=generator))
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        with pytest.raises(ValueError, match="book"):
            answer()
    # control: the same file without digests gives another answer and no error
    entry = entries["values.0"]
    last = entry.begin + math.prod(entry.shape) * 8 - 2
    path.write_bytes(spoiled(as_version_1)(data[:last] + bytes([data[last] ^ 8]) + data[last + 1 :]))
    assert not within_rounding(answer(), expected)


def test_no_byte_of_the_header_can_change_unnoticed(tmp_path):
    """Every byte of length, index, metadata and the spaces behind them, another bit in each."""
    model, path = tiny_model(num_lower_layers=0, retrieval_groups=[1]), tmp_path / "book"
    saved(model, path, length=12, rows=1)
    data = path.read_bytes()
    header = min(entry.begin for entry in read_header(path)[1].values())
    assert header == 8 + int.from_bytes(data[:8], "little") and read_header(path)
    with open(path, "r+b") as file:
        for place in range(header):
            for value, fine in ((data[place] ^ (1 << place % 8), False), (data[place], True)):
                file.seek(place)
                file.write(bytes([value]))
                file.flush()
                if not fine:
                    with pytest.raises(ValueError, match="book"):
                        read_header(path)
    read_header(path)


def test_files_of_version_1_are_read_as_they_are(tmp_path):
    model, path = tiny_model(), tmp_path / "book"
    past = saved(model, path)
    path.write_bytes(spoiled(as_version_1)(path.read_bytes()))
    assert "digests" not in read_header(path)[0]
    go_on_alike(model, past, path, "disk")


def test_what_a_killed_process_left_goes_when_the_path_is_saved_again(tmp_path):
    model, path = tiny_model(), tmp_path / "book"
    child = os.fork()
    if not child:
        # a kill gives no chance to tidy up
        cache_file.os.fsync = lambda handle: os._exit(9)
        saved(model, path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".part") and os.path.getsize(tmp_path / left) > 4096
    with open(tmp_path / "book.11111111.part", "wb") as file:
        # control: one that somebody is writing stays
        fcntl.flock(file, fcntl.LOCK_EX)
        saved(model, path)
        assert sorted(os.listdir(tmp_path)) == ["book", "book.11111111.part"]
    saved(model, path)
    assert os.listdir(tmp_path) == ["book"]


def test_an_empty_cache_has_nothing_to_save(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="must have read something"):
        ChunkMemoryCache(model.config).save(tmp_path / "book", model)
    with pytest.raises(ValueError, match="must hold a DrtModel, got Linear"):
        saved(model, tmp_path / "book").save(tmp_path / "book", torch.nn.Linear(2, 2))


@pytest.mark.parametrize("moment", ["claim", "write", "interrupt"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(moment, tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "book"
    past = saved(model, path)
    before = path.read_bytes()
    longer = ChunkMemoryCache(model.config)
    read(model, random_ids(2, 80), longer, 40)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if moment == "interrupt":
            monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
        if moment == "write":
            monkeypatch.setattr(cache_file, "claim_space", lambda *args: None)
        with pytest.raises((OSError, KeyboardInterrupt)) as caught:
            longer.save(path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert moment == "interrupt" or caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["book"]
    monkeypatch.undo()
    go_on_alike(model, past, path, "host")
    # control: with space it goes through
    longer.save(path, model)
    assert path.read_bytes() != before


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_neither_saving_nor_opening_needs_room_for_the_chunks_in_ram(tmp_path):
    model, path, n = tiny_model(), tmp_path / "book", 100_000
    past = ChunkMemoryCache(model.config, "disk", folder=tmp_path)
    past.begin(1, (2, 2, 5, 8), 32, torch.float64, "cpu")
    past.memory.reserve([n])
    for _ in range(n // 1000):
        past.memory.append(torch.ones(1000, 2, 2, 5, 8), torch.ones(1000, 32), [1000])
    past.seen, past.columns = [5 * n], 5 * n
    status = open("/proc/self/status").read().splitlines()
    held = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    # 128 MB of chunks, 26 MB of landmarks
    resource.setrlimit(resource.RLIMIT_DATA, (held + 100_000_000, limits[1]))
    try:
        past.save(path, model)
        assert ChunkMemoryCache.load(path, model, "disk").host_bytes() == n * 1280
        # control: host memory would take them
        with pytest.raises(RuntimeError, match="memory"):
            ChunkMemoryCache.load(path, model, "host")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
