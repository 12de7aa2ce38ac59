"""`slot_cross_entropy` against the same loss in PyTorch, 512 states at a time, on texts written in a random order.

PYTHONPATH=.:kernels python kernels/benchmarks/slot_cross_entropy.py
"""

import random
from bisect import bisect_left, insort

import torch
from timing import DEVICE, Clock, backward_of, ceilings, main, markdown, median_ms, peak_mb
from torch.utils.checkpoint import checkpoint

from insnext_kernels import slot_cross_entropy
from insnext_kernels.common import interpreting
from insnext_kernels.slot_cross_entropy.reference import slot_cross_entropy_reference


CAP = 30.0
STATES_PER_CHUNK = 512
COLUMNS = {
    "name": "implementation", "B": "B", "N": "n", "D": "width", "targets": "targets", "forward_ms": "forward ms",
    "both_ms": "forward + backward ms", "peak_mb": "peak MB", "ratio": "speed-up", "tflops": "TFLOP/s",
    "share": "share of matmul peak",
}  # fmt: skip


def insertion_slots(n: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Return births, deaths and targets of a text of `n` tokens that is written in a random order after its first."""
    draw = random.Random(seed)
    places = [0, *draw.sample(range(1, n), n - 1)]
    births, deaths, targets = [n] * 2 * n, [0] * 2 * n, [2 * n] * n
    births[0], deaths[0] = 0, n
    text, slot_right_of, entry_at = [0], {0: 0}, {0: 0}
    for i in range(1, n):
        left = entry_at[text[bisect_left(text, places[i]) - 1]]
        targets[i - 1] = slot_right_of[left]
        deaths[slot_right_of[left]] = i
        for row in (i, n + i):
            births[row], deaths[row] = i, n
        slot_right_of[left], slot_right_of[i] = n + i, i
        insort(text, places[i])
        entry_at[places[i]] = i
    return births, deaths, targets


def chunked(query, key, stop_key, births, deaths, targets, weights, kinds, *, cap):
    """The loss in PyTorch, with the logits of 512 states at a time; recomputed for the backward pass."""
    scale = query.shape[2] ** -0.5
    losses = []
    for first in range(0, query.shape[1], STATES_PER_CHUNK):
        part = slice(first, first + STATES_PER_CHUNK)
        some = None if kinds is None else kinds[:, part]
        tensors = query[:, part], key, stop_key, births - first, deaths - first, targets[:, part], weights, some
        losses.append(checkpoint(slot_cross_entropy_reference, *tensors, cap, scale, use_reentrant=False))
    return torch.cat(losses, 1)


def tensors_of(B: int, N: int, D: int, soft: bool, dtype: torch.dtype) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    texts = [insertion_slots(N, seed) for seed in range(B)]
    integers = [torch.tensor(rows, dtype=torch.int32, device=DEVICE) for rows in zip(*texts, strict=True)]
    floats = [torch.randn(shape, device=DEVICE).to(dtype) for shape in ((B, N, D), (B, 2 * N, D), (D,))]
    soft_targets = [None, None]
    if soft:
        soft_targets = [torch.randint(0, 5, (B, 2 * N), device=DEVICE, dtype=torch.int32)]
        soft_targets += [torch.ones(B, N, device=DEVICE, dtype=torch.int32)]
    return [x.requires_grad_() for x in floats] + integers + soft_targets


def cases(smoke: bool) -> list[tuple[int, int, int, bool]]:
    if smoke:
        return [(1, 64, 32, False), (1, 64, 32, True)]
    hard = [(B, N, 768, False) for B, N in ((1, 4096), (8, 4096), (1, 1024), (32, 1024), (1, 2048), (1, 8192))]
    return [*hard, (8, 4096, 768, True), (8, 4096, 1152, False), (1, 16384, 768, False)]


def measure(B: int, N: int, D: int, soft: bool, peak: float) -> list[dict]:
    impl = "triton" if DEVICE == "cuda" or interpreting() else "reference"
    implementations = {
        "kernel": lambda *x: slot_cross_entropy(*x, cap=CAP, impl=impl),
        "PyTorch, chunked": lambda *x: chunked(*x, cap=CAP),
    }
    tensors = tensors_of(B, N, D, soft, torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    alive = (tensors[4] - tensors[3]).clamp_min(0).sum().item()
    rows = []
    for name, function in implementations.items():
        row = {"name": name, "B": B, "N": N, "D": D, "targets": "soft" if soft else "hard"}
        both = backward_of(lambda f=function: f(*tensors), tensors[:3])
        row["forward_ms"] = median_ms(lambda f=function: f(*tensors), 150)
        row["both_ms"] = median_ms(both, 200)
        row["peak_mb"] = peak_mb(both)
        # one product forward and two backward, over what is alive
        row["tflops"] = 6 * alive * D / row["both_ms"] / 1e9
        row["share"] = row["tflops"] / peak
        rows.append(row)
    for row in rows:
        row["ratio"] = rows[-1]["both_ms"] / row["both_ms"]
    return rows


def run(smoke: bool, seconds: float = 60) -> dict:
    clock, peaks, rows = Clock(seconds), ceilings(smoke), []
    for B, N, D, soft in cases(smoke):
        if clock.over():
            break
        try:
            rows += measure(B, N, D, soft, peaks["matmul_tflops"])
        except Exception as error:  # a size that fails must not hide the others
            rows.append({"name": f"{type(error).__name__}: {error}"[:300], "B": B, "N": N, "D": D})
    return {"rows": rows, "ceilings": peaks, "cut_short": clock.over()}


def table(result: dict) -> str:
    return markdown(result["rows"], COLUMNS)


if __name__ == "__main__":
    main(run, table)
