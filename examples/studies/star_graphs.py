"""Can an insertion model plan? Train small models on star graphs and count the exact answers of several ways to write.

    for order in uniform left_to_right; do
      python examples/studies/star_graphs.py --graphs medium --order $order --output_dir runs/star_$order \
        --do_train --do_eval --max_steps 2700 --per_device_train_batch_size 64 --learning_rate 1e-3
    done

One model learns all kinds of `--graphs`. Training writes `output_dir/final`; evaluation reads it and puts a row for
each kind into `--results`, a JSON file with tables in markdown beside it. The graphs and their texts:
modeling_insnext/tasks/star_graphs.py.
"""

import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from report import RESULTS, command
from transformers import HfArgumentParser, TrainingArguments, set_seed

from modeling_insnext import InsNextConfig, InsNextForInsertionLM
from modeling_insnext.data import ContextMixture, InsertionCollator
from modeling_insnext.insertion_trainer import InsertionTrainer
from modeling_insnext.runs import write_atomically
from modeling_insnext.tasks.star_graphs import (
    BOS,
    EOS,
    NUM_SPECIAL,
    PAD,
    StarGraph,
    StarGraphSpec,
    draw_graph,
    get_spec,
    graph_text,
    star_texts,
)


MODES = {
    "cached": {"ebr": False},
    "ebr": {"ebr": True, "ebr_ratio": 1.0},
    "reencoded": {"ebr": True, "ebr_ratio": 0.0},
}


@dataclass
class StarArguments:
    graphs: str = field(default="easy,medium", metadata={"help": "What to train and test on: easy, medium, hard."})
    order: str = field(default="uniform", metadata={"help": "Insertion order: uniform or left_to_right."})
    reencode: float = field(default=0.3, metadata={"help": "Share of texts whose context is partly written text."})
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 320
    initializer_range: float = 0.02
    train_size: int = field(default=50_000, metadata={"help": "Graphs of each kind to train on."})
    test_size: int = field(default=1000, metadata={"help": "Graphs of each kind to test on."})
    results: str = field(default=f"{RESULTS}/star_graphs.json", metadata={"help": "Where results are gathered."})


def make_model(specs: list[StarGraphSpec], args: StarArguments) -> InsNextForInsertionLM:
    return InsNextForInsertionLM(
        InsNextConfig(
            vocab_size=max(spec.vocab_size for spec in specs),
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=args.num_attention_heads,
            intermediate_size=args.intermediate_size,
            max_position_embeddings=max(spec.max_tokens for spec in specs),
            initializer_range=args.initializer_range,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def make_collator(order: str, reencode: float = 0.0, seed: int = 0) -> InsertionCollator:
    return InsertionCollator(pad_token_id=PAD, order=order, contexts=ContextMixture(reencode=reencode), seed=seed)


def train(args: StarArguments, training: TrainingArguments) -> InsNextForInsertionLM:
    """Train from scratch; save model, log and command in `output_dir/final`."""
    kinds = args.graphs.split(",")
    model = make_model([get_spec(kind) for kind in kinds], args)
    trainer = InsertionTrainer(
        model=model,
        args=training,
        train_dataset=[text for kind in kinds for text in star_texts(kind, "train", args.train_size)],
        eval_dataset=[text for kind in kinds for text in star_texts(kind, "val")],
        data_collator=make_collator(args.order, args.reencode, training.seed),
    )
    started = time.time()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    record = {
        "command": command(__file__),
        "steps": trainer.state.global_step,
        "batch_size": training.train_batch_size,
        "learning_rate": training.learning_rate,
        "trained_on": args.graphs,
        "reencode": args.reencode,
        "seconds": round(time.time() - started),
        "history": trainer.state.log_history,
    }
    model.save_pretrained(f"{training.output_dir}/final")
    write_atomically(Path(training.output_dir, "final", "training.json"), json.dumps(record))
    return model


def make_canvas(graphs: list[StarGraph]) -> dict[str, torch.Tensor]:
    """Return the canvas of questions: all but the path's interior, one open slot, right of the start."""
    questions = [text["input_ids"][text["given"]] for text in map(graph_text, graphs)]
    width = max(map(len, questions))
    input_ids = torch.full((len(questions), width), PAD)
    slot_mask = torch.zeros(len(questions), width, dtype=torch.bool)
    for row, question in enumerate(questions):
        input_ids[row, : len(question)] = torch.from_numpy(question)
        slot_mask[row, len(question) - 2] = True
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "slot_mask": slot_mask}


def write_paths(model: InsNextForInsertionLM, graphs: list[StarGraph], max_new_tokens: int, **options):
    """Return the path that the model writes for each graph, greedily, and the tokens encoded after each question."""
    canvas = make_canvas(graphs)
    out = model.generate(
        **canvas, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, **options
    )
    given = canvas["attention_mask"].sum(1)
    lengths = (out.insertion_steps != -2).sum(1)
    paths = [
        row[first - 2 : length].numpy() - NUM_SPECIAL
        for row, first, length in zip(out.sequences, given, lengths, strict=True)
    ]
    return paths, out.encoded_tokens - given


def judge(graph: StarGraph, path: np.ndarray) -> dict[str, bool]:
    """Say what is right about a written path.

    `exact`: all of it. `fork`: the node after the centre. `wrong_arm`: the centre is followed by a node of another
    path. `length`: it has as many nodes as the answer. `edges`: every step of it is an edge.
    """
    centre = graph.path[graph.fork - 1]
    exits = graph.edges[graph.edges[:, 0] == centre, 1]
    place = np.flatnonzero(path[:-1] == centre)
    after = path[place[0] + 1] if len(place) else -1
    edges = set(map(tuple, graph.edges.tolist()))
    return {
        "exact": np.array_equal(path, graph.path),
        "fork": bool(after == graph.path[graph.fork]),
        "wrong_arm": bool(after in exits and after != graph.path[graph.fork]),
        "length": len(path) == len(graph.path),
        "edges": all(step in edges for step in zip(path[:-1].tolist(), path[1:].tolist(), strict=True)),
    }


@torch.no_grad()
def measure_mode(model, graphs: list[StarGraph], max_new_tokens: int, batch_size: int, **options) -> dict[str, float]:
    """Return the share of graphs for which each statement of `judge` holds, and tokens encoded per token written."""
    verdicts, encoded, written = [], 0, 0
    for first in range(0, len(graphs), batch_size):
        batch = graphs[first : first + batch_size]
        paths, cost = write_paths(model, batch, max_new_tokens, **options)
        verdicts += [judge(graph, path) for graph, path in zip(batch, paths, strict=True)]
        encoded += int(cost.sum())
        written += sum(len(path) - 2 for path in paths)
    shares = {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in verdicts[0]}
    return {**shares, "encoded_per_written": encoded / max(written, 1)}


@torch.no_grad()
def next_insertion_losses(model, texts: list[dict], order: str, batch_size: int) -> dict[str, dict[str, float]]:
    """Return nats of the next place, token and STOP after 1, 2, ... written tokens, from two encodings of one text.

    `cached`: what was written was encoded token by token. `reencoded`: all of it was encoded together, just now.
    """
    collator = make_collator(order)
    sums = {mode: np.zeros(3) for mode in ("cached", "reencoded")}
    counts = np.zeros(3)
    for first in range(0, len(texts), batch_size):
        batch = collator(texts[first : first + batch_size])
        given = batch["horizon"][:, 0] + 1
        num_written = (batch["labels"] != -100).sum(1)
        for s in range(1, int(num_written.max()) + 1):
            for stops, rows in ((False, num_written > s), (True, num_written == s)):
                if not rows.any():
                    continue
                part = partly_written({name: values[rows] for name, values in batch.items()}, given[rows] + s, stops)
                number = int(rows.sum())
                counts += [0, 0, number] if stops else [number, number, 0]
                for mode, losses in sums.items():
                    horizon = part["horizon"]
                    entry = torch.arange(horizon.shape[1])
                    if mode == "reencoded":
                        end = given[rows, None] + s
                        horizon = torch.where(entry < end, end - 1, horizon)
                    out = model(**{**part, "horizon": horizon}, num_items_in_batch=number)
                    parts = [0, 0, out.loss] if stops else [out.position_loss, out.token_loss, 0]
                    losses += number * np.array([float(loss) for loss in parts])
    names = ("position", "token", "stop")
    return {mode: dict(zip(names, (losses / counts).tolist(), strict=True)) for mode, losses in sums.items()}


def partly_written(batch: dict[str, torch.Tensor], end: torch.Tensor, stops: bool) -> dict[str, torch.Tensor]:
    """Supervise one decision a row, that of the state before entry `end`: the next insertion, or (`stops`) STOP."""
    entry = torch.arange(batch["labels"].shape[1])
    keep = (entry == end[:, None]) & (not stops)
    return {
        **batch,
        "labels": torch.where(keep, batch["labels"], -100),
        "stop_targets": batch["stop_targets"] & stops,
    }


def evaluate(model, kind: str, args: StarArguments, training: TrainingArguments) -> dict:
    """Return all measurements of a model on one kind of graphs, as one row of the results."""
    spec = get_spec(kind)
    graphs = [draw_graph(spec, "test", index) for index in range(args.test_size)]
    batch_size = training.per_device_eval_batch_size
    model.eval()
    started = time.time()
    modes = {
        mode: measure_mode(model, graphs, spec.max_length - 2, batch_size, **options)
        for mode, options in MODES.items()
    }
    row = {
        "graphs": kind,
        "order": args.order,
        "parameters": model.num_parameters(),
        "test_size": args.test_size,
        "chance_at_fork": 1 / spec.degree,
        "modes": modes,
        "next_insertion": next_insertion_losses(model, list(map(graph_text, graphs)), args.order, batch_size),
        "eval_seconds": round(time.time() - started),
        "eval_command": command(__file__),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores",
    }  # fmt: skip
    log = Path(training.output_dir, "final", "training.json")
    return {**row, "training": json.loads(log.read_text())}


def row_key(row: dict) -> tuple:
    return row["graphs"], row["training"]["trained_on"], row["order"] != "uniform"


def save_results(row: dict, path: Path) -> None:
    """Put a row into the results, in the place of an older one of the same kind, and write the tables."""
    rows = json.loads(path.read_text()) if path.is_file() else []
    rows = sorted([old for old in rows if row_key(old) != row_key(row)] + [row], key=row_key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(rows, indent=1))
    write_atomically(path.with_suffix(".md"), markdown(rows))


def markdown(rows: list[dict]) -> str:
    """Return the results as tables."""
    lines = [
        "# Star graphs", "",
        "Shares of test graphs, greedy decoding; chance at the fork is 1 / degree. Made by",
        "`examples/studies/star_graphs.py`.", "",
        "| graphs | trained on | order | decoding | exact | right at the fork | another arm | encoded per token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    names = {id(row): f"| {row['graphs']} | {row['training']['trained_on']} | {row['order']} |" for row in rows}
    for row in rows:
        for mode, shares in row["modes"].items():
            shown = " | ".join(f"{100 * shares[name]:.1f} %" for name in ("exact", "fork", "wrong_arm"))
            lines.append(f"{names[id(row)]} {mode} | {shown} | {shares['encoded_per_written']:.1f} |")
    lines += [
        "", "Nats of the next decision, from the same partly written texts (one token or more written).", "",
        "| graphs | trained on | order | encoding | position | token | STOP |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        for mode, losses in row["next_insertion"].items():
            shown = " | ".join(f"{loss:.3f}" for loss in losses.values())
            lines.append(f"{names[id(row)]} {mode} | {shown} |")
    lines += [
        "", "| graphs | trained on | order | parameters | steps | batch | minutes | test graphs | machine |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        run = row["training"]
        size = f"{row['parameters']:,} | {run['steps']} | {run['batch_size']} | {run['seconds'] / 60:.0f}"
        lines.append(f"{names[id(row)]} {size} | {row['test_size']:,} | {row['machine']} |")
    commands = dict.fromkeys(row["training"]["command"] for row in rows)
    return "\n".join([*lines, "", "```", *commands, "```", ""])


def main():
    args, training = HfArgumentParser(
        (StarArguments, TrainingArguments), usage="%(prog)s [--ARGUMENT VALUE ...]"
    ).parse_args_into_dataclasses()
    training.remove_unused_columns = False
    set_seed(training.seed)
    if training.do_train:
        train(args, training)
    if training.do_eval:
        model = InsNextForInsertionLM.from_pretrained(f"{training.output_dir}/final")
        for kind in args.graphs.split(","):
            row = evaluate(model, kind, args, training)
            save_results(row, Path(args.results))
            print(markdown([row]))


if __name__ == "__main__":
    main()
