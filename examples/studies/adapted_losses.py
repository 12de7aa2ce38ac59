r"""What adapting a causal model to insertion cost and brought: losses of the source, as converted, and adapted.

    python examples/studies/adapted_losses.py --data_dir DATA

Left to right: perplexity of lm/wikitext2_valid.txt.gz, its first --tokens tokens in windows of 1,024 behind BOS, as
left_to_right_perplexity.py has it. Infilling: the third sentence of stories/roc_train.jsonl, token by token from left
to right, -log p(token | its place) in nats, given both sides or the left side only (the text then ends behind the
sentence); and -log p(place), with every place of the text open. The source sees the left side. Intervals are 95 % of
the mean over tokens, with stories as the units.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from left_to_right_perplexity import nats_per_token, read, token_nats
from pretrained_pair import ADAPTER, base, load_pair
from report import RESULTS, Study, run_study
from story_infilling import read_stories
from tqdm import tqdm

from modeling_insnext import InsNextForInsertionLM
from modeling_insnext.data import InsertionCollator


@dataclass
class LossArguments:
    data_dir: str = field(metadata={"help": "Folder that holds lm/ and stories/."})
    adapter: str = field(default=ADAPTER, metadata={"help": "Adapter of SmolLM2."})
    output: str = field(default=f"{RESULTS}/adapted_losses", metadata={"help": "Results, without .json and .md."})
    tokens: int = field(default=8192, metadata={"help": "Of wikitext2."})
    stories: int = field(default=200, metadata={"help": "Stories, the first ones."})
    threads: int = 1


def examples(tokenizer, story: list[str], both: bool) -> dict:
    """Return a story whose third sentence is to be written; without its last two unless `both`."""
    parts = [" ".join(story[:2]), f" {story[2]}", f" {' '.join(story[3:])}"][: 3 if both else 2]
    ids, given = [tokenizer.bos_token_id], [True]
    for number, part in enumerate(parts):
        tokens = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += tokens
        given += [number != 1] * len(tokens)
    return {"input_ids": ids, "given": given, "complete": both}


def summary(rows: list[tuple[float, int]]) -> dict:
    """Return the mean over tokens of sums `(nats, tokens)`, a story each, and the half-width of its interval."""
    nats, tokens = np.array(rows).T
    mean = nats.sum() / tokens.sum()
    # a ratio of means: the delta method over stories
    spread = (nats - mean * tokens).std(ddof=1) / tokens.mean()
    return {"mean": float(mean), "interval": float(1.96 * spread / len(rows) ** 0.5), "n": len(rows)}


@torch.no_grad()
def insertion_losses(model, tokenizer, stories: list[list[str]], both: bool) -> dict:
    """Return the losses of places and of tokens of the third sentences."""
    collator = InsertionCollator(pad_token_id=tokenizer.pad_token_id, order="left_to_right")
    sums = {"place": [], "token": []}
    for story in tqdm(stories, desc="both sides" if both else "left side", disable=None):
        batch = collator([examples(tokenizer, story, both)])
        out, tokens = model(**batch), int((batch["labels"] != -100).sum())
        for name, loss in (("place", out.position_loss), ("token", out.token_loss)):
            sums[name].append((loss.item() * tokens, tokens))
    return {name: summary(rows) for name, rows in sums.items()}


def causal_losses(model, tokenizer, stories: list[list[str]], never: list[int]) -> dict:
    """Return the loss of the third sentences' tokens behind their left sides, given that they are none of `never`."""
    rows = []
    for story in tqdm(stories, desc="source", disable=None):
        example = examples(tokenizer, story, both=False)
        ids, written = torch.tensor(example["input_ids"]), ~torch.tensor(example["given"])[1:]
        nats = token_nats(model, ids, never)[written]
        rows.append((nats.sum().item(), len(nats)))
    return {"token": summary(rows)}


def measure(args: LossArguments) -> list[dict]:
    """Return a result for the source, for the converted model and for the adapted one."""
    adapted, source, tokenizer = load_pair(args.adapter)
    models = {
        "source": source,
        "converted": InsNextForInsertionLM.from_pretrained(base(), dtype=torch.float32).eval(),
        "adapted": adapted,
    }
    ids = read(f"{args.data_dir}/lm/wikitext2_valid.txt.gz", tokenizer, args.tokens, 1024)
    never = adapted.config.never_inserted
    stories = read_stories(Path(args.data_dir, "stories", "roc_train.jsonl"), args.stories)
    results = []
    for name, model in models.items():
        row = {"model": name, "perplexity": float(np.exp(nats_per_token(model, ids, never)))}
        if name == "source":
            row["left"] = causal_losses(model, tokenizer, stories, never)
        else:
            row |= {key: insertion_losses(model, tokenizer, stories, key == "both") for key in ("left", "both")}
        results.append(row)
    return results


def table(results: list[dict]) -> str:
    lines = [
        "| | perplexity, left to right | token, left side | token, both sides | place, both sides |",
        "|---" * 5 + "|",
    ]
    for row in results:
        cells = [f"{row['perplexity']:.2f}"]
        for side, kind in (("left", "token"), ("both", "token"), ("both", "place")):
            loss = row.get(side, {}).get(kind)
            cells.append("" if loss is None else f"{loss['mean']:.3f} ± {loss['interval']:.3f}")
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def study(args: LossArguments) -> Study:
    """Return the losses of both models."""
    results = measure(args)
    return Study(results, table(results), {})


def main(argv: list[str] | None = None) -> dict:
    """Measure, and write the table; returns the report."""
    return run_study(__file__, LossArguments, study, argv)


if __name__ == "__main__":
    main()
