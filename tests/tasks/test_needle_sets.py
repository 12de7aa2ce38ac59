"""Needles in files and as a data set: the same samples as in memory, and nothing half written."""

import errno
import json
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from modeling_insnext.tasks import NeedleDataset, NeedleTask, draw_needles, needle_sets, read_needles, write_needles
from modeling_insnext.tasks.needles import BLOCK
from tests.support.equality import same_bits


KINDS = ("passkey", "multi_key", "two_hop")
HAYSTACK = np.random.default_rng(0).integers(528, 900, 20_000).astype(np.uint16)


class CharTokenizer:
    """One id a character; 0 is special."""

    all_special_ids = [0]

    def __init__(self, vocab_size=528):
        self.vocab_size = vocab_size

    def encode(self, text, add_special_tokens=True):
        return [ord(char) for char in text]

    def __len__(self):
        return self.vocab_size


def make_task(kind, vocab_size=528, **options):
    return NeedleTask(kind, CharTokenizer(vocab_size), **options)


def same(one, other):
    return (
        np.array_equal(one.input_ids, other.input_ids)
        and np.array_equal(one.labels, other.labels)
        and (one.kind, one.needles, one.depths, one.questions)
        == (other.kind, other.needles, other.depths, other.questions)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_a_file_is_the_sample_in_memory(kind, dtype, tmp_path):
    numbers = {"length": 4096, "index": 3, "seed": 5, "epoch": 2}
    haystack = HAYSTACK.astype(dtype)
    written = write_needles(tmp_path / "book.npy", make_task(kind), haystack, **numbers)
    sample = draw_needles(make_task(kind), haystack, **numbers)
    assert same(written, sample) and same(read_needles(str(tmp_path / "book.npy")), sample)
    assert isinstance(written.input_ids, np.memmap) and not written.input_ids.flags.writeable
    assert written.input_ids.dtype == dtype and type(written.questions[0]) is type(sample.questions[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["book.npy", "book.npy.json"]
    # control: another index is another sample
    assert not same(written, draw_needles(make_task(kind), haystack, **{**numbers, "index": 4}))


def test_a_file_of_many_blocks_from_a_memory_map(tmp_path):
    np.save(tmp_path / "haystack.npy", np.resize(HAYSTACK, BLOCK + 777))
    haystack = np.load(tmp_path / "haystack.npy", mmap_mode="r")
    length = 3 * BLOCK + 64
    written = write_needles(tmp_path / "book.npy", make_task("two_hop"), haystack, length, 1)
    assert same(written, draw_needles(make_task("two_hop"), haystack, length, 1))


def test_ids_that_the_type_of_the_haystack_cannot_hold_widen_the_file(tmp_path):
    task = make_task("passkey", 70_000, id_range=(66_000, 70_000))
    written = write_needles(tmp_path / "book.npy", task, HAYSTACK, 512, 0)
    assert written.input_ids.dtype == np.uint32
    assert same(written, draw_needles(task, HAYSTACK, 512, 0)) and written.input_ids.max() >= 66_000


def test_little_memory_is_taken_for_a_long_text(tmp_path):
    code = """
import resource, sys
from tests.tasks.test_needle_sets import HAYSTACK, make_task, write_needles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_needles(sys.argv[1], make_task("two_hop"), HAYSTACK, 1 << 25, 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    path = tmp_path / "book.npy"
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    # in KiB: blocks of 2 MiB against 64 MiB of text
    assert path.stat().st_size > 64 << 20 and int(run.stdout) < 24 << 10


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_too_little_room_is_told_before_any_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(OSError, match="131072 tokens need 327680 bytes, 100000 are free") as raised:
        write_needles(tmp_path / "book.npy", make_task("passkey"), HAYSTACK, 131072, 0)
    assert raised.value.errno == errno.ENOSPC and files_of(tmp_path) == {}
    write_needles(tmp_path / "book.npy", make_task("passkey"), HAYSTACK, 4096, 0)


def test_room_that_ends_while_writing_leaves_what_was_there(tmp_path):
    path, task = tmp_path / "book.npy", make_task("passkey")
    write_needles(path, task, HAYSTACK, 4096, 0)
    before = files_of(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError):
            write_needles(path, task, HAYSTACK, 1 << 20, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(tmp_path) == before and same(read_needles(path), draw_needles(task, HAYSTACK, 4096, 0))
    # control: with room it is replaced
    write_needles(path, task, HAYSTACK, 1 << 20, 1)
    assert len(read_needles(path).input_ids) == 1 << 20


@pytest.mark.parametrize("call", [1, 2])
def test_a_stop_between_the_two_renames_never_pairs_a_text_with_other_places(call, tmp_path, monkeypatch):
    path, task, replace, calls = tmp_path / "book.npy", make_task("passkey"), needle_sets.os.replace, []
    write_needles(path, task, HAYSTACK, 4096, 0)

    def stop(*names):
        calls.append(names)
        if len(calls) == call:
            raise OSError(errno.EIO, "stopped")
        replace(*names)

    monkeypatch.setattr(needle_sets.os, "replace", stop)
    with pytest.raises(OSError, match="stopped"):
        write_needles(path, task, HAYSTACK, 4096, 1)
    assert list(files_of(tmp_path)) == ["book.npy"]
    with pytest.raises(FileNotFoundError, match="book.npy.json"):
        read_needles(path)


def test_cut_and_mismatched_files_are_refused(tmp_path):
    path = tmp_path / "book.npy"
    write_needles(path, make_task("passkey"), HAYSTACK, 4096, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="mmap length is greater than file size"):
        read_needles(path)
    np.save(path, HAYSTACK[:4000])
    with pytest.raises(ValueError, match=r"must hold 4096 tokens, as .*book.npy.json says, got \(4000,\)"):
        read_needles(path)
    path.write_bytes(whole)
    assert json.loads((tmp_path / "book.npy.json").read_text())["kind"] == read_needles(path).kind == "passkey"


def test_bad_requests_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="length must be at least 192.*got 128"):
        write_needles(tmp_path / "book.npy", make_task("passkey"), HAYSTACK, 128, 0)
    with pytest.raises(FileNotFoundError, match="missing"):
        write_needles(tmp_path / "missing" / "book.npy", make_task("passkey"), HAYSTACK, 512, 0)
    assert files_of(tmp_path) == {}


def stack(dataset, indices=range(6)):
    return torch.stack([dataset[i]["input_ids"] for i in indices])


def test_items_are_the_drawn_samples_whatever_the_size_or_the_order():
    task = make_task("multi_key", num_questions=2)
    dataset = NeedleDataset(task, HAYSTACK, 1024, 10, seed=4)
    dataset.set_epoch(3)
    for index in (9, 0, 4, 0):
        sample = draw_needles(task, HAYSTACK, 1024, index, 4, 3)
        item = dataset[index]
        assert item["input_ids"].tolist() == sample.input_ids.tolist() and item["input_ids"].dtype == torch.int64
        assert item["labels"].tolist() == sample.labels.tolist() and set(item) == {"input_ids", "labels"}
    longer = NeedleDataset(task, HAYSTACK, 1024, 1000, seed=4)
    assert not same_bits(stack(longer), stack(dataset))
    longer.set_epoch(3)
    assert same_bits(stack(longer), stack(dataset))


def test_iterating_ends_and_indices_outside_raise():
    dataset = NeedleDataset(make_task("passkey"), HAYSTACK, 512, 3)
    assert len(list(dataset)) == len(dataset) == 3
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"index must be in 0..2, got {index}"):
            dataset[index]


def test_epochs_differ_and_come_back_also_in_persistent_workers():
    dataset = NeedleDataset(make_task("passkey"), HAYSTACK, 512, 4)
    loader = DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        seen += [batch["input_ids"] for batch in loader]
        assert same_bits(seen[-1], stack(dataset, range(4)))
    assert same_bits(seen[0], seen[2]) and (seen[0] != seen[1]).any(1).all()


def test_a_mixture_and_a_range_of_lengths_are_drawn_by_weight():
    tasks = {make_task("passkey"): 3.0, make_task("two_hop"): 1}
    dataset = NeedleDataset(tasks, HAYSTACK, (256, 448), 800)
    drawn = [dataset.sample(i) for i in range(800)]
    kinds = Counter(sample.kind for sample in drawn)
    lengths = Counter(len(sample.input_ids) for sample in drawn)
    assert set(kinds) == {"passkey", "two_hop"} and abs(kinds["passkey"] - 600) < 4 * np.sqrt(150)
    assert set(lengths) == {256, 320, 384, 448} and all(abs(n - 200) < 4 * np.sqrt(150) for n in lengths.values())
    listed = NeedleDataset(list(tasks.items()), HAYSTACK, (256, 448), 800)
    assert all(same(listed.sample(i), drawn[i]) for i in range(20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "a mixture needs at least one task, got none"),
        ({"tasks": ["passkey"]}, "tasks must be a NeedleTask or WordNeedleTask, or pairs"),
        (
            {"tasks": {"passkey": 1.0}},
            r"tasks must be a NeedleTask or WordNeedleTask, or pairs .*got \('passkey', 1.0\)",
        ),
        ({"tasks": {make_task("passkey"): 0}}, "the weight of passkey must be a finite number above 0, got 0"),
        (
            {"tasks": {make_task("passkey"): 1, make_task("two_hop", chunk_size=32): 1}},
            r"one chunk_size, got \[32, 64\]",
        ),
        ({"haystack": HAYSTACK[:0]}, "haystack must have at least one token"),
        ({"length": 500}, "length must be a multiple of chunk_size, 64, got 500"),
        ({"length": (128, 512)}, "length must be at least 192.*got 128"),
        ({"length": (512, 256)}, r"length must be \(shortest, longest\), got \(512, 256\)"),
        ({"length": (512,)}, r"length must be an integer or \(shortest, longest\), got \(512,\)"),
        ({"length": 512.0}, r"length must be an integer or \(shortest, longest\), got 512.0"),
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_datasets(changes, message):
    with pytest.raises(ValueError, match=message):
        NeedleDataset(**{"tasks": make_task("passkey"), "haystack": HAYSTACK, "length": 512, "size": 4, **changes})


def test_bad_epoch():
    with pytest.raises(ValueError, match="epoch must be an integer of at least 0, got -1"):
        NeedleDataset(make_task("passkey"), HAYSTACK, 512, 4).set_epoch(-1)


class Recorder(torch.nn.Module):
    """Keeps every batch it is called with."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = []

    def forward(self, input_ids, labels=None):
        self.batches.append((input_ids, labels))
        return {"loss": self.weight.square()}


def test_trainer_takes_it_as_it_is_and_tells_it_the_epoch(tmp_path):
    tasks = [(make_task("passkey"), 1), (make_task("multi_key"), 1)]
    dataset, model = NeedleDataset(tasks, HAYSTACK, 512, 4), Recorder()
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=2, report_to="none", disable_tqdm=True,
        use_cpu=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=dataset).train()
    assert dataset.epoch == 1 and len(model.batches) == 4
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected = {tuple(dataset[i]["input_ids"].tolist()) for i in range(4)}
        seen = {tuple(row.tolist()) for ids, _ in model.batches[2 * epoch : 2 * epoch + 2] for row in ids}
        assert seen == expected
    assert all(((labels == ids) | (labels == -100)).all() for ids, labels in model.batches)
