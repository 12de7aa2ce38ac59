r"""Make rows of "concepts = sentence" of CommonGen's training sets, for run_finetuning.py --task completion.

    python examples/checkpoints/prepare_concepts.py --data_dir DATA --output_dir data/concepts

DATA holds `commongen/train.jsonl.gz`. A row is `{"prompt": "cheese pizza shred =", "completion": " Mozzarella ...",
"id": ...}`, one a reference, in random order: sentences of 5 to 22 words, begun with a capital and ended with a mark.
Left out are those in which words stand for names ("actor", "person") and captions that speak of the picture itself.
train.jsonl and valid.jsonl, the latter of --valid_sets sets that are in no training row, are written to the output
folder.
"""

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from modeling_insnext.runs import read_rows, write_atomically


WORDS = range(5, 23)
# of captions in which names were replaced, and of captions of pictures as such
LEFT_OUT = re.compile(
    r"\b(actor|politician|film character|person|celebrity|football player|sports league|award winner|tv character"
    r"|biological|automotive|digital art|vector|illustration|stock|photo|image|picture|background|location|someone)\b",
    re.IGNORECASE,
)


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "Folder with commongen/."})
    output_dir: str = field(default="data/concepts", metadata={"help": "Folder for train.jsonl and valid.jsonl."})
    valid_sets: int = field(default=150, metadata={"help": "Sets held out, about."})
    seed: int = field(default=0, metadata={"help": "Of all draws."})

    def __post_init__(self):
        if self.valid_sets < 1:
            raise ValueError(f"valid_sets must be at least 1, got {self.valid_sets}")


def prompt_of(concepts: list[str]) -> str:
    """Return what stands in front of a sentence."""
    return f"{' '.join(concepts)} ="


def sentence(caption: str) -> str:
    """Return a caption as a sentence: a capital, no space before a mark, a mark at its end."""
    text = re.sub(r"\s+([.,!?])", r"\1", caption[0].upper() + caption[1:])
    return text if text[-1] in '.!?"' else text.rstrip(",;:") + "."


def rows_of(path: Path) -> list[dict]:
    rows = []
    for row in read_rows(path):
        captions = (text.strip() for text in row["references"])
        kept = [text for text in captions if len(text.split()) in WORDS and not LEFT_OUT.search(text)]
        rows += [
            {"prompt": prompt_of(row["concepts"]), "completion": f" {sentence(text)}", "id": row["id"]}
            for text in kept
        ]
    return rows


def main(arguments: Arguments) -> None:
    dice = random.Random(arguments.seed)
    rows = rows_of(Path(arguments.data_dir, "commongen", "train.jsonl.gz"))
    heldout = {row["id"] for row in dice.sample(rows, min(arguments.valid_sets, len(rows) // 2))}
    dice.shuffle(rows)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name, is_heldout in (("train", False), ("valid", True)):
        part = [row for row in rows if (row["id"] in heldout) == is_heldout]
        write_atomically(output / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
        print(f"{name:6} {len(part):6} sentences")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
