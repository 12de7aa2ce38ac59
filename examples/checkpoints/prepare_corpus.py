"""Make the corpus of the small checkpoints: a byte-level BPE tokenizer and tokenised short English texts.

    python examples/checkpoints/prepare_corpus.py --data_dir DATA --output_dir data

DATA holds `commongen/` (train.jsonl.gz, dev.jsonl), `stories/` (tinystories_train.jsonl.gz, tinystories_valid.jsonl)
and `books/` (train.jsonl.gz, valid.jsonl.gz), one JSON object a line:

    commongen   one reference sentence a text; its concept words are marked as keywords
    stories     whole stories of at most 256 tokens; longer ones are cut at a sentence end and are not complete
    books       runs of one to four sentences of a paragraph, at most 128 tokens, of books for children

Every text is one paragraph with straight quotes, `--` for dashes and `...` for ellipses, and starts with `<bos>`.
The held-out file has 1 % of CommonGen's training concept sets, the valid stories and the valid books.

Written to the output folder:

    tokenizer/                `AutoTokenizer.from_pretrained` loads it
    train.npz, heldout.npz    texts and their keywords; `modeling_insnext.data.load_texts` reads them back
"""

import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import HfArgumentParser, PreTrainedTokenizerFast

from modeling_insnext.data import keyword_spans, save_texts, split_sentences
from modeling_insnext.runs import read_rows


SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]
SOURCES = ["commongen", "stories", "books"]
MIN_TOKENS = 4
MAX_STORY_TOKENS = 256
MAX_BOOK_TOKENS = 128
MAX_RUN_SENTENCES = 4
HELDOUT_CONCEPT_SETS = 0.01
TOKENIZER_CHARACTERS = 2_500_000  # of each source: books would drown the others

QUOTES = {"‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"'}
PLAIN = str.maketrans(
    {**QUOTES, "—": "--", "–": "-", "…": "...", "\u00a0": " ", "\u200b": None, "\u2060": None, "`": "'"}
)
SINGLE_QUOTED = re.compile(r"(?<![\w\"'])'(?!tis\b|twas\b|em\b|twould\b|till?\b)(?=\w)([^\"]*?[.,!?;:-])'(?![\w'])")
NOT_PROSE = re.compile(r"[*_|\\{}=<>~^#\[\]]|[^\x00-\x7féèêàæÉÆ£°½]|http")
@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "Folder with books/, commongen/ and stories/."})
    output_dir: str = field(default="data", metadata={"help": "Folder for tokenizer/, train.npz and heldout.npz."})
    vocab_size: int = field(default=8192, metadata={"help": "Vocabulary, the four special tokens included."})
    seed: int = field(default=0, metadata={"help": "Chooses the held-out concept sets and the runs of sentences."})


def plain(text: str) -> str:
    """One line with straight quotes, ASCII dashes and single spaces."""
    text = re.sub(r"\.(?: \.){2,3}", "...", text.translate(PLAIN))
    return re.sub(r"\s+", " ", text).strip()


def is_sentence_end(text: str) -> bool:
    return re.search(r"""[.!?]["')]*$""", text) is not None


# CommonGen


def tidy_caption(text: str) -> str:
    """Undo tokenised spacing, capitalise the first letter, end with a full stop."""
    text = re.sub(r"(?<=\w)(?: - (?=\w)| (?='(?:s|t|re|ve|m|ll|d)\b))", lambda m: m[0].strip(), plain(text))
    text = re.sub(r" (?=[.,!?;:])", "", text.rstrip(" '"))
    text = re.sub(r"\bi\b", "I", re.sub(r"([.!?])[.]+$", r"\1", text.replace("&", "and")))
    text = text if text.endswith((".", "!", "?", '"')) else text.rstrip(",;:-") + "."
    return text[:1].upper() + text[1:]


def read_commongen(folder: Path, seed: int) -> tuple[list[tuple], list[tuple]]:
    """Return (text, keyword spans, complete) of training and of held-out concept sets.

    Sentences with an ellipsis are left out: they are page titles run together. A sentence of the dev file or of a
    held-out set is never trained on, whatever its concepts.
    """
    rows = read_rows(folder / "train.jsonl.gz")
    random.Random(seed).shuffle(rows)
    num_heldout = int(HELDOUT_CONCEPT_SETS * len(rows))
    items = []
    for row in rows:
        captions = [text for text in map(tidy_caption, row["references"]) if "..." not in text]
        items.append([(text, keyword_spans(text, row["concepts"]), True) for text in captions])
    heldout = [item for group in items[:num_heldout] for item in group]
    barred = {tidy_caption(text) for row in read_rows(folder / "dev.jsonl") for text in row["references"]}
    barred.update(text for text, _, _ in heldout)
    return [item for group in items[num_heldout:] for item in group if item[0] not in barred], heldout


# stories


def read_stories(path: Path, length) -> list[tuple]:
    """Return (text, no keywords, complete); `length` counts a text's tokens."""
    items = []
    for row in read_rows(path):
        text = re.sub(r"\s*The [Ee]nd[.!]?$", "", plain(row["text"]))
        complete = is_sentence_end(text)
        sentences = split_sentences(text)
        if not complete:
            sentences.pop()
        while sentences and length(" ".join(sentences)) > MAX_STORY_TOKENS:
            sentences.pop()
            complete = False
        items.append((" ".join(sentences), [], complete))
    return items


# books


def book_paragraphs(text: str) -> list[str]:
    """Return a book's prose: no markup, headings, verse, notes or tables.

    A paragraph that only announces speech ("Heidi said:") is joined with the speech that follows it.
    """
    quotes = Counter(match[1] for match in re.finditer(r"\n\n\s*([\"'])", text.translate(PLAIN)))
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.translate(PLAIN)):
        block = re.sub(r"^\s*#.*$", "", block, flags=re.MULTILINE).strip()
        block = re.sub(r" ?\[[^\]]*\]", "", re.sub(r"(?<!\w)_ ?([^_]*?) ?_(?!\w)", r"\1", block))
        capitals = sum(letter.isupper() for letter in block)
        if not block or "\n" in block or NOT_PROSE.search(block) or 3 * capitals > len(block):
            continue
        block = re.sub(r" (?=[,.;:!?](?:[\s\"']|$)|(?:n't|'(?:s|re|ve|ll|d))\b)", "", plain(block))
        if quotes["'"] > quotes['"']:
            block = re.sub(r"^'(?!T(?:is|was)\b)(?=[A-Z])", '"', SINGLE_QUOTED.sub(r'"\1"', block.replace('"', "")))
        if paragraphs and paragraphs[-1][-1] in ":," and block.startswith('"'):
            block = f"{paragraphs.pop()} {block}"
        if block.startswith('"') and block.count('"') % 2:  # speech that goes on in the next paragraph
            block += '"'
        paragraphs.append(block)
    return [block for block in paragraphs if block.count('"') % 2 == 0]


def read_books(path: Path, length, seed: int) -> list[tuple]:
    """Return (text, no keywords, complete): runs of sentences of paragraphs; `length` counts a text's tokens."""
    dice = random.Random(seed)
    items = []
    for row in read_rows(path):
        for paragraph in book_paragraphs(row["text"]) if row["children"] else []:
            run, size = [], dice.randint(1, MAX_RUN_SENTENCES)
            sentences = [
                text for text in split_sentences(paragraph) if is_sentence_end(text) and not text[0].islower()
            ]
            for sentence in sentences:
                too_long = run and length(" ".join([*run, sentence])) > MAX_BOOK_TOKENS
                if too_long or len(run) == size:
                    items.append((" ".join(run), [], True))
                    run, size = [], dice.randint(1, MAX_RUN_SENTENCES)
                run.append(sentence)
            if run:
                items.append((" ".join(run), [], True))
    return [item for item in items if length(item[0]) <= MAX_BOOK_TOKENS]


# tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which a word begins with the same piece wherever it stands.

    A text gets one space in front, and decoding keeps it: what a token is decoded to never depends on its place.
    Digits and punctuation marks stand alone, except `...`, `--` and the endings 's, 't, 're, 've, 'm, 'll, 'd.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    quotes = [normalizers.Replace(curly, straight) for curly, straight in QUOTES.items()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *quotes])
    alone = Regex(r"Ġ?(?:[0-9]|\.\.\.|--|[!-/:-@\[-`{-~](?!\p{L}))")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, pre_tokenizers.Split(alone, "isolated")])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", SPECIAL_TOKENS.index("<bos>"))]
    )
    names = {f"{token.strip('<>')}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_prefix_space=True,
        padding_side="right",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        **names,
    )


def encode(tokenizer: PreTrainedTokenizerFast, items: list[tuple], source: str) -> list[dict]:
    """Tokenise (text, keyword spans, complete) and drop what is shorter than four tokens."""
    texts = []
    encodings = tokenizer([text for text, _, _ in items], return_offsets_mapping=True)
    for (_, spans, complete), ids, offsets in zip(
        items, encodings["input_ids"], encodings["offset_mapping"], strict=True
    ):
        keywords = [any(start < right and left < end for left, right in spans) for start, end in offsets]
        if len(ids) - 1 >= MIN_TOKENS:
            texts.append({"input_ids": ids, "keywords": keywords, "complete": complete, "source": source})
    return texts


def sample_for_tokenizer(groups: list[list[str]], seed: int) -> list[str]:
    """Draw up to TOKENIZER_CHARACTERS characters of each group of texts."""
    sample = []
    for texts in groups:
        shuffled, characters = random.Random(seed).sample(texts, len(texts)), 0
        for text in shuffled:
            if characters > TOKENIZER_CHARACTERS:
                break
            sample.append(text)
            characters += len(text)
    return sample


def report(name: str, texts: list[dict]) -> None:
    for source in SOURCES:
        chosen = [text for text in texts if text["source"] == source]
        tokens = sum(len(text["input_ids"]) for text in chosen)
        keywords = sum(int(sum(text["keywords"])) for text in chosen)
        complete = sum(text["complete"] for text in chosen)
        ends = f"{complete} texts complete, {keywords} tokens in keywords"
        print(f"{name:8} {source:10} {len(chosen):7} texts {tokens:9} tokens, {ends}")


def main(arguments: Arguments) -> None:
    data, output = Path(arguments.data_dir), Path(arguments.output_dir)
    if arguments.vocab_size <= 256 + len(SPECIAL_TOKENS) or arguments.vocab_size > 65536:
        raise ValueError(
            f"vocab_size must be above 260 (bytes and special tokens) and at most 65536, got {arguments.vocab_size}"
        )
    output.mkdir(parents=True, exist_ok=True)
    captions, heldout_captions = read_commongen(data / "commongen", arguments.seed)
    stories = read_rows(data / "stories" / "tinystories_train.jsonl.gz")
    books = [row for row in read_rows(data / "books" / "train.jsonl.gz") if row["children"]]
    groups = [
        [text for text, _, _ in captions],
        [plain(row["text"]) for row in stories],
        [paragraph for row in books for paragraph in book_paragraphs(row["text"])],
    ]
    tokenizer = train_tokenizer(sample_for_tokenizer(groups, arguments.seed), arguments.vocab_size)
    tokenizer.save_pretrained(output / "tokenizer")

    def length(text):
        return len(tokenizer(text)["input_ids"])

    train = encode(tokenizer, captions, "commongen")
    train += encode(tokenizer, read_stories(data / "stories" / "tinystories_train.jsonl.gz", length), "stories")
    train += encode(tokenizer, read_books(data / "books" / "train.jsonl.gz", length, arguments.seed), "books")
    heldout = encode(tokenizer, heldout_captions, "commongen")
    heldout += encode(tokenizer, read_stories(data / "stories" / "tinystories_valid.jsonl", length), "stories")
    heldout += encode(tokenizer, read_books(data / "books" / "valid.jsonl.gz", length, arguments.seed), "books")
    for name, texts in {"train": train, "heldout": heldout}.items():
        save_texts(output / f"{name}.npz", texts)
        report(name, texts)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
