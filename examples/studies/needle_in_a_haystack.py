"""Can a model find what it read long ago? Needles at many lengths, for DRT and its baselines.

    python examples/studies/needle_in_a_haystack.py --models drt=examples/checkpoints/drt-mini \
        --haystack data/books/valid.npy --lengths 1024 4096 16384 65536 262144 1048576 \
        --samples 100 100 100 100 40 20 --output examples/studies/results/needles

A text of `length` tokens with its needle and one question (modeling_insnext.tasks.needles) is read by `prefill`, in
segments and with the upper layers on its end only, which is exact; then the answer is asked for. `exact` is the share
of whole answers, every token greedily right; `published` scores as DRT's authors do: the first token of a passkey or
value, the last one of a chain given the others. Every figure comes with n and its 95 % Wilson interval. Chunk memory
may lie in host memory or in a file (`--location`). A haystack shorter than the text is repeated.

    python examples/studies/needle_in_a_haystack.py --models memory=runs/merged --haystack books/valid.jsonl.gz \
        --kinds word_passkey word_multi_key word_variable_tracking --depths 0 0.25 0.5 0.75 1 \
        --word_options '{"variable_tracking": {"hops": 1}}' --lengths 2048 8192 32768 131072 --samples 50

Kinds that begin with `word_` hide sentences (modeling_insnext.tasks.word_needles) in books, essays, code or `noise`,
and have no published score. `--depths` takes the samples of a length through a grid of places in turn.

Models without retrieval see a window a layer and nothing else: they read only the end of the text that they can see.
"""

import json
import time
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
import torch
from report import command, environment, write_report
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from modeling_insnext import ChunkMemoryCache
from modeling_insnext.tasks import (
    NEEDLE_KINDS,
    NeedleTally,
    NeedleTask,
    WordNeedleTask,
    draw_needles,
    needle_scores,
    read_haystack,
)


@dataclass
class Arguments:
    models: list[str] = field(metadata={"help": "name=folder, one or more; the first one's tokenizer is used."})
    haystack: str = field(metadata={"help": "Token ids, .npy, texts, .txt or .jsonl, also as .gz, or noise."})
    kinds: list[str] = field(
        default_factory=lambda: list(NEEDLE_KINDS), metadata={"help": "Also word_passkey and so on."}
    )
    word_options: str = field(
        default="{}",
        metadata={"help": "Options of WordNeedleTask by its kinds, JSON: hops, num_digits, num_noise, ..."},
    )
    depths: list[float] | None = field(
        default=None, metadata={"help": "Where needles in words stand, 0 to 1, by turns; default: anywhere."}
    )
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16384], metadata={"help": "Tokens a text."})
    samples: list[int] = field(
        default_factory=lambda: [100], metadata={"help": "Texts a length: one number, or one each."}
    )
    num_ids: int = field(default=5, metadata={"help": "Random ids of a passkey, a value or a variable."})
    id_range: str = field(
        default="null", metadata={"help": "First and one past the last id of random strings, JSON; null: all."}
    )
    num_noise: int | None = field(default=None, metadata={"help": "Needles nobody asks for; else the kind's."})
    batch_tokens: int = field(default=65536, metadata={"help": "Rows are read together up to so many tokens."})
    segment_length: int = field(default=16384, metadata={"help": "Tokens of a row read at a time."})
    location: str = field(default="device", metadata={"help": "Where chunks lie: device, host or disk."})
    seed: int = 0
    output: str = field(default="runs/needles", metadata={"help": "Writes .json, .md and .png."})


def load(argument: str):
    name, _, folder = argument.partition("=")
    if not folder:
        raise ValueError(f"models must be name=folder, got {argument!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return name, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval(), folder


def visible(config, ids: torch.Tensor) -> torch.Tensor:
    """Return the end of the text that can reach its last token: all of it with retrieval, full attention or sinks."""
    if config.retrieval_groups or config.sliding_window is None or config.num_sink_tokens:
        return ids
    return ids[:, -config.num_hidden_layers * (config.sliding_window - 1) - 1 :]


@torch.no_grad()
def last_logits(model, samples: list, arguments: Arguments) -> torch.Tensor:
    """Return the logits `[B, K, V]` of the texts' last tokens, from the end of the question on."""
    end = samples[0].questions[0].end
    ids = torch.from_numpy(np.stack([sample.input_ids for sample in samples]).astype(np.int64)).to(model.device)
    past = ChunkMemoryCache(model.config, location=arguments.location, crop_margin=0)
    model.prefill(
        visible(model.config, ids[:, :end]),
        past_key_values=past,
        segment_length=arguments.segment_length,
        lower_only=True,
    )
    return model(ids[:, end:], past_key_values=past).logits.float().cpu()


def make_tasks(kind: str, model, tokenizer, arguments: Arguments) -> list:
    """Return the task of a kind, for needles in words one for each depth."""
    chunk_size = model.config.chunk_size
    if kind.startswith("word_"):
        kind = kind.removeprefix("word_")
        options = json.loads(arguments.word_options).get(kind, {})
        depths = arguments.depths or [None]
        return [WordNeedleTask(kind, tokenizer, chunk_size, depth=depth, **options) for depth in depths]
    if arguments.depths:
        raise ValueError(f"depths are for needles in words, got {arguments.depths} and {kind}")
    options = {"num_ids": arguments.num_ids, "num_noise": arguments.num_noise}
    return [NeedleTask(kind, tokenizer, chunk_size, id_range=json.loads(arguments.id_range), **options)]


def evaluate(model, tasks: list, haystack, length: int, count: int, arguments: Arguments, progress) -> dict:
    """Ask `count` texts, of the tasks by turns; where there are several, each has its own figures too."""
    tally, by_task = NeedleTally(), [NeedleTally() for _ in tasks]
    rows = max(1, min(arguments.batch_tokens // length, count))
    start = time.perf_counter()
    for first in range(0, count, rows):
        indices = range(first, min(first + rows, count))
        drawn = [tasks[index % len(tasks)] for index in indices]
        samples = [
            draw_needles(task, haystack, length, index, arguments.seed)
            for task, index in zip(drawn, indices, strict=True)
        ]
        for index, sample, logits in zip(indices, samples, last_logits(model, samples, arguments), strict=True):
            scores = needle_scores(logits, sample)
            tally.add(scores)
            by_task[index % len(tasks)].add(scores)
        progress.update(len(samples))
    cell = {**tally.summary(), "seconds_a_text": (time.perf_counter() - start) / count}
    if len(tasks) > 1:
        cell["depths"] = {str(t.depth): one.summary()["exact"] for t, one in zip(tasks, by_task, strict=True)}
    return cell


def in_words(cell: dict) -> str:
    if not cell["n"]:
        return "-"
    rate, low, high = (100 * cell[name] for name in ("rate", "low", "high"))
    return f"{rate:.1f} % (n={cell['n']}, {low:.1f}-{high:.1f})"


def markdown(report: dict) -> str:
    """Return a table: a row for each model and kind, a column for each length."""
    lengths = report["lengths"]
    lines = [
        "| model | needle | score | " + " | ".join(f"{length:,}" for length in lengths) + " |",
        "|---|---|---|" + "---|" * len(lengths),
    ]
    for name, kinds in report["results"].items():
        for kind, by_length in kinds.items():
            for score in ("exact", "published"):
                cells = " | ".join(in_words(by_length[str(length)][score]) for length in lengths)
                lines.append(f"| {name} | {kind} | {score} | {cells} |")
    return "\n".join(lines)


def plot(report: dict, path: str) -> None:
    """Draw whole answers by length, one panel a kind, with the intervals."""
    kinds = report["kinds"]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.4), sharey=True, layout="constrained")
    for axis, kind in zip(np.atleast_1d(axes), kinds, strict=True):
        for name, results in report["results"].items():
            cells = [results[kind][str(length)]["exact"] for length in report["lengths"]]
            share, low, high = (np.array([100 * cell[key] for cell in cells]) for key in ("rate", "low", "high"))
            axis.errorbar(
                report["lengths"], share, [share - low, high - share], marker="o", ms=4, capsize=2, lw=1.2, label=name
            )
        axis.set_xscale("log", base=4)
        names = [f"{n >> 20}M" if n >= 1 << 20 else f"{n / 1024:g}K" for n in report["lengths"]]
        axis.set_xticks(report["lengths"], names, minor=False)
        axis.set(title=kind.replace("_", " "), xlabel="tokens", ylim=(-4, 104))
    np.atleast_1d(axes)[0].set_ylabel("whole answers, %")
    np.atleast_1d(axes)[-1].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Arguments) -> None:
    counts = arguments.samples if len(arguments.samples) > 1 else arguments.samples * len(arguments.lengths)
    if len(counts) != len(arguments.lengths):
        raise ValueError(f"samples must be one number or one for each length, got {arguments.samples}")
    models = [load(argument) for argument in arguments.models]
    tokenizer = AutoTokenizer.from_pretrained(models[0][2])
    haystack = read_haystack(arguments.haystack, tokenizer)
    results = {}
    total = len(models) * len(arguments.kinds) * sum(counts)
    with tqdm(total=total, unit="text") as progress:
        for name, model, _ in models:
            for kind in arguments.kinds:
                tasks = make_tasks(kind, model, tokenizer, arguments)
                for length, count in zip(arguments.lengths, counts, strict=True):
                    cell = evaluate(model, tasks, haystack, length, count, arguments, progress)
                    results.setdefault(name, {}).setdefault(kind, {})[str(length)] = cell
                    progress.write(f"{name} {kind} {length:,}: {in_words(cell['exact'])}")
    report = {
        "command": command(__file__),
        "environment": environment(threads=torch.get_num_threads()),
        "kinds": arguments.kinds,
        "lengths": arguments.lengths,
        "results": results,
    }
    write_report(arguments.output, report, markdown(report))
    plot(report, f"{arguments.output}.png")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
