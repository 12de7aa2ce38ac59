"""CommonGen dev: concepts as they are given, or each in one of its regular English forms, which the model chooses.

In the given order the forms are chosen before anything is written; without an order, form, place and order are chosen
while the text is written.

    python examples/studies/keyword_forms.py --data_dir DATA

Greedy, with the checkpoint's re-encoding and a penalty of 1.3 on repetition. Coverage counts concepts that stand in
the text as whole words, in the given form or in any. BLEU is sacrebleu's, all references, without case, with the 95 %
interval of a bootstrap over texts; p is of its paired bootstrap against the given forms in the same order.
"""

from dataclasses import dataclass, field
from functools import partial

import evaluate
from commongen_table import p_value
from evaluate_insnext import METRICS, judge_texts, write_texts, written_by_checkpoint
from report import RESULTS, run_study

from modeling_insnext.data import inflections


ORDERS = {"the given order": True, "no order, placed while writing": False}


@dataclass
class FormsArguments:
    data_dir: str = field(metadata={"help": "Folder that holds commongen/dev.jsonl."})
    checkpoint: str = field(default="examples/checkpoints/insnext-mini", metadata={"help": "An InsNeXt model."})
    output: str = field(default=f"{RESULTS}/keyword_forms", metadata={"help": "Writes .json and .md."})
    concept_sets: int = field(default=200, metadata={"help": "CommonGen dev sets to write."})
    batch_size: int = field(default=25, metadata={"help": "Sets written at once."})
    threads: int = 1


def with_forms(row: dict) -> dict:
    """Return the row with the regular forms of each concept that is one word."""
    return {**row, "concepts": [inflections(word) if word.isalpha() else [word] for word in row["concepts"]]}


def any_form(texts: list[str], rows: list[dict]) -> float:
    """Return the share of the concepts that stand in the texts as whole words, in any regular form."""
    coverage = evaluate.load(f"{METRICS}/keyword_coverage")
    references = [row["concepts"] for row in rows]
    return coverage.compute(predictions=texts, references=references, inflected=True)["coverage"]


def measure(model, tokenizer, rows: list[dict], batch_size: int) -> list[dict]:
    """Return one result an order and kind of keyword."""
    results = []
    for order, ordered in ORDERS.items():
        given = None
        for name, keywords in (("as given", rows), ("one of its forms", [with_forms(row) for row in rows])):
            texts, _ = write_texts(model, tokenizer, keywords, batch_size, ordered, repetition_penalty=1.3)
            given = texts if given is None else given
            chance = {"any_form": any_form(texts, rows), "p": p_value(texts, given, rows)}
            results.append({"order": order, "keywords": name, **judge_texts(texts, rows), **chance})
    return results


def table(results: list[dict]) -> str:
    """Return the rows as markdown."""
    head = "concepts in | each | coverage, given form | any form | BLEU (95 %) | p"
    lines = [f"| {head} |", "|---" * 6 + "|"]
    for row in results:
        lines.append(
            f"| {row['order']} | {row['keywords']} | {row['coverage']:.1%} | {row['any_form']:.1%} | "
            f"{row['bleu']:.2f} ± {row['bleu_interval']:.2f} | {row['p']:.3f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Write in every way, and the table; returns the report."""
    return run_study(__file__, FormsArguments, partial(written_by_checkpoint, measure, table), argv)


if __name__ == "__main__":
    main()
