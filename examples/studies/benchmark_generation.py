"""What a step of insertion costs: the append-only cache, with EBR, against encoding the whole text anew at every step.

    python examples/studies/benchmark_generation.py --insertions 512

The same model writes the same number of tokens greedily from one keyword in each mode, in one run, after a warm-up;
STOP is barred until the last token. Times are wall-clock, by step.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from report import RESULTS, environment, write_report
from transformers import AutoTokenizer, CompileConfig, HfArgumentParser, StoppingCriteria

from modeling_insnext import InsNextForInsertionLM


MODES = {
    "cache": {"ebr": False},
    "cache + EBR": {"ebr": True, "ebr_ratio": 1.0},
    "cache + EBR, window 128": {"ebr": True, "ebr_ratio": 1.0, "ebr_window": 128},
    "cache + EBR, static, compiled": {
        "ebr": True,
        "ebr_ratio": 1.0,
        "cache_implementation": "static",
        "compile_config": CompileConfig(mode="default", dynamic=False),
    },
    "encode anew at every step": {"ebr": True, "ebr_ratio": 0.0},
}
ANEW = "encode anew at every step"


@dataclass
class BenchmarkArguments:
    model: str = "examples/checkpoints/insnext-mini"
    output: str = field(
        default=f"{RESULTS}/benchmark_generation", metadata={"help": "Results, without .json and .md."}
    )
    insertions: int = 512
    repeats: int = field(default=3, metadata={"help": "Runs of each mode; the median of each step counts."})
    threads: int = 1


class StepClock(StoppingCriteria):
    """Notes the time after every step and stops nothing."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def step_times(model, canvas, insertions: int, **options) -> tuple[np.ndarray, list[int], int]:
    """Return seconds of each step, the steps after which EBR struck and the tokens that went through the network."""
    clock = StepClock()
    out = model.generate(
        **canvas,
        max_new_tokens=insertions,
        min_new_tokens=insertions,
        stopping_criteria=[clock],
        return_dict_in_generate=True,
        **options,
    )
    return np.diff(clock.times)[:insertions], out.reencoded_at[0], int(out.encoded_tokens[0])


def measure(model, canvas, args) -> dict:
    results = {}
    for options in MODES.values():
        # a compiled step is made for one capacity, so it must be warmed up at full length
        warm_up = args.insertions if "compile_config" in options else min(32, args.insertions)
        step_times(model, canvas, warm_up, **options)
    runs = {name: [] for name in MODES}
    for _ in range(args.repeats):
        for name, options in MODES.items():
            runs[name].append(step_times(model, canvas, args.insertions, **options))
    for name, measured in runs.items():
        seconds = np.median([times for times, _, _ in measured], axis=0)
        _, struck, encoded = measured[0]
        marks = [n for n in (16, 64, 128, 256, 512, 1024, 2048) if n <= args.insertions]
        in_ebr = seconds[np.array(struck, dtype=int) - 1].sum() if struck else 0.0
        results[name] = {
            "total_s": float(seconds.sum()),
            "ms_by_n": {n: float(np.median(seconds[max(n - 16, 0) : n]) * 1e3) for n in marks},
            "ebr_steps": len(struck),
            "ebr_share": float(in_ebr / seconds.sum()),
            "encoded_tokens": encoded,
        }
    for row in results.values():
        row["speed_up"] = results[ANEW]["total_s"] / row["total_s"]
    return results


def markdown(report: dict) -> str:
    marks = next(iter(report["modes"].values()))["ms_by_n"]
    lines = [
        "| mode | total s | "
        + " | ".join(f"ms a step, n = {n}" for n in marks)
        + " | EBR steps | EBR share | speed-up |",
        "|---|---|" + "---|" * len(marks) + "---|---|---|",
    ]
    for name, row in report["modes"].items():
        cells = [name, f"{row['total_s']:.2f}", *(f"{ms:.2f}" for ms in row["ms_by_n"].values())]
        cells += [str(row["ebr_steps"]), f"{row['ebr_share']:.1%}", f"{row['speed_up']:.1f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = InsNextForInsertionLM.from_pretrained(args.model, dtype=torch.float32).eval()
    canvas = model.canvas(tokenizer, keywords=["sea"])
    report = {
        "command": f"python examples/studies/benchmark_generation.py --insertions {args.insertions}",
        "modes": measure(model, canvas, args),
        "environment": environment(threads=args.threads, parameters=f"{model.num_parameters():,}"),
    }
    write_report(args.output, report, markdown(report))


if __name__ == "__main__":
    main()
