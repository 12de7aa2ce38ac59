"""Texts with needles as a data set for `Trainer`, and as memory maps of any length. Needs numpy and torch only.

A file `book.npy` has `book.npy.json` next to it, which says where needles and questions stand.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .needles import (
    NeedleQuestion,
    NeedleSample,
    NeedleTask,
    Plan,
    check_haystack,
    check_integer,
    check_length,
    draw_needles,
)
from .word_needles import WordNeedleTask


Task = NeedleTask | WordNeedleTask
# bytes of a file beyond those of its tokens, at most
SLACK = 1 << 16


def write_needles(
    path: str | os.PathLike,
    task: Task,
    haystack: np.ndarray,
    length: int,
    index: int,
    seed: int = 0,
    epoch: int = 0,
) -> NeedleSample:
    """Write the sample of `draw_needles` to a file, a block at a time; return it as `read_needles` does.

    `path` is an array that `numpy.load` reads, in the type of the haystack, or a wider one where its ids need that.
    Both files are written under other names and then renamed; what was there before is kept if that fails.

    Raises:
        ValueError: As `draw_needles`.
        OSError: If the disk has or gets no room, or the folder does not exist.
    """
    made = task.plan(haystack, length, index, seed, epoch)
    path = Path(path)
    dtype = np.result_type(haystack.dtype, *(np.min_scalar_type(int(ids.max())) for _, ids in made.pieces))
    needed, free = length * dtype.itemsize + SLACK, shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{length} tokens need {needed} bytes, {free} are free", str(path))
    sidecar = _sidecar(path)
    draft, draft_sidecar = (file.with_name(f"{file.name}.{os.getpid()}.tmp") for file in (path, sidecar))
    try:
        _write_ids(draft, dtype, haystack, length, made)
        sample = made.sample
        facts = {"length": length, "index": index, "seed": seed, "epoch": epoch, "chunk_size": task.chunk_size}
        facts |= {name: getattr(sample, name) for name in ("kind", "needles", "depths", "questions")}
        draft_sidecar.write_text(json.dumps(facts, default=int) + "\n", encoding="utf-8")
        # a text never stands next to the places of another one, whatever happens between the lines
        sidecar.unlink(missing_ok=True)
        os.replace(draft, path)
        os.replace(draft_sidecar, sidecar)
    finally:
        for file in (draft, draft_sidecar):
            file.unlink(missing_ok=True)
    return read_needles(path)


def _write_ids(file: Path, dtype: np.dtype, haystack: np.ndarray, length: int, made: Plan) -> None:
    # no writes through a map: on a full disk they end the process
    with open(file, "wb") as out:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(out, header)
        begin = out.tell()
        for at, block in made.blocks(haystack, length):
            out.seek(begin + at * dtype.itemsize)
            out.write(np.ascontiguousarray(block, dtype=dtype).data)
        out.flush()
        os.fsync(out.fileno())


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_needles(path: str | os.PathLike) -> NeedleSample:
    """Return a sample that `write_needles` wrote, its text a read-only memory map.

    Raises:
        OSError: If a file is missing.
        ValueError: If the text is cut, or is not the one that the file next to it describes.
    """
    path = Path(path)
    facts = json.loads(_sidecar(path).read_text(encoding="utf-8"))
    input_ids = np.load(path, mmap_mode="r")
    if input_ids.shape != (facts["length"],):
        raise ValueError(f"{path} must hold {facts['length']} tokens, as {_sidecar(path)} says, got {input_ids.shape}")
    needles = tuple((start, stop) for start, stop in facts["needles"])
    questions = tuple(NeedleQuestion(*places, tuple(of)) for *places, of in facts["questions"])
    return NeedleSample(facts["kind"], input_ids, needles, tuple(facts["depths"]), questions)


class NeedleDataset(Dataset):
    """Samples of a task, or of a mixture of tasks, as `{"input_ids": [T], "labels": [T]}`.

    Sample i depends on `seed`, the epoch, its length, i and the task, not on `size` or on what was drawn before. With
    one task and one length it is `draw_needles(task, haystack, length, i, seed, epoch)`. `Trainer` on one process
    tells the epoch by itself; other loops call `set_epoch` before each epoch, else every epoch repeats the first.

    Args:
        tasks: A task, or a mapping or list of pairs (task, weight); all of one chunk size.
        haystack: Token ids, `[N]`, see `draw_needles`.
        length: Tokens of a text; or (shortest, longest), uniform over the multiples of the chunk size between them.
            `default_data_collator` makes batches of one length only.
        size: Samples of an epoch.
        seed: Seed of all draws.

    Raises:
        ValueError: For no task, a weight that is not above 0, two chunk sizes, lengths that are out of order, too
            short for one of the tasks or no multiple of the chunk size, and as `draw_needles`.
    """

    def __init__(
        self,
        tasks: Task | Mapping[Task, float] | Sequence[tuple[Task, float]],
        haystack: np.ndarray,
        length: int | tuple[int, int],
        size: int,
        seed: int = 0,
    ):
        self.tasks, self.weights = _read_mixture(tasks)
        self.haystack, self.size, self.seed = haystack, size, seed
        self.shortest, self.longest = _read_lengths(length)
        check_haystack(haystack)
        check_integer("size", size, 1)
        check_integer("seed", seed, 0, 2**32 - 1)
        for task in self.tasks:
            for value in (self.shortest, self.longest):
                check_integer("length", value, 1)
                check_length(task, value)
        if self.shortest > self.longest:
            raise ValueError(f"length must be (shortest, longest), got {length}")
        # shared, so that persistent workers see the epoch too
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew: other samples, a function of `seed` and `epoch`."""
        check_integer("epoch", epoch, 0, 2**32 - 1)
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> NeedleSample:
        """Return sample `index` with its needles and questions.

        Raises:
            IndexError: If there is none.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in 0..{self.size - 1}, got {index}")
        chunk_size = self.tasks[0].chunk_size
        # apart from the streams of the samples by the spawn key
        choice = np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch, index], spawn_key=(1,)))
        task = self.tasks[choice.choice(len(self.tasks), p=self.weights)]
        length = chunk_size * int(choice.integers(self.shortest // chunk_size, self.longest // chunk_size + 1))
        return draw_needles(task, self.haystack, length, index, self.seed, self.epoch)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.sample(index)
        return {"input_ids": torch.from_numpy(sample.input_ids), "labels": torch.from_numpy(sample.labels)}


def _read_lengths(length) -> tuple[int, int]:
    lengths = (length, length) if isinstance(length, (int, np.integer)) else length
    if not isinstance(lengths, (tuple, list)) or len(lengths) != 2:
        raise ValueError(f"length must be an integer or (shortest, longest), got {length!r}")
    return tuple(lengths)


def _read_mixture(tasks) -> tuple[list[NeedleTask], np.ndarray]:
    kinds = (NeedleTask, WordNeedleTask)
    pairs = [(tasks, 1.0)] if isinstance(tasks, kinds) else tasks
    pairs = list(pairs.items()) if isinstance(pairs, Mapping) else list(pairs)
    if not pairs:
        raise ValueError("a mixture needs at least one task, got none")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], kinds):
            raise ValueError(f"tasks must be a NeedleTask or WordNeedleTask, or pairs (task, weight), got {pair!r}")
        task, weight = pair
        if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"the weight of {task.kind} must be a finite number above 0, got {weight!r}")
    sizes = sorted({task.chunk_size for task, _ in pairs})
    if len(sizes) > 1:
        raise ValueError(f"the tasks of a mixture must have one chunk_size, got {sizes}")
    weights = np.array([weight for _, weight in pairs], dtype=float)
    return [task for task, _ in pairs], weights / weights.sum()
