"""CommonGen dev: which way of decoding ends loops, and what it does to the texts: the defaults of a checkpoint.

    python examples/studies/decoding_defaults.py --data_dir DATA

The concepts are keywords in the order given, with the checkpoint's own re-encoding. A text loops if a pair of words
stands in it twice, without case. BLEU is sacrebleu's, all references, without case, with the 95 % interval of a
bootstrap over texts; p is of its paired bootstrap against plain greedy.
"""

import re
from dataclasses import dataclass, field
from functools import partial

from commongen_table import p_value
from evaluate_insnext import judge_texts, write_texts, written_by_checkpoint
from report import RESULTS, run_study

from modeling_insnext.tasks import wilson_interval


PLAIN = "greedy"
SETTINGS = {
    PLAIN: {},
    "repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "repetition_penalty 1.2": {"repetition_penalty": 1.2},
    "repetition_penalty 1.3": {"repetition_penalty": 1.3},
    "repetition_penalty 1.5": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "parallel_slots 4": {"parallel_slots": 4},
    "parallel_slots 4, repetition_penalty 1.3": {"parallel_slots": 4, "repetition_penalty": 1.3},
    "num_beams 4": {"num_beams": 4},
    "num_beams 4, repetition_penalty 1.3": {"num_beams": 4, "repetition_penalty": 1.3},
}


@dataclass
class DecodingArguments:
    data_dir: str = field(metadata={"help": "Folder that holds commongen/dev.jsonl."})
    checkpoint: str = field(default="examples/checkpoints/insnext-mini", metadata={"help": "An InsNeXt model."})
    output: str = field(default=f"{RESULTS}/decoding_defaults", metadata={"help": "Writes .json and .md."})
    concept_sets: int = field(default=200, metadata={"help": "CommonGen dev sets to write."})
    batch_size: int = field(default=25, metadata={"help": "Sets written at once."})
    threads: int = 1


def loops(text: str) -> bool:
    """Return whether a pair of words stands in the text twice."""
    words = re.findall(r"[\w']+", text.lower())
    pairs = list(zip(words, words[1:], strict=False))
    return len(set(pairs)) < len(pairs)


def measure(model, tokenizer, rows: list[dict], batch_size: int) -> dict[str, dict]:
    """Return the share of texts that loop, words a text, coverage and BLEU of each setting."""
    written, results = {}, {}
    for name, options in SETTINGS.items():
        texts, _ = write_texts(model, tokenizer, rows, batch_size, **options)
        written[name] = texts
        looping = sum(map(loops, texts))
        results[name] = {
            "loops": looping / len(texts),
            "loops_interval": wilson_interval(looping, len(texts)),
            "words": sum(len(text.split()) for text in texts) / len(texts),
            **judge_texts(texts, rows),
            "p": p_value(texts, written[PLAIN], rows),
        }
    return results


def table(results: dict[str, dict]) -> str:
    """Return the rows as markdown."""
    lines = ["| decoding | texts that loop (95 %) | words | coverage | BLEU (95 %) | p |", "|---" * 6 + "|"]
    for name, row in results.items():
        low, high = row["loops_interval"]
        lines.append(
            f"| {name} | {row['loops']:.1%} ({low:.1%}-{high:.1%}) | {row['words']:.1f} | {row['coverage']:.1%} | "
            f"{row['bleu']:.2f} ± {row['bleu_interval']:.2f} | {row['p']:.3f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Write in every way, and the table; returns the report."""
    return run_study(__file__, DecodingArguments, partial(written_by_checkpoint, measure, table), argv)


if __name__ == "__main__":
    main()
