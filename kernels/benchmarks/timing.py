"""Measuring for all benchmarks: medians of event-timed runs, peak memory, measured ceilings, tables.

On a CPU the same functions use the wall clock and one run: that rehearses the benchmark, it measures nothing.
"""

import argparse
import gc
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable

import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_ms(function: Callable[[], object], budget_ms: float = 300.0, max_runs: int = 200) -> float:
    """Return the median duration of a call in milliseconds, caches flushed before each run.

    Args:
        function: Takes nothing; one call is one run.
        budget_ms: Time for all runs together; at least five are made on a GPU, one on a CPU.
        max_runs: At most so many runs.
    """
    if DEVICE == "cpu":
        return _wall_ms(function)
    function()
    synchronize()
    estimate = max(_wall_ms(function), 1e-3)
    runs = int(min(max_runs, max(5, budget_ms / estimate)))
    # twice the cache of the largest GPU in use: what a run reads does not lie in the cache from the run before
    flush = torch.empty(128 * 2**20, dtype=torch.int8, device=DEVICE)
    for _ in range(3):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for first, last in events:
        flush.zero_()
        first.record()
        function()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events)


def _wall_ms(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    synchronize()
    return 1e3 * (time.perf_counter() - started)


def peak_mb(function: Callable[[], object]) -> float | None:
    """Return how many MB a call holds at most above what was held before it, None on a CPU."""
    if DEVICE == "cpu":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def backward_of(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], None]:
    """Return a call that runs `function` and its backward pass with a fixed random gradient."""
    out = function()
    gradient = torch.randn_like(out)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        function().backward(gradient)

    return both


_CEILINGS: dict[str, float] = {}


def ceilings(smoke: bool) -> dict[str, float]:
    """Return the measured peaks of this machine: `matmul_tflops` in bfloat16 and `copy_gb_s`, read plus written."""
    if not _CEILINGS:
        n, size = (256, 2**20) if smoke else (8192, 2**32)
        a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
        _CEILINGS["matmul_tflops"] = 2 * n**3 / median_ms(lambda: a @ b) / 1e9
        source, target = (torch.empty(size, dtype=torch.int8, device=DEVICE) for _ in range(2))
        source.random_()
        _CEILINGS["copy_gb_s"] = 2 * size / median_ms(lambda: target.copy_(source)) / 1e6
    return dict(_CEILINGS)


def markdown(rows: list[dict], columns: dict[str, str] | None = None) -> str:
    """Return a markdown table; `columns` maps keys to headings, by default the keys of the first row."""
    if not rows:
        return "(no rows)\n"
    columns = columns or {key: key for key in rows[0]}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


class Clock:
    """Time that a part may still use: `Clock(60).over()` is True after a minute."""

    def __init__(self, seconds: float):
        self.ends = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self.ends - time.monotonic())

    def over(self) -> bool:
        return self.left() == 0.0


def main(run: Callable[..., dict], table: Callable[[dict], str]) -> None:
    """Command line of one benchmark: prints its table, and writes its result to `--json`."""
    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to rehearse on a CPU")
    parser.add_argument("--seconds", type=float, default=120, help="no new row is begun after so many seconds")
    parser.add_argument("--json", help="file for the result")
    args = parser.parse_args()
    # whatever hangs in a row is broken off a little later: `run` may catch that and return the rows before it
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, args.seconds + 5)
    result = run(args.smoke, args.seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    result["table"] = table(result)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file)
    print(result["table"])


def _out_of_time(*_) -> None:
    raise TimeoutError("the time of this benchmark is over")


__all__ = ["DEVICE", "Clock", "backward_of", "ceilings", "main", "markdown", "median_ms", "peak_mb", "synchronize"]
