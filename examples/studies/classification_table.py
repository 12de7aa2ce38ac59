"""What pre-training is worth to a classifier: InsNeXt, whole and through LoRA, and the same shape untrained.

    python examples/studies/classification_table.py --data_dir DATA --output examples/studies/results/classification

SST-2 and CoLA, DATA/nlu/ as `run_classification.py` reads them. Beside the pre-trained model: the same configuration
from random weights, trained as the whole model is, and the majority class of the held-out data. Runs that ended are
not run again: interrupted, the same command goes on.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

from report import RESULTS, command, environment, run_script, write_report
from transformers import HfArgumentParser

from modeling_insnext.tasks import wilson_interval


@dataclass(frozen=True)
class Task:
    """Files of a task, optimiser steps, and the learning rate of the whole model."""

    train: str
    valid: str
    max_steps: int
    learning_rate: float


TASKS = {
    "SST-2": Task("sst2_train.jsonl.gz", "sst2_dev.jsonl", 300, 1e-3),
    "CoLA": Task("cola_in_domain_train.jsonl", "cola_in_domain_dev.jsonl", 1000, 3e-4),
}
# 97.5 % points of Student's t by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclass
class TableArguments:
    data_dir: str = field(metadata={"help": "Folder with nlu/."})
    checkpoint: str = field(default="examples/checkpoints/insnext-mini", metadata={"help": "An InsNeXt model."})
    output: str = field(default=f"{RESULTS}/classification", metadata={"help": "Writes .json and .md."})
    runs: str = field(default="runs/classification", metadata={"help": "Folder of the runs."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_steps: int | None = field(default=None, metadata={"help": "Optimiser steps of a run, in place of the task's."})
    batch_size: int = 32

    def __post_init__(self):
        if not 2 <= len(self.seeds) <= 5:
            raise ValueError(f"seeds must be 2 to 5, for intervals, got {self.seeds}")


def methods(checkpoint: str, task: Task) -> dict[str, list[str]]:
    fresh = ["--config_name", checkpoint, "--tokenizer_name", checkpoint]
    pretrained = ["--model_name_or_path", checkpoint]
    lora = ["--adapter", "lora", "--lora_target_modules", "all-linear", "--lora_r", "16", "--lora_alpha", "32"]
    return {
        "whole": [*pretrained, "--learning_rate", str(task.learning_rate)],
        "LoRA": [*pretrained, *lora, "--learning_rate", "3e-3"],
        "untrained": [*fresh, "--learning_rate", str(task.learning_rate)],
    }


def run_one(args: TableArguments, name: str, method: str, seed: int) -> dict:
    """Return the metrics of a run, from its folder if it has ended."""
    task = TASKS[name]
    max_steps = args.max_steps or task.max_steps
    folder = Path(args.runs) / f"{name}-{method}-{max_steps}-{seed}"
    ended = folder / "eval_results.json"
    if not ended.exists():
        data = Path(args.data_dir) / "nlu"
        files = ["--train_file", str(data / task.train), "--validation_file", str(data / task.valid)]
        steps = ["--do_train", "--do_eval", "--max_steps", str(max_steps), "--save_steps", "100"]
        steps += ["--per_device_train_batch_size", str(args.batch_size), "--per_device_eval_batch_size", "64"]
        steps += ["--lr_scheduler_type", "cosine", "--warmup_steps", str(max_steps // 10), "--seed", str(seed)]
        quiet = ["--report_to", "none", "--save_total_limit", "1", "--output_dir", str(folder), "--max_length", "64"]
        quiet += ["--cache_dir", str(Path(args.runs) / "cache")]
        run_script("run_classification.py", [*methods(args.checkpoint, task)[method], *files, *steps, *quiet])
    return json.loads(ended.read_text(encoding="utf-8"))


def majority(args: TableArguments, task: Task) -> dict:
    """Return the accuracy of the most frequent class of the held-out data."""
    rows = (Path(args.data_dir) / "nlu" / task.valid).read_text(encoding="utf-8").split("\n")
    labels = [json.loads(row)["label"] for row in rows if row]
    most = max(labels.count(label) for label in set(labels))
    low, high = wilson_interval(most, len(labels))
    return {"accuracy": most / len(labels), "accuracy_low": low, "accuracy_high": high, "matthews": 0.0}


def spread(values: list[float], digits: int) -> str:
    """Return the mean over seeds ± half of its 95 % interval, by Student's t."""
    half = STUDENT[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.{digits}f} ± {half:.{digits}f}"


def table(report: dict) -> str:
    lines = ["| task | method | accuracy | Matthews |", "|---|---|---|---|"]
    for task, results in report["results"].items():
        for method, runs in results.items():
            accuracy = [100 * run["eval_accuracy"] for run in runs]
            matthews = [run["eval_matthews"] for run in runs]
            cells = f"{spread(accuracy, 1)} % | {spread(matthews, 3)}"
            lines.append(f"| {task} | {method} | {cells} |")
        most = report["majority"][task]
        low, high = 100 * most["accuracy_low"], 100 * most["accuracy_high"]
        lines.append(f"| {task} | majority class | {100 * most['accuracy']:.1f} % ({low:.1f} to {high:.1f}) | 0 |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> dict:
    """Run what has not ended and write the table; returns the report."""
    (table_args,) = HfArgumentParser(TableArguments).parse_args_into_dataclasses(args)
    results = {}
    for name, task in TASKS.items():
        results[name] = {
            method: [run_one(table_args, name, method, seed) for seed in table_args.seeds]
            for method in methods(table_args.checkpoint, task)
        }
    report = {
        "command": command(__file__, args, table_args.data_dir),
        "environment": environment(seeds=table_args.seeds),
        "tasks": {name: asdict(task) for name, task in TASKS.items()},
        "results": results,
        "majority": {name: majority(table_args, task) for name, task in TASKS.items()},
    }
    write_report(table_args.output, report, table(report))
    return report


if __name__ == "__main__":
    main()
