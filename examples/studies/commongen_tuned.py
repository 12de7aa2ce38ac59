r"""CommonGen dev by two LoRAs of SmolLM2 on the same rows: one left to right, one of the insertion model.

    python examples/studies/commongen_tuned.py --data_dir DATA --adapter INSERTION --peer LEFT_TO_RIGHT

Both read "field look stand =" and write the sentence (rows: examples/checkpoints/prepare_concepts.py; both by
run_finetuning.py --task completion, as many steps). The insertion model also keeps what its prompt says: each concept
pending in its regular English forms, with a capital or without, whole, wherever it is written; or all of them given,
in the order of the prompt, with gaps around them. BLEU is sacrebleu's, all references, without case, with the 95 %
interval of a bootstrap over texts; coverage counts concepts that stand there as whole words, in the given form or in
any; p is of the paired bootstrap of BLEU against the first row. --valid_file writes its sets in the place of dev's, to
choose options on.
"""

import time
from dataclasses import dataclass, field

import torch
from commongen_pretrained import first_texts, judged
from commongen_table import p_value
from evaluate_insnext import concept_sets
from keyword_forms import with_forms
from left_to_right_perplexity import load
from peft import PeftModel
from pretrained_pair import adapted, hub_folder, packaged_file
from report import RESULTS, Study, run_study
from tqdm import tqdm
from transformers import AutoTokenizer

from modeling_insnext import InsNextForInsertionLM
from modeling_insnext.runs import read_rows


ROOM = 40


@dataclass
class TunedArguments:
    data_dir: str = field(metadata={"help": "Folder that holds commongen/."})
    adapter: str = field(metadata={"help": "Adapter of the insertion model."})
    peer: str | None = field(default=None, metadata={"help": "Adapter of SmolLM2 itself."})
    output: str = field(default=f"{RESULTS}/commongen_tuned", metadata={"help": "Writes .json and .md."})
    concept_sets: int = field(default=200, metadata={"help": "Sets to write."})
    valid_file: str | None = field(default=None, metadata={"help": "Sets to choose options on, not dev's."})
    biases: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "Values of keyword_bias."})
    batch_size: int = field(default=25, metadata={"help": "Sets written at once."})
    threads: int = 1


def prompt_of(row: dict) -> str:
    return f"{' '.join(row['concepts'])} ="


def valid_sets(path: str, count: int) -> list[dict]:
    """Return rows of prompts and completions as concept sets with references, one a set."""
    sets = {}
    for row in read_rows(path):
        concepts = row["prompt"].removesuffix(" =").split(" ")
        sets.setdefault(row["prompt"], {"concepts": concepts, "references": []})["references"].append(
            row["completion"].strip()
        )
    return list(sets.values())[:count]


def cased_forms(row: dict) -> list[list[str]]:
    """Return the regular forms of each concept, with a small letter and with the capital of a sentence's beginning."""
    concepts = with_forms(row)["concepts"]
    return [[*forms, *(form[0].upper() + form[1:] for form in forms)] for forms in concepts]


def canvas_of(model, tokenizer, rows: list[dict], keep: str):
    """Return prompts with a gap behind them; `keep`: nothing more, the concepts pending, or given in their order."""
    if keep == "given":
        return model.canvas(tokenizer, [f"{prompt_of(row)} ___ {' ___ '.join(row['concepts'])} ___" for row in rows])
    texts = [f"{prompt_of(row)} ___" for row in rows]
    if keep == "nothing":
        return model.canvas(tokenizer, texts)
    return model.canvas(tokenizer, texts, [cased_forms(row) for row in rows], ordered=False)


def write(model, tokenizer, rows: list[dict], batch_size: int, keep: str | None, **options) -> list[str]:
    """Return a sentence for each row; `keep` None: from left to right, by a causal model."""
    texts = []
    for first in tqdm(range(0, len(rows), batch_size), desc=f"{keep} {options}", disable=None):
        part = rows[first : first + batch_size]
        if keep is None:
            given = tokenizer(list(map(prompt_of, part)), padding=True, padding_side="left", return_tensors="pt")
        else:
            given = canvas_of(model, tokenizer, part, keep).to(model.device)
        out = model.generate(**given, max_new_tokens=ROOM, repetition_penalty=1.0, **options)
        for row, text in zip(part, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
            texts.append(text.strip().removeprefix(prompt_of(row)).strip())
    return texts


def ways(biases: list[float]) -> dict[str, tuple[str, dict]]:
    """Return what is kept and how it is written, by the name of the row."""
    once, ratio, reading = {"ebr": False}, {"ebr": True, "ebr_ratio": 1.0}, {"ebr": False, "reading_order": True}
    rows = {"insertion, prompt alone": ("nothing", once)}
    for bias in biases:
        rows[f"insertion, forms pending, bias {bias:g}"] = ("pending", {**once, "keyword_bias": bias})
    bias = {"keyword_bias": biases[0]}
    rows[f"the same, bias {biases[0]:g}, EBR ratio 1"] = ("pending", {**ratio, **bias})
    rows[f"the same, bias {biases[0]:g}, in reading order"] = ("pending", {**reading, **bias})
    rows["insertion, given in order"] = ("given", once)
    rows["the same, EBR ratio 1"] = ("given", ratio)
    return rows


def measure(args: TunedArguments, rows: list[dict]) -> list[dict]:
    """Return one result a way to write."""
    folder = adapted(args.adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, seconds = {}, {}
    if args.peer is not None:
        source = load(str(packaged_file() or hub_folder()), torch.float32)
        peer = PeftModel.from_pretrained(source, args.peer).merge_and_unload().eval()
        for name, options in (("left to right, greedy", {}), ("left to right, 4 beams", {"num_beams": 4})):
            began = time.process_time()
            options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
            texts[name] = write(peer, tokenizer, rows, args.batch_size, None, **options)
            seconds[name] = time.process_time() - began
    model = InsNextForInsertionLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, (keep, options) in ways(args.biases).items():
        began = time.process_time()
        texts[name] = write(model, tokenizer, rows, args.batch_size, keep, **options)
        seconds[name] = time.process_time() - began
    first = next(iter(texts.values()))
    return [
        {
            "way": name,
            **judged(written, rows),
            "p": None if written is first else p_value(written, first, rows),
            "seconds": seconds[name] / len(rows),
        }
        for name, written in texts.items()
    ]


def table(results: list[dict]) -> str:
    lines = ["| | coverage, given form | any form | BLEU (95 %) | p | texts that loop | CPU s a text |"]
    lines.append("|---" * 7 + "|")
    for row in results:
        bleu, chance = f"{row['bleu']:.2f} ± {row['bleu_interval']:.2f}", "" if row["p"] is None else f"{row['p']:.3f}"
        lines.append(
            f"| {row['way']} | {row['coverage']:.1%} | {row['any_form']:.1%} | {bleu} | {chance} | {row['loops']:.1%} "
            f"| {row['seconds']:.2f} |"
        )
    return "\n".join([*lines, *first_texts(results)])


def study(args: TunedArguments) -> Study:
    """Write sentences of concepts by both adapters, in every way."""
    if args.valid_file is None:
        rows = concept_sets(args.data_dir, args.concept_sets)
    else:
        rows = valid_sets(args.valid_file, args.concept_sets)
    results = measure(args, rows)
    return Study(results, table(results), {"sets": len(rows)})


def main(argv: list[str] | None = None) -> dict:
    """Write in every way, and the table; returns the report."""
    return run_study(__file__, TunedArguments, study, argv)


if __name__ == "__main__":
    main()
