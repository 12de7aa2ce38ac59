"""Make the corpus of drt-mini: a small byte-level BPE tokenizer and whole books as one long row of token ids.

    python examples/checkpoints/prepare_books.py --data_dir DATA --output_dir data/books
    python examples/checkpoints/prepare_books.py --data_dir DATA --output_dir data/smol --tokenizer FOLDER

DATA holds `books/train.jsonl.gz` and `books/valid.jsonl.gz`, one JSON object a line with `text` (a paragraph a line)
and `children` (books for children come first). Written to the output folder, each file under a temporary name first:

    tokenizer/               `AutoTokenizer.from_pretrained` loads it
    train.npy, valid.npy     uint16 [total], book after book, `<eos>` behind each; `numpy.load(..., mmap_mode="r")`
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from prepare_corpus import plain, train_tokenizer
from transformers import AutoTokenizer, HfArgumentParser

from modeling_insnext.runs import read_rows


TOKENIZER_PARAGRAPHS = 20_000


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "Folder with books/."})
    output_dir: str = field(default="data/books", metadata={"help": "Folder for tokenizer/, train.npy and valid.npy."})
    tokenizer: str | None = field(default=None, metadata={"help": "A tokenizer to take instead of a new one."})
    vocab_size: int = field(default=1024, metadata={"help": "Vocabulary, the four special tokens included."})
    max_characters: int = field(default=40_000_000, metadata={"help": "Characters of the training books."})
    seed: int = field(default=0, metadata={"help": "Chooses the books and the tokenizer's paragraphs."})


def read_books(path: Path, seed: int) -> list[str]:
    """Return the books' texts, a paragraph a line: those for children first, otherwise in random order."""
    rows = read_rows(path)
    random.Random(seed).shuffle(rows)
    rows.sort(key=lambda row: not row["children"])
    return ["\n".join(filter(None, map(plain, row["text"].split("\n")))) for row in rows]


def take(books: list[str], characters: int) -> list[str]:
    """Return the first books, the last one cut, of together `characters` characters."""
    taken = []
    for book in books:
        taken.append(book[:characters])
        characters -= len(book)
        if characters <= 0:
            break
    return taken


def encode(tokenizer, books: list[str]) -> np.ndarray:
    rows = []
    for book in books:
        ids = tokenizer(book, add_special_tokens=False, verbose=False)["input_ids"]
        rows += [np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16)]
    return np.concatenate(rows)


def main(arguments: Arguments) -> None:
    if not 260 < arguments.vocab_size <= 65536:
        raise ValueError(f"vocab_size must be in (260, 65536], bytes and 16-bit ids, got {arguments.vocab_size}")
    folder, output = Path(arguments.data_dir) / "books", Path(arguments.output_dir)
    train = take(read_books(folder / "train.jsonl.gz", arguments.seed), arguments.max_characters)
    if arguments.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        if len(tokenizer) > 65536 or tokenizer.eos_token_id is None:
            raise ValueError(f"a tokenizer must have an EOS and at most 65536 ids, got {arguments.tokenizer}")
    else:
        paragraphs = [line for book in train for line in book.split("\n")]
        paragraphs = random.Random(arguments.seed).sample(paragraphs, min(TOKENIZER_PARAGRAPHS, len(paragraphs)))
        tokenizer = train_tokenizer(paragraphs, arguments.vocab_size)
    tokenizer.model_max_length = 1 << 24
    tokenizer.save_pretrained(output / "tokenizer")
    for name, books in (("train", train), ("valid", read_books(folder / "valid.jsonl.gz", arguments.seed))):
        ids = encode(tokenizer, books)
        temporary = output / f"{name}.tmp.npy"
        np.save(temporary, ids)
        temporary.replace(output / f"{name}.npy")
        print(f"{name}: {len(books)} books, {sum(map(len, books))} characters, {len(ids)} tokens")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
