"""Where the time of one cached insertion step goes: weights, attention, copies, bookkeeping, Python; and what it asks.

    python examples/studies/profile_step.py --models examples/checkpoints/insnext-mini CONVERTED

Texts of n tokens grow in their middle; several rows are copies of one, written by sampling. All times are processor
time, medians or means of the steps of one text. A step is measured without the counter of operators, which makes each
of them slower; what they leave of it is Python.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median

import torch
from report import RESULTS, command, environment, write_report
from step_clock import StepClock, write
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HfArgumentParser

from modeling_insnext import InsNextForInsertionLM


KINDS = {
    "weights": ("mm", "addmm", "embedding"),
    "attention": ("bmm", "baddbmm", "_softmax", "_scaled_dot_product"),
    "copies": ("copy_", "_to_copy", "cat", "index", "clone", "gather", "scatter", "fill_", "stack", "select_scatter"),
}
ASKS = ("_local_scalar_dense", "nonzero")


@dataclass
class ProfileArguments:
    models: list[str] = field(default_factory=lambda: ["examples/checkpoints/insnext-mini"])
    output: str = field(default=f"{RESULTS}/profile_step", metadata={"help": "Writes .json and .md."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    lengths: list[int] = field(default_factory=lambda: [32, 256, 1024])
    steps: int = field(default=8, metadata={"help": "Steps that are measured, after one that warms up."})
    operators: int = field(default=8, metadata={"help": "Dearest operators that are listed."})


class Operators(TorchDispatchMode):
    """Counts and times the operators of the steps that a clock has begun, processor time."""

    def __init__(self, clock: StepClock):
        super().__init__()
        self.clock, self.seen = clock, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        begun = time.thread_time_ns()
        out = func(*args, **(kwargs or {}))
        self.seen.append((self.clock.begun, func.overloadpacket.__name__, time.thread_time_ns() - begun))
        return out

    def a_step(self) -> tuple[Counter, Counter]:
        """Return calls and milliseconds of each operator a step, between the first step and the last."""
        last, counts, times = self.clock.begun, Counter(), Counter()
        for turn, name, spent in self.seen:
            if 0 < turn < last:
                counts[name] += 1 / (last - 1)
                times[name] += spent / 1e6 / (last - 1)
        return counts, times


def kind_of(operator: str) -> str:
    return next((kind for kind, names in KINDS.items() if operator.startswith(names)), "bookkeeping")


def profiled(model, rows: int, tokens: int, steps: int) -> dict:
    """Return a step's milliseconds and, a step, operators by kind and by name."""
    with StepClock(model) as clock:
        write(model, tokens, steps + 2, rows)
    step = median(clock.steps()) * 1e3
    with StepClock(model) as clock, Operators(clock) as operators:
        write(model, tokens, steps + 2, rows)
    counts, times = operators.a_step()
    by_kind, number = Counter(), Counter()
    for name in times:
        by_kind[kind_of(name)] += times[name]
        number[kind_of(name)] += counts[name]
    return {
        "step_ms": step,
        "ms": dict(by_kind),
        "python_ms": max(step - sum(by_kind.values()), 0.0),
        "operators": dict(number),
        "asks": sum(counts[name] for name in ASKS),
        "dearest": [(name, round(counts[name], 1), ms) for name, ms in times.most_common(12)],
    }


def row_of(found: dict) -> list[str]:
    kinds = [*KINDS, "bookkeeping"]
    return [
        f"{found['step_ms']:.2f}",
        *(f"{found['ms'].get(kind, 0):.2f} ({found['operators'].get(kind, 0):.0f})" for kind in kinds),
        f"{found['python_ms']:.2f}",
        f"{found['asks']:.0f}",
    ]


def markdown(rows: list[dict], operators: int) -> str:
    lines = [
        "| model | rows | n | step ms | weights ms (operators) | attention | copies | bookkeeping | Python ms "
        "| questions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join([row["model"], str(row["rows"]), str(row["n"]), *row_of(row)]) + " |" for row in rows]
    lines += ["", "Dearest operators: calls and milliseconds a step.", ""]
    for row in rows:
        named = ", ".join(f"{name} {count:.0f}: {ms:.2f}" for name, count, ms in row["dearest"][:operators])
        lines.append(f"- {row['model']}, {row['rows']} rows, n = {row['n']}: {named}")
    return "\n".join(lines)


def main():
    (args,) = HfArgumentParser(ProfileArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    rows = []
    for path in args.models:
        model = InsNextForInsertionLM.from_pretrained(path, dtype=torch.float32).eval()
        for batch in args.batch_sizes:
            for tokens in args.lengths:
                found = profiled(model, batch, tokens, args.steps)
                rows.append({"model": path.rstrip("/").split("/")[-1], "rows": batch, "n": tokens, **found})
                report = {
                    "command": command(__file__),
                    "rows": rows,
                    "environment": environment(threads=1, dtype="float32"),
                }
                write_report(args.output, report, markdown(rows, args.operators))


if __name__ == "__main__":
    main()
