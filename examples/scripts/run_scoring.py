r"""Score a language model without training it: perplexity of texts, or multiple choice by likelihood.

    python examples/scripts/run_scoring.py --task perplexity --model_name_or_path examples/checkpoints/insnext-mini \
        --data_file lm/wikitext2_valid.txt.gz --output_dir runs/wikitext
    python examples/scripts/run_scoring.py --task multiple_choice --model_name_or_path MODEL \
        --data_file mcqa/openbookqa_dev.jsonl --output_dir runs/openbookqa
    python examples/scripts/run_scoring.py --task multiple_choice --blank _ --num_orders 16 \
        --model_name_or_path MODEL --data_file mcqa/winogrande_dev.jsonl --output_dir runs/winogrande

Left to right every causal language model is scored alike; InsNeXt also by --num_orders drawn orders of insertion (a
lower bound in expectation, exact where there are no more), for which everything but the answer is given, on both sides
of a --blank. Long texts are read in windows of --max_length tokens, each --stride after the one before; a token is
scored once, in the first window that holds it.

Perplexity is reported per token, with nats per token and bits per byte of text; multiple choice as the share of rows
whose right answer has the highest log-likelihood, as it is, per token and per byte of what was scored, with Wilson
intervals. What stands behind a --blank is scored with the answer from left to right, and given by orders. The space in
front of a blank belongs to the answer. A text that spells a special token, as "<pad>", means its letters.

Every score goes to scores.jsonl in --output_dir, the report to results.json. Interrupted, the same command goes on
where it was, if the files of model, tokenizer and data are still the same ones.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from accelerate import PartialState
from common.arguments import ChoiceArguments, ModelArguments, check_choice, data_format, parse
from common.data import check_texts, read_file, split_of, without_eos
from common.models import load_config, load_model, load_tokenizer
from common.training import perplexity_of
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from modeling_insnext.runs import finite, write_atomically
from modeling_insnext.tasks import wilson_interval


TASKS = ("perplexity", "multiple_choice")


@dataclass
class ScoringArguments(ChoiceArguments):
    _argument_group_name = "scoring"

    task: str = field(default="perplexity", metadata={"help": "perplexity or multiple_choice."})
    output_dir: str = field(default="runs/scoring", metadata={"help": "Folder of scores.jsonl and results.json."})
    data_file: str | None = field(default=None, metadata={"help": "json, jsonl, csv or txt, .gz behind it or not."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, instead of a file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    split: str = field(default="validation", metadata={"help": "Its split."})
    text_column: str = field(default="text", metadata={"help": "perplexity: texts."})
    max_samples: int | None = field(default=None, metadata={"help": "Rows to score."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens read at once; by default up to 1,024."})
    stride: int | None = field(default=None, metadata={"help": "Tokens between windows; by default half of those."})
    batch_size: int = field(default=8, metadata={"help": "Windows or answers a forward pass."})
    num_orders: int | None = field(default=None, metadata={"help": "InsNeXt: orders of the bound; by default none."})
    score_end: bool = field(default=False, metadata={"help": "Whether ending there is part of the event."})
    seed: int = field(default=0, metadata={"help": "Draws the orders."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "An adapter to merge into the model."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave the GPU alone."})

    def __post_init__(self):
        super().__post_init__()
        check_choice("task", self.task, TASKS)
        if (self.data_file is None) == (self.dataset_name is None):
            raise ValueError(f"give data_file or dataset_name, got {self.data_file!r} and {self.dataset_name!r}")
        if self.data_file is not None:
            data_format("data_file", self.data_file)
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError(f"dataset_config_name needs dataset_name, got {self.dataset_config_name!r}")
        for name in ("batch_size", "num_orders", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.blank is not None and self.task == "perplexity":
            raise ValueError(f"blank is for multiple_choice, got {self.blank!r}")


class Item(NamedTuple):
    """Tokens to score together: which of them are given, and what they belong to."""

    ids: list[int]
    given: list[bool]
    facts: dict


def check(args: ScoringArguments, tokenizer, config) -> None:
    """Set length and stride to what the model holds, if not given; raise a `ValueError` if it cannot be scored so."""
    if args.num_orders is not None and config.model_type != "insnext":
        raise ValueError(f"num_orders needs model type insnext, got {config.model_type!r}")
    if args.score_end and tokenizer.eos_token_id is None:
        raise ValueError("score_end needs a tokenizer with an EOS token, got none")
    limit = getattr(config, "max_position_embeddings", None)
    if args.max_length is None:
        args.max_length = 1024 if limit is None else min(1024, limit)
    if args.max_length < 2 or (limit is not None and args.max_length > limit):
        raise ValueError(f"max_length must be in 2..{limit or 'any number'}, got {args.max_length}")
    args.stride = args.max_length // 2 if args.stride is None else args.stride
    if not 1 <= args.stride < args.max_length:
        raise ValueError(f"stride must be in 1..{args.max_length - 1}, got {args.stride}")


def merged(model, adapter: str):
    """Return the model with the weights of a saved adapter in its own."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def load_rows(args: ScoringArguments, cache_dir: str | None):
    """Return the rows to score."""
    if args.dataset_name is not None:
        splits = datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=cache_dir)
    else:
        splits = datasets.DatasetDict({args.split: read_file("data_file", args.data_file, cache_dir)})
    columns = [args.text_column] if args.task == "perplexity" else args.columns
    rows = split_of(splits, args.split, columns)
    check_texts(splits, columns[:1])
    return rows if args.max_samples is None else rows.select(range(min(args.max_samples, len(rows))))


def windows(args: ScoringArguments, tokenizer, rows) -> Iterator[Item]:
    """Yield the windows of each text; BOS stands in front of each where the tokenizer has one."""
    for number, text in enumerate(rows[args.text_column]):
        ids = without_eos(tokenizer, tokenizer(text, split_special_tokens=True)["input_ids"])
        front = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
        ids = ids[len(front) :] + ([tokenizer.eos_token_id] if args.score_end else [])
        size, scored = args.max_length - len(front), 0 if front else 1
        for first in range(0, len(ids), args.stride):
            piece = ids[first : first + size]
            if first + len(piece) > scored:
                given = [place < scored for place in range(first, first + len(piece))]
                facts = {"row": number, "bytes": len(text.encode()) if first == 0 else 0}
                yield Item(front + piece, [True] * len(front) + given, facts)
                scored = first + len(piece)


def answers(args: ScoringArguments, tokenizer, rows) -> Iterator[Item]:
    """Yield every answer of each row in its place; of what is too long the front is cut."""
    for number, (query, choices, gold) in enumerate(zip(*(rows[column] for column in args.columns), strict=True)):
        args.check_row(query, choices, gold, number)
        for index, choice in enumerate(choices):
            before, answer, after = args.text_of(query, choice)
            front = without_eos(tokenizer, tokenizer(before, split_special_tokens=True)["input_ids"])
            options = {"add_special_tokens": False, "split_special_tokens": True}
            middle, back = tokenizer([answer, after], **options)["input_ids"]
            # left to right, what stands behind an answer tells answers apart; by insertion it is given
            behind_given = args.num_orders is not None
            parts = [(front, True), (middle, False), (back, behind_given)]
            parts += [([tokenizer.eos_token_id], False)] if args.score_end else []
            ids = [token for part, _ in parts for token in part]
            given = [fixed for part, fixed in parts for _ in part]
            # BOS stays in front of what is cut
            kept = 1 if ids[0] == tokenizer.bos_token_id else 0
            cut = max(len(ids) - args.max_length, 0) + kept
            ids, given = ids[:kept] + ids[cut:], given[:kept] + given[cut:]
            if all(given[1:]):
                raise ValueError(f"an answer must have at least one token to score, got {choice!r} in row {number}")
            scored = answer if behind_given else answer + after
            facts = {"row": number, "choice": index, "gold": int(gold), "bytes": len(scored.encode())}
            yield Item(ids, given, facts)


@torch.no_grad()
def left_to_right(model, items: list[Item], pad: int) -> list[dict]:
    """Return log-likelihood and number of the tokens of each item that are not given; the first one always is."""
    width = max(len(item.ids) for item in items)
    ids, mask = torch.full((len(items), width), pad), torch.zeros(len(items), width, dtype=torch.long)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)], mask[row, : len(item.ids)] = torch.tensor(item.ids), 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    log_p = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    log_p = log_p.gather(2, ids[:, 1:, None])[..., 0].double().cpu()
    found = []
    for row, item in enumerate(items):
        scored = [place - 1 for place, given in enumerate(item.given) if place and not given]
        found.append({**item.facts, "tokens": len(scored), "log_likelihood": float(log_p[row, scored].sum())})
    return found


def by_orders(model, items: list[Item], args: ScoringArguments) -> list[dict]:
    """Return the score of each item over orders that are drawn from the seed and the item's place alone."""
    found = []
    for item in items:
        place = [args.seed, item.facts["row"], item.facts.get("choice", 0), item.given.index(False)]
        generator = torch.Generator().manual_seed(int(np.random.default_rng(place).integers(2**63)))
        # not every tokenizer puts BOS in front, and a text is written behind it
        bos = [] if item.ids[0] == model.config.bos_token_id else [model.config.bos_token_id]
        ids = torch.tensor([bos + item.ids], device=model.device)
        given = torch.tensor([[True] * len(bos) + item.given], device=model.device)
        score = model.score(
            ids,
            context_mask=given,
            num_orders=args.num_orders,
            stop=args.score_end,
            generator=generator,
            batch_size=args.batch_size,
        )
        found.append({**item.facts, "tokens": item.given.count(False), "log_likelihood": float(score)})
    return found


def file_stamps(model_args: ModelArguments, args: ScoringArguments, config) -> dict:
    """Return size and time of change of every file that scores depend on, and the commit of what is on the Hub."""
    folders = (model_args.model_name_or_path, model_args.config_name, model_args.tokenizer_name)
    folders += (args.adapter_name_or_path,)
    patterns = (
        "*.safetensors",
        "*.bin",
        "config.json",
        "adapter_config.json",
        "token*",
        "vocab*",
        "merges.txt",
        "*.model",
        "*.py",
    )
    paths = {path for folder in folders if folder for pattern in patterns for path in Path(folder).glob(pattern)}
    paths |= {Path(args.data_file)} if args.data_file else set()
    stamps = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)}
    return {"files": stamps, "commit": getattr(config, "_commit_hash", None)}


def resume(path: Path, command: dict, batches: list[list[Item]]) -> int:
    """Return how many batches are scored in full, and cut off what follows them.

    Raises:
        ValueError: If the folder holds the scores of another command, or of files that have changed since.
    """
    stamp = path.with_name("arguments.json")
    known = json.loads(stamp.read_text(encoding="utf-8")) if stamp.exists() else command
    if known != command:
        other = sorted(name for name in {*known, *command} if known.get(name) != command.get(name))
        raise ValueError(
            f"output_dir must be empty or hold this command's scores, got those of other {', '.join(other)} in "
            f"{path.parent}"
        )
    write_atomically(stamp, json.dumps(command))
    written = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    done = count = 0
    while done < len(batches) and count + len(batches[done]) <= len(written):
        count += len(batches[done])
        done += 1
    with open(path, "ab") as file:
        file.truncate(sum(len(line) + 1 for line in written[:count]))
    return done


def score(args: ScoringArguments, model, batches: list[list[Item]], path: Path, first: int, pad: int) -> None:
    """Append the scores of the batches from the first on."""
    with open(path, "a", encoding="utf-8") as file:
        for batch in tqdm(batches[first:], desc="Scoring", initial=first, total=len(batches)):
            found = by_orders(model, batch, args) if args.num_orders else left_to_right(model, batch, pad)
            for row in found:
                if not math.isfinite(row["log_likelihood"]):
                    raise ValueError(
                        f"a log-likelihood must be finite, got {row['log_likelihood']} in row {row['row']}"
                    )
            file.write("".join(json.dumps(row) + "\n" for row in found))
            file.flush()
            os.fsync(file.fileno())


def perplexity_report(scores: list[dict]) -> dict:
    tokens, size = (sum(row[name] for row in scores) for name in ("tokens", "bytes"))
    nats = -sum(row["log_likelihood"] for row in scores)
    return {
        "texts": len({row["row"] for row in scores}),
        "tokens": tokens,
        "nats_per_token": nats / tokens,
        "perplexity": perplexity_of(nats / tokens),
        "bits_per_byte": nats / size / math.log(2),
    }


def choice_report(scores: list[dict]) -> dict:
    """Return the accuracy of each way to compare answers, with its Wilson interval."""
    rows = {}
    for row in scores:
        rows.setdefault(row["row"], []).append(row)
    report = {"rows": len(rows)}
    for name, unit in (("accuracy", None), ("accuracy_per_token", "tokens"), ("accuracy_per_byte", "bytes")):
        right = 0
        for choices in rows.values():
            values = [row["log_likelihood"] / (max(row[unit], 1) if unit else 1) for row in choices]
            right += values.index(max(values)) == choices[0]["gold"]
        low, high = wilson_interval(right, len(rows))
        report |= {name: right / len(rows), f"{name}_low": low, f"{name}_high": high}
    return report


def main(args: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the report."""
    model_args, scoring = parse(ModelArguments, ScoringArguments, args=args, description=__doc__)
    state = PartialState(cpu=scoring.use_cpu)
    if state.num_processes > 1:
        raise ValueError(f"scoring needs one process, got {state.num_processes}")
    tokenizer = load_tokenizer(model_args)
    config = load_config(model_args, tokenizer)
    check(scoring, tokenizer, config)
    rows = load_rows(scoring, model_args.cache_dir)
    items = list((windows if scoring.task == "perplexity" else answers)(scoring, tokenizer, rows))
    # without BOS, the first token of a text is not predicted
    if not any(False in item.given[1:] for item in items):
        raise ValueError(f"there must be at least one token to score, got none in {len(rows)} rows")
    size = scoring.batch_size
    batches = [items[first : first + size] for first in range(0, len(items), size)]
    folder = Path(scoring.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scores.jsonl"
    command = {**asdict(model_args), **asdict(scoring), **file_stamps(model_args, scoring, config)}
    first = resume(path, command, batches)
    model = load_model(AutoModelForCausalLM, model_args, config)
    if scoring.adapter_name_or_path is not None:
        model = merged(model, scoring.adapter_name_or_path)
    model = model.to(state.device).eval()
    score(scoring, model, batches, path, first, tokenizer.pad_token_id)
    scores = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    report = finite(perplexity_report(scores) if scoring.task == "perplexity" else choice_report(scores))
    write_atomically(folder / "results.json", json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
