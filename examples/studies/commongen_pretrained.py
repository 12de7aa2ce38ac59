r"""CommonGen dev: SmolLM2 as an insertion model, before and after adapting, beside SmolLM2 itself with three examples.

    python examples/studies/commongen_pretrained.py --data_dir DATA

The insertion models write around the concepts: as they are, in the order given, or each in one of its regular English
forms, in the order that the model likes best. The source is shown three training sets with their sentences, then the
concepts, and goes on greedily to the end of the line. Coverage counts concepts that stand in the text as whole words,
in the given form or in any. BLEU is sacrebleu's, all references, without case, with the 95 % interval of a bootstrap
over texts. A text loops if a pair of words stands in it twice.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from decoding_defaults import loops
from evaluate_insnext import WRITING, concept_sets, judge_texts, write_texts
from keyword_forms import any_form, with_forms
from pretrained_pair import ADAPTER, base, load_pair
from report import RESULTS, Study, run_study
from tqdm import tqdm

from modeling_insnext import InsNextForInsertionLM
from modeling_insnext.runs import read_rows


ROOM = 40


@dataclass
class PretrainedArguments:
    data_dir: str = field(metadata={"help": "Folder that holds commongen/."})
    adapter: str = field(default=ADAPTER, metadata={"help": "Adapter of SmolLM2."})
    output: str = field(default=f"{RESULTS}/commongen_pretrained", metadata={"help": "Writes .json and .md."})
    concept_sets: int = field(default=100, metadata={"help": "CommonGen dev sets to write."})
    batch_size: int = field(default=25, metadata={"help": "Sets written at once."})
    threads: int = 1


def shot(row: dict, sentence: str = "") -> str:
    return f"concepts: {', '.join(row['concepts'])}\nsentence:{sentence and ' ' + sentence}"


def write_prompted(source, tokenizer, rows: list[dict], examples: list[dict]) -> list[str]:
    """Return what the source writes behind three examples and the concepts of each row."""
    shown = "\n\n".join(shot(row, row["references"][0]) for row in examples)
    texts = []
    for row in tqdm(rows, desc="source", disable=None):
        ids = tokenizer(f"{shown}\n\n{shot(row)}", return_tensors="pt")["input_ids"]
        out = source.generate(ids, max_new_tokens=ROOM, do_sample=False, tokenizer=tokenizer, stop_strings="\n")
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip().split("\n")[0])
    return texts


def ways(adapted, converted) -> list[tuple]:
    """Return name, model, whether concepts have forms and no order, and options, of every way to write."""
    ratio = WRITING["EBR ratio 1"]
    rows = [("converted, EBR ratio 1", converted, False, ratio)]
    rows += [(f"adapted, {mode}", adapted, False, options) for mode, options in WRITING.items()]
    rows.append(("adapted, EBR ratio 1, penalty 1.2", adapted, False, {**ratio, "repetition_penalty": 1.2}))
    rows.append(("adapted, EBR ratio 1, forms and order free", adapted, True, ratio))
    rows.append(("adapted, EBR off, 4 beams", adapted, False, {"ebr": False, "num_beams": 4}))
    return rows


def measure(args: PretrainedArguments, rows: list[dict]) -> list[dict]:
    """Return one result a way to write."""
    adapted, source, tokenizer = load_pair(args.adapter)
    converted = InsNextForInsertionLM.from_pretrained(base(), dtype=torch.float32).eval()
    examples = read_rows(Path(args.data_dir, "commongen", "train.jsonl.gz"), 3)
    texts = {"source, three examples": write_prompted(source, tokenizer, rows, examples)}
    for name, model, free, options in ways(adapted, converted):
        asked = [with_forms(row) for row in rows] if free else rows
        texts[name], _ = write_texts(model, tokenizer, asked, args.batch_size, not free, **options)
    return [{"way": name, **judged(written, rows)} for name, written in texts.items()]


def judged(texts: list[str], rows: list[dict]) -> dict:
    """Return coverage of both kinds, BLEU and the share of texts that loop."""
    more = {"any_form": any_form(texts, rows), "loops": sum(map(loops, texts)) / len(texts)}
    return {**judge_texts(texts, rows), **more}


def first_texts(results: list[dict]) -> list[str]:
    """Return lines of Markdown with the first texts of every way."""
    lines = []
    for row in results:
        lines += ["", f"{row['way']}, the first ten:", "", *(f"- {text}" for text in row["examples"])]
    return lines


def table(results: list[dict]) -> str:
    lines = ["| | coverage, given form | any form | BLEU (95 %) | texts that loop |", "|---" * 5 + "|"]
    for row in results:
        bleu = f"{row['bleu']:.2f} ± {row['bleu_interval']:.2f}"
        lines.append(f"| {row['way']} | {row['coverage']:.1%} | {row['any_form']:.1%} | {bleu} | {row['loops']:.1%} |")
    return "\n".join([*lines, *first_texts(results)])


def study(args: PretrainedArguments) -> Study:
    """Write sentences of concepts in every way."""
    rows = concept_sets(args.data_dir, args.concept_sets)
    results = measure(args, rows)
    return Study(results, table(results), {"sets": len(rows)})


def main(argv: list[str] | None = None) -> dict:
    """Write in every way, and the table; returns the report."""
    return run_study(__file__, PretrainedArguments, study, argv)


if __name__ == "__main__":
    main()
