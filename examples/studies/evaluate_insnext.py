"""What re-encoding (EBR) costs and is worth: losses of the next insertion, and keyword texts on CommonGen.

    python examples/studies/evaluate_insnext.py --data_dir DATA --corpus data

1. Next insertion. Held-out texts are cut at a random step of a gap-wise insertion order; the same next insertion is
   scored from the append-only cache (given tokens encoded together, written ones one by one) and from the same text
   just re-encoded as one block.
2. Writing. The concepts of CommonGen dev are keywords in the order given; greedy texts with EBR off, at ratio 1 and at
   every step. Coverage counts concepts that stand in the text as whole words; BLEU is sacrebleu's, all references;
   both are modules of examples/metrics.
"""

from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import torch
from report import RESULTS, Study, command, environment, write_report
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser

from modeling_insnext import InsNextForInsertionLM
from modeling_insnext.data import ContextMixture, InsertionCollator, load_texts, rarity_table, word_start_table
from modeling_insnext.runs import read_rows


@dataclass
class EvaluationArguments:
    data_dir: str = field(metadata={"help": "Folder that holds commongen/dev.jsonl."})
    corpus: str = field(default="data", metadata={"help": "Folder that prepare_corpus.py wrote."})
    model: str = "examples/checkpoints/insnext-mini"
    output: str = field(default=f"{RESULTS}/insnext_mini", metadata={"help": "Results, without .json and .md."})
    texts: int = field(default=400, metadata={"help": "Held-out texts of each source."})
    concept_sets: int = field(default=993, metadata={"help": "CommonGen dev sets to write."})
    batch_size: int = 32
    threads: int = 1


METRICS = Path(__file__).parents[1] / "metrics"
WRITING = {
    "EBR off": {"ebr": False},
    "EBR ratio 1": {"ebr": True, "ebr_ratio": 1.0},
    "re-encoded at every step": {"ebr": True, "ebr_ratio": 0.0},
}


def next_insertion_losses(model, collator, texts: list[dict], batch_size: int, seed: int = 0) -> np.ndarray:
    """Return position and token loss of one insertion a text, from the cache and re-encoded, `[n, 2, 2]`, in nats."""
    rng = np.random.default_rng(seed)
    rows = []
    for first in tqdm(range(0, len(texts), batch_size), desc="next insertion", disable=None):
        batch = collator(texts[first : first + batch_size])
        written = batch["labels"] != -100
        keep = written.any(1)
        batch = {name: tensor[keep] for name, tensor in batch.items()}
        written = written[keep]
        chosen = torch.tensor([rng.choice(row.nonzero().squeeze(1).numpy()) for row in written])
        index = torch.arange(written.shape[1])
        labels = torch.where(index == chosen[:, None], batch["input_ids"], -100)
        # everything before the chosen entry becomes one block
        block = torch.where(index < chosen[:, None], chosen[:, None] - 1, batch["horizon"])
        for row in range(len(labels)):
            pair = []
            for horizon in (batch["horizon"], block):
                out = model(
                    batch["input_ids"][row : row + 1],
                    positions=batch["positions"][row : row + 1],
                    start=batch["start"][row : row + 1],
                    horizon=horizon[row : row + 1],
                    labels=labels[row : row + 1],
                    stop_targets=torch.zeros_like(labels[row : row + 1], dtype=torch.bool),
                )
                pair.append([out.position_loss.item(), out.token_loss.item()])
            rows.append(pair)
    return np.array(rows)


def summary(losses: np.ndarray) -> dict:
    """Return means and the paired difference of the total with the half-width of its 95 % interval."""
    total = losses.sum(2)
    difference = total[:, 1] - total[:, 0]
    return {
        "n": len(losses),
        "cache": {"position": losses[:, 0, 0].mean(), "token": losses[:, 0, 1].mean(), "total": total[:, 0].mean()},
        "re-encoded": {
            "position": losses[:, 1, 0].mean(),
            "token": losses[:, 1, 1].mean(),
            "total": total[:, 1].mean(),
        },
        "difference": difference.mean(),
        "interval": 1.96 * difference.std(ddof=1) / len(difference) ** 0.5,
    }


def concept_sets(data_dir: str, count: int) -> list[dict]:
    """Return the first `count` rows of CommonGen dev."""
    return read_rows(Path(data_dir, "commongen", "dev.jsonl"), count)


def written_by_checkpoint(measure, table, args) -> Study:
    """Return what `measure(model, tokenizer, rows, batch_size)` finds for an InsNeXt checkpoint and CommonGen dev.

    Args:
        measure: The study.
        table: From its results to markdown.
        args: `data_dir`, `checkpoint`, `concept_sets` and `batch_size`.
    """
    rows = concept_sets(args.data_dir, args.concept_sets)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = InsNextForInsertionLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    results = measure(model, tokenizer, rows, args.batch_size)
    return Study(results, table(results), {"sets": len(rows)})


def write_texts(
    model, tokenizer, rows: list[dict], batch_size: int, ordered: bool = True, **options
) -> tuple[list[str], float]:
    """Return a text around the concepts of each row, ordered so or not, and tokens encoded per token written.

    Without a penalty on repetition in `options` there is none, whatever the checkpoint's default.
    """
    options = {"repetition_penalty": 1.0, **options}
    texts, encoded, written = [], 0, 0
    for first in tqdm(range(0, len(rows), batch_size), desc=str(options), disable=None):
        concepts = [row["concepts"] for row in rows[first : first + batch_size]]
        canvas = model.canvas(tokenizer, keywords=concepts, ordered=ordered).to(model.device)
        out = model.generate(**canvas, max_new_tokens=40, return_dict_in_generate=True, **options)
        texts += [text.strip() for text in tokenizer.batch_decode(out.sequences, skip_special_tokens=True)]
        encoded += int(out.encoded_tokens.sum())
        written += int((out.insertion_steps > 0).sum())
    return texts, encoded / written


def judge_texts(texts: list[str], rows: list[dict]) -> dict:
    """Return coverage, and BLEU with a bootstrap interval."""
    coverage, bleu = (evaluate.load(f"{METRICS}/{name}") for name in ("keyword_coverage", "bleu"))
    covered = coverage.compute(predictions=texts, references=[row["concepts"] for row in rows])
    references = [row["references"] for row in rows]
    score = bleu.compute(predictions=texts, references=references, lowercase=True, bootstrap=1000)
    return {
        "coverage": covered["coverage"],
        "bleu": score["mean"],
        "bleu_interval": score["interval"],
        "brevity_penalty": score["brevity_penalty"],
        "examples": texts[:10],
    }


def markdown(results: dict) -> str:
    lines = ["| held-out texts | n | from the cache | just re-encoded | difference (95 %) |", "|---|---|---|---|---|"]
    for source, row in results["next_insertion"].items():
        cache, again = (
            f"{row[key]['total']:.3f} ({row[key]['position']:.3f} + {row[key]['token']:.3f})"
            for key in ("cache", "re-encoded")
        )
        lines.append(
            f"| {source} | {row['n']} | {cache} | {again} | {row['difference']:+.3f} ± {row['interval']:.3f} |"
        )
    lines += ["", "Nats per insertion, in brackets position + token.", ""]
    lines += ["| CommonGen dev, greedy | coverage | BLEU (95 %) | encoded per written token |", "|---|---|---|---|"]
    for mode, row in results["writing"].items():
        bleu = f"{row['bleu']:.2f} ± {row['bleu_interval']:.2f}"
        lines.append(f"| {mode} | {row['coverage']:.1%} | {bleu} | {row['encoded_per_written']:.2f} |")
    return "\n".join(lines)


def main():
    (args,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = InsNextForInsertionLM.from_pretrained(args.model, dtype=torch.float32).eval()
    heldout = load_texts(f"{args.corpus}/heldout.npz")
    collator = InsertionCollator(
        pad_token_id=tokenizer.pad_token_id,
        order="gap_left_to_right",
        contexts=ContextMixture(keywords=0.5, words=0.5),
        word_starts=word_start_table(tokenizer),
        token_rarity=rarity_table([text["input_ids"] for text in heldout], len(tokenizer)),
        max_length=256,
        truncate=True,
    )
    results = {"command": command(__file__, data_dir=args.data_dir), "next_insertion": {}, "writing": {}}
    with torch.no_grad():
        for source in ("commongen", "books"):
            texts = [text for text in heldout if text["source"] == source][: args.texts]
            losses = next_insertion_losses(model, collator, texts, args.batch_size)
            results["next_insertion"][source] = summary(losses)
    rows = concept_sets(args.data_dir, args.concept_sets)
    for mode, options in WRITING.items():
        texts, cost = write_texts(model, tokenizer, rows, args.batch_size, **options)
        results["writing"][mode] = {**judge_texts(texts, rows), "encoded_per_written": cost}
    results["environment"] = environment(threads=args.threads)
    write_report(args.output, results, markdown(results))


if __name__ == "__main__":
    main()
