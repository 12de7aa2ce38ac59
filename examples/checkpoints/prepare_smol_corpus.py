r"""Make the texts that examples/checkpoints/insnext-smol is adapted on: captions, passages of stories and of books.

    python examples/checkpoints/prepare_smol_corpus.py --data_dir DATA --output_dir data/smol

DATA holds `commongen/`, `stories/` and `books/` as prepare_corpus.py reads them. One text a line, as
`{"text": ..., "source": ...}`, in random order:

    commongen   a reference sentence of a training concept set, none of the dev file's
    stories     three to twelve sentences of a story, from its beginning in half of the cases
    books       one to six sentences of a paragraph, at most --book_passages of a book

Written to the output folder: train.jsonl and valid.jsonl. The latter has --valid_texts of each source, of held-out
concept sets, stories and authors.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from prepare_corpus import book_paragraphs, plain, read_commongen
from transformers import HfArgumentParser

from modeling_insnext.data import split_sentences
from modeling_insnext.runs import read_rows, write_atomically


STORY_SENTENCES = (3, 4, 5, 5, 5, 6, 8, 12)
BOOK_SENTENCES = (1, 2, 3, 4, 5, 6)
MAX_CHARACTERS = 900  # about 220 tokens: a passage fits into a packed row of 256


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "Folder with books/, commongen/ and stories/."})
    output_dir: str = field(default="data/smol", metadata={"help": "Folder for train.jsonl and valid.jsonl."})
    story_passages: int = field(default=3, metadata={"help": "Passages of a story."})
    book_passages: int = field(default=40, metadata={"help": "Passages of a book, at most."})
    valid_texts: int = field(default=100, metadata={"help": "Held-out texts of a source, at most."})
    seed: int = field(default=0, metadata={"help": "Of all draws."})

    def __post_init__(self):
        for name in ("story_passages", "book_passages", "valid_texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def passage(sentences: list[str], sizes: tuple[int, ...], dice: random.Random, from_start: float = 0.0) -> str | None:
    """Return as many sentences in a row as one of `sizes` says, or None if they are too long."""
    size = dice.choice(sizes)
    first = 0 if dice.random() < from_start else dice.randrange(max(1, len(sentences) - size + 1))
    text = " ".join(sentences[first : first + size])
    return text if 0 < len(text) <= MAX_CHARACTERS else None


def story_passages(path: Path, times: int, dice: random.Random) -> list[str]:
    texts = []
    for row in read_rows(path):
        sentences = split_sentences(plain(row["text"]))
        texts += [passage(sentences, STORY_SENTENCES, dice, from_start=0.5) for _ in range(times)]
    # a short story's passages can be the same
    return [text for text in dict.fromkeys(texts) if text is not None]


def book_passages(path: Path, times: int, dice: random.Random) -> list[str]:
    texts = []
    for row in read_rows(path):
        paragraphs = book_paragraphs(row["text"])
        for paragraph in dice.sample(paragraphs, min(times, len(paragraphs))):
            texts.append(passage(split_sentences(paragraph), BOOK_SENTENCES, dice))
    return [text for text in texts if text is not None]


def write(path: Path, groups: dict[str, list[str]], dice: random.Random) -> None:
    rows = [{"text": text, "source": source} for source, texts in groups.items() for text in texts]
    dice.shuffle(rows)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    words = Counter()
    for row in rows:
        words[row["source"]] += len(row["text"].split())
    for source, texts in groups.items():
        print(f"{path.name:12} {source:10} {len(texts):7} texts {words[source]:9} words")


def main(arguments: Arguments) -> None:
    data, output, dice = Path(arguments.data_dir), Path(arguments.output_dir), random.Random(arguments.seed)
    output.mkdir(parents=True, exist_ok=True)
    captions, heldout = read_commongen(data / "commongen", arguments.seed)
    stories, books = data / "stories", data / "books"
    train = {
        "commongen": [text for text, _, _ in captions],
        "stories": story_passages(stories / "tinystories_train.jsonl.gz", arguments.story_passages, dice),
        "books": book_passages(books / "train.jsonl.gz", arguments.book_passages, dice),
    }
    valid = {
        "commongen": [text for text, _, _ in heldout],
        "stories": story_passages(stories / "tinystories_valid.jsonl", 1, dice),
        "books": book_passages(books / "valid.jsonl.gz", arguments.book_passages, dice),
    }
    few = {source: dice.sample(texts, min(arguments.valid_texts, len(texts))) for source, texts in valid.items()}
    write(output / "train.jsonl", train, dice)
    write(output / "valid.jsonl", few, dice)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
