"""CommonGen dev: what fine-tuning, the order of writing and re-encoding are worth to InsNeXt.

    python examples/studies/commongen_table.py --data_dir DATA --output examples/studies/results/commongen

The concepts as they are, in the order given, are the canvas, or they are placed while the text is written; it writes
around them, greedily, into one place a step or into up to four. Coverage counts concepts that stand in the text as
whole words.
BLEU is sacrebleu's, all references, without case, with the 95 % interval of a bootstrap over texts; the p-values are
of its paired bootstrap. The adapter is trained by `run_finetuning.py` on CommonGen's training texts, which the
pre-trained model has seen in its mixture. A training that ended is not run again: interrupted, the command goes on.
"""

from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from evaluate_insnext import WRITING, concept_sets, judge_texts, write_texts
from peft import PeftModel
from report import RESULTS, Study, run_script, run_study
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from transformers import AutoTokenizer

from modeling_insnext import InsNextForInsertionLM


ORDERS = {
    "one place a step": {},
    "four places a step": {"parallel_slots": 4},
    "concepts placed while writing": {"ordered": False},
}
PRETRAINED, EBR_OFF = "pre-trained", "EBR off"


@dataclass
class CommonGenArguments:
    data_dir: str = field(metadata={"help": "Folder with commongen/."})
    checkpoint: str = field(default="examples/checkpoints/insnext-mini", metadata={"help": "An InsNeXt model."})
    output: str = field(default=f"{RESULTS}/commongen", metadata={"help": "Writes .json and .md."})
    runs: str = field(default="runs/commongen", metadata={"help": "Folder of the trainings."})
    max_steps: int = field(default=1500, metadata={"help": "Optimiser steps of 64 texts."})
    learning_rate: float = 2e-3
    seed: int = 0
    concept_sets: int = field(default=993, metadata={"help": "CommonGen dev sets to write."})
    batch_size: int = field(default=32, metadata={"help": "Sets written at once."})


def train_adapter(args: CommonGenArguments) -> Path:
    """Return the folder of the adapter, trained if it is not there yet."""
    folder = Path(args.runs) / f"lora-{args.max_steps}-{args.learning_rate}-{args.seed}"
    if not (folder / "adapter_config.json").exists():
        data = ["--train_file", f"{args.data_dir}/commongen/train.jsonl.gz", "--cache_dir", f"{args.runs}/cache"]
        task = ["--task", "keywords", "--text_column", "references", "--keywords_column", "concepts"]
        model = ["--model_name_or_path", args.checkpoint, "--adapter", "lora", "--lora_target_modules", "all-linear"]
        model += ["--lora_r", "16", "--lora_alpha", "32"]
        steps = ["--do_train", "--max_steps", str(args.max_steps), "--per_device_train_batch_size", "64"]
        steps += ["--learning_rate", str(args.learning_rate), "--lr_scheduler_type", "cosine", "--warmup_steps", "100"]
        steps += ["--save_steps", "250", "--save_total_limit", "2", "--logging_steps", "20", "--report_to", "none"]
        steps += ["--seed", str(args.seed), "--output_dir", str(folder)]
        run_script("run_finetuning.py", [*model, *task, *data, *steps])
    return folder


def load(args: CommonGenArguments, adapter: Path | None) -> InsNextForInsertionLM:
    model = InsNextForInsertionLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter).merge_and_unload()).eval()


def p_value(texts: list[str], baseline: list[str], rows: list[dict]) -> float:
    """Return how often a difference in BLEU as large as that of two systems would come by chance."""
    if texts == baseline:
        return 1.0
    columns = list(zip_longest(*(row["references"] for row in rows)))
    systems = [("baseline", baseline), ("system", texts)]
    test = PairedTest(systems, {"BLEU": BLEU(lowercase=True)}, columns, test_type="bs", n_samples=1000)
    return float(test()[1]["BLEU"][1].p_value)


def measure(args: CommonGenArguments, rows: list[dict]) -> list[dict]:
    """Return one result a model, order and way of re-encoding."""
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    written, results = {}, []
    for name, adapter in ((PRETRAINED, None), ("LoRA", train_adapter(args))):
        model = load(args, adapter)
        for order, direction in ORDERS.items():
            for mode, ebr in WRITING.items():
                texts, cost = write_texts(model, tokenizer, rows, args.batch_size, **direction, **ebr)
                written[name, order, mode] = texts
                result = {"model": name, "order": order, "mode": mode, **judge_texts(texts, rows)}
                for baseline in ("model", "mode"):
                    other = {"model": (PRETRAINED, order, mode), "mode": (name, order, EBR_OFF)}[baseline]
                    if other != (name, order, mode):
                        result[f"p_{baseline}"] = p_value(texts, written[other], rows)
                results.append({**result, "encoded_per_written": cost})
    return results


def table(results: list[dict]) -> str:
    head = "model | order | re-encoding | coverage | BLEU (95 %) | p, pre-trained | p, EBR off | encoded a token"
    lines = [f"| {head} |", "|---" * 8 + "|"]
    for row in results:
        bleu = f"{row['bleu']:.2f} ± {row['bleu_interval']:.2f}"
        chance = " | ".join(f"{row[name]:.3f}" if name in row else "" for name in ("p_model", "p_mode"))
        lines.append(
            f"| {row['model']} | {row['order']} | {row['mode']} | {row['coverage']:.1%} | {bleu} | {chance} | "
            f"{row['encoded_per_written']:.2f} |"
        )
    return "\n".join(lines)


def study(args: CommonGenArguments) -> Study:
    """Train what has not been trained, and write sentences of concepts with every model."""
    rows = concept_sets(args.data_dir, args.concept_sets)
    results = measure(args, rows)
    return Study(results, table(results), {"sets": len(rows), "steps": args.max_steps, "seed": args.seed})


def main(argv: list[str] | None = None) -> dict:
    """Train what has not been trained, write, and write the table; returns the report."""
    return run_study(__file__, CommonGenArguments, study, argv)


if __name__ == "__main__":
    main()
