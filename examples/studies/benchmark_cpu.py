"""What a step of insertion costs on a CPU, against what a user would run instead: ratios, each measured in turns.

    python examples/studies/benchmark_cpu.py --source LLAMA --model CONVERTED

LLAMA is a causal language model, CONVERTED what `python -m conversion.from_llama LLAMA CONVERTED --to insnext` makes
of it. Both sides of a ratio go step by step in turns, in one process, on one thread, in float32; a ratio is the median
of those of neighbouring steps, with their quartiles. Texts grow in their middle. Rows that miss their goal stay; where
one fails that is said, and the others go on.
`--smoke` runs everything once on a tiny model, for a test.
"""

import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from cpu_rows import ROWS, Sides, tiny_models
from report import RESULTS, command, environment, write_report
from transformers import HfArgumentParser


@dataclass
class CpuArguments:
    model: str = field(default="insnext-smol-base", metadata={"help": "The converted InsNeXt."})
    source: str = field(default="llama", metadata={"help": "The causal language model that it was made of."})
    mini: str = field(default="examples/checkpoints/insnext-mini", metadata={"help": "A small InsNeXt."})
    output: str = field(default=f"{RESULTS}/benchmark_cpu", metadata={"help": "Writes .json and .md."})
    rows: list[str] = field(default_factory=lambda: list(ROWS), metadata={"help": f"Of {', '.join(ROWS)}."})
    lengths: list[int] = field(default_factory=lambda: [32, 256, 1024])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    steps: int = field(default=12, metadata={"help": "Steps of each side of a ratio."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and few steps: that it runs, no figures."})

    def __post_init__(self):
        unknown = sorted(set(self.rows) - set(ROWS))
        if unknown:
            raise ValueError(f"rows must be of {', '.join(ROWS)}, got {', '.join(unknown)}")
        if self.steps < 4:
            raise ValueError(f"steps must be at least 4, got {self.steps}: the first and the last do not count")


@dataclass
class Ratio:
    """One line of the table: `milliseconds` of both sides, and of the ratio its quartiles."""

    what: str
    against: str
    goal: float | None
    ratio: float
    low: float
    high: float
    milliseconds: tuple[float, float]
    count: int

    @classmethod
    def of(cls, sides: Sides) -> "Ratio":
        count = min(len(sides.ours), len(sides.theirs))
        ours, theirs = np.asarray(sides.ours)[:count], np.asarray(sides.theirs)[:count]
        low, middle, high = np.quantile(ours / theirs, [0.25, 0.5, 0.75])
        medians = float(np.median(ours) * 1e3), float(np.median(theirs) * 1e3)
        return cls(sides.what, sides.against, sides.goal, float(middle), float(low), float(high), medians, count)


def markdown(ratios: list[Ratio], left_out: dict[str, str]) -> str:
    lines = [
        "| what | against | goal | ratio | quartiles | ours | theirs | pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ratios:
        ours, theirs = (f"{value:.2f}" for value in row.milliseconds)
        goal = "" if row.goal is None else f"{row.goal:.3g}"
        cells = [row.what, row.against, goal, f"{row.ratio:.2f}", f"{row.low:.2f} to {row.high:.2f}"]
        lines.append("| " + " | ".join([*cells, ours, theirs, str(row.count)]) + " |")
    lines += ["", "Milliseconds of processor time, MiB where it says memory."]
    lines += [f"Not measured: {name}, {reason}." for name, reason in left_out.items()]
    return "\n".join(lines)


def main():
    (args,) = HfArgumentParser(CpuArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ratios, left_out, began = [], {}, time.time()
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            args.source, args.model, args.mini = tiny_models(Path(folder))
            args.lengths, args.batch_sizes, args.steps = [8, 12], [1, 2], 4
        failed = [name for name in args.rows if not measured(args, name, ratios, left_out, began)]
        save(args, ratios, left_out, began)
    if failed:
        sys.exit(f"rows that failed: {', '.join(failed)}")


def measured(args, name: str, ratios: list[Ratio], left_out: dict[str, str], began: float) -> bool:
    """Add the lines of a row and return whether it ended well; one that fails is said to, and the others go on."""
    try:
        for sides in ROWS[name](args):
            if isinstance(sides, str):
                left_out[name] = sides
                continue
            ratios.append(Ratio.of(sides))
            # after every line: what was measured stays whatever ends the run
            save(args, ratios, left_out, began)
    except Exception as error:
        traceback.print_exc()
        # the message may name folders of this machine
        left_out[name] = f"it failed with {type(error).__name__}"
        return False
    return True


def save(args, ratios: list[Ratio], left_out: dict[str, str], began: float) -> None:
    minutes = round((time.time() - began) / 60, 1)
    line = command(__file__)
    # where models lie is each reader's own
    for path, name in ((args.model, "CONVERTED"), (args.source, "LLAMA")):
        line = line.replace(path, name)
    report = {
        "command": line,
        "ratios": [asdict(ratio) for ratio in ratios],
        "left_out": left_out,
        "environment": environment(threads=1, dtype="float32", minutes=minutes),
    }
    write_report(args.output, report, markdown(ratios, left_out))


if __name__ == "__main__":
    main()
