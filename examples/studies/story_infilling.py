r"""Missing sentences of five-sentence stories: an insertion model, and its source that sees the left side only.

    python examples/studies/story_infilling.py --data_dir DATA

The third sentence is missing, or the second to the fourth; nobody is told how long they are. The insertion model
writes into the gap between both sides, greedily, with the re-encoding that its folder asks for; also with a lower
bound of five tokens for each missing sentence and a penalty of 1.2 on repetition. The source, a causal model, goes on
from the left side, greedily; what it writes is cut after as many sentences as are missing, which it is told that way.
ROUGE-1, -2 and -L are F-measures of rouge-score with stemming, of the missing text alone, in percent, with 95 %
intervals of the mean over stories.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pretrained_pair import ADAPTER, load_pair
from report import RESULTS, Study, run_study
from rouge_score.rouge_scorer import RougeScorer
from tqdm import tqdm

from modeling_insnext.data import split_sentences
from modeling_insnext.runs import read_rows


MISSING = {"1 of 5": slice(2, 3), "3 of 5": slice(1, 4)}
ROOM = {"1 of 5": 32, "3 of 5": 80}
# a lower bound of every gap, no length
LEAST = {"1 of 5": 5, "3 of 5": 15}
ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass
class InfillingArguments:
    data_dir: str = field(metadata={"help": "Folder that holds stories/roc_train.jsonl."})
    adapter: str = field(default=ADAPTER, metadata={"help": "Adapter of SmolLM2."})
    output: str = field(default=f"{RESULTS}/story_infilling", metadata={"help": "Results, without .json and .md."})
    stories: int = field(default=200, metadata={"help": "Stories, the first ones."})
    batch_size: int = 16
    threads: int = 1


def read_stories(path: Path, count: int) -> list[list[str]]:
    """Return the sentences of the first stories that have five of them and no gap mark.

    Raises:
        ValueError: If there is none.
    """
    stories = [split_sentences(row["text"]) for row in read_rows(path)]
    stories = [sentences for sentences in stories if len(sentences) == 5 and "_" not in "".join(sentences)][:count]
    if not stories:
        raise ValueError(f"{path} must hold a text of five sentences, got none")
    return stories


def write_between(model, tokenizer, texts: list[tuple[str, str]], room: int, least: int = 0, **options) -> list[str]:
    """Return what an insertion model writes between two sides each, `least` tokens or more."""
    canvas = model.canvas(tokenizer, [f"{left} ___ {right}" for left, right in texts], min_gap_tokens=least)
    out = model.generate(**canvas, max_new_tokens=room, return_dict_in_generate=True, **options)
    written = [ids[steps > 0] for ids, steps in zip(out.sequences, out.insertion_steps, strict=True)]
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]


def write_after(model, tokenizer, texts: list[tuple[str, str]], room: int, sentences: int) -> list[str]:
    """Return what a causal model writes after each left side, to the end of so many sentences."""
    # behind BOS, which the tokenizer puts in front
    tokens = tokenizer([left for left, _ in texts], padding=True, padding_side="left", return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=room, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    written = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [" ".join(split_sentences(" ".join(text.split()))[:sentences]) for text in written]


def judge(texts: list[str], references: list[str]) -> dict:
    """Return means of ROUGE in percent with the half-widths of their 95 % intervals."""
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    values = {name: 100 * np.array([score[name].fmeasure for score in scores]) for name in ROUGE}
    means = {name: float(x.mean()) for name, x in values.items()}
    halves = {f"{name}_interval": float(1.96 * x.std(ddof=1) / len(x) ** 0.5) for name, x in values.items()}
    words = float(np.mean([len(text.split()) for text in texts]))
    return {"n": len(texts), **means, **halves, "words": words, "examples": texts[:10]}


def measure(args: InfillingArguments, stories: list[list[str]]) -> list[dict]:
    """Return a result for each number of missing sentences and each model."""
    model, source, tokenizer = load_pair(args.adapter)
    results = []
    for name, gap in MISSING.items():
        sides = [(" ".join(story[: gap.start]), " ".join(story[gap.stop :])) for story in stories]
        references = [" ".join(story[gap]) for story in stories]
        written = {"insertion, both sides": [], "the same, a lower bound": [], "source, left side only": []}
        for first in tqdm(range(0, len(sides), args.batch_size), desc=name, disable=None):
            batch = sides[first : first + args.batch_size]
            ours = write_between(model, tokenizer, batch, ROOM[name])
            bound = write_between(model, tokenizer, batch, ROOM[name], LEAST[name], repetition_penalty=1.2)
            theirs = write_after(source, tokenizer, batch, ROOM[name], gap.stop - gap.start)
            for texts, new in zip(written.values(), (ours, bound, theirs), strict=True):
                texts += new
        results += [{"missing": name, "model": key, **judge(texts, references)} for key, texts in written.items()]
        results.append({"missing": name, "model": "the story itself", **judge(references, references)})
    return results


def table(results: list[dict], stories: list[list[str]]) -> str:
    lines = ["| missing | model | n | ROUGE-1 | ROUGE-2 | ROUGE-L | words |", "|---" * 7 + "|"]
    for row in results:
        scores = " | ".join(f"{row[name]:.1f} ± {row[f'{name}_interval']:.1f}" for name in ROUGE)
        lines.append(f"| {row['missing']} | {row['model']} | {row['n']} | {scores} | {row['words']:.1f} |")
    lines += ["", "The first ten, one sentence missing:", ""]
    written = [row["examples"] for row in results if row["missing"] == "1 of 5"]
    for story, ours, bound, theirs, _ in zip(stories, *written, strict=False):
        lines.append(f"- {' '.join(story[:2])} [...] {' '.join(story[3:])}")
        lines += [f"    - insertion: {ours}", f"    - with a lower bound: {bound}", f"    - source: {theirs}"]
        lines.append(f"    - the story: {story[2]}")
    return "\n".join(lines)


def study(args: InfillingArguments) -> Study:
    """Write between the sentences of stories in every way."""
    stories = read_stories(Path(args.data_dir, "stories", "roc_train.jsonl"), args.stories)
    results = measure(args, stories)
    return Study(results, table(results, stories), {})


def main(argv: list[str] | None = None) -> dict:
    """Write, and write the table; returns the report."""
    return run_study(__file__, InfillingArguments, study, argv)


if __name__ == "__main__":
    main()
