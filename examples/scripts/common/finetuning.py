"""What the rows of a fine-tuning hold, by task, and the training examples made of them."""

import json
from dataclasses import dataclass, field

from modeling_insnext.data import keyword_spans

from .arguments import check_choice, json_object
from .data import without_eos


REENCODED = {"reencode": 0.6, "windowed": 0.1}


@dataclass
class FinetuningArguments:
    _argument_group_name = "fine-tuning"

    task: str = field(metadata={"help": "keywords, infilling or completion."})
    text_column: str | None = field(default=None, metadata={"help": "keywords, infilling: texts; by default text."})
    keywords_column: str | None = field(
        default=None, metadata={"help": "keywords: lists of words, or texts that hold one, JSON or separated."}
    )
    keywords_separator: str | None = field(
        default=None,
        metadata={"help": "What stands between keywords in a text of csv; by default it is JSON."},
    )
    prompt_column: str | None = field(default=None, metadata={"help": "completion: prompts; by default prompt."})
    completion_column: str | None = field(default=None, metadata={"help": "completion: by default completion."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a text; what is longer is cut."})
    generation: str = field(default='{"max_new_tokens": 40}', metadata={"help": "Options of generate, JSON."})

    def __post_init__(self):
        columns = {
            "keywords": {"text_column": "text", "keywords_column": None},
            "infilling": {"text_column": "text"},
            "completion": {"prompt_column": "prompt", "completion_column": "completion"},
        }
        check_choice("task", self.task, columns)
        for name in ("text_column", "keywords_column", "prompt_column", "completion_column"):
            if name not in columns[self.task] and getattr(self, name) is not None:
                raise ValueError(f"{name} is not for task {self.task}, got {getattr(self, name)!r}")
            setattr(self, name, getattr(self, name) or columns[self.task].get(name))
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if self.keywords_separator is not None and (self.keywords_column is None or not self.keywords_separator):
            raise ValueError(
                "keywords_separator must be a mark and needs keywords_column, got "
                f"{self.keywords_separator!r} and {self.keywords_column!r}"
            )
        json_object("generation", self.generation)

    @property
    def columns(self) -> list[str]:
        """Columns of training data."""
        names = (self.text_column, self.keywords_column, self.prompt_column, self.completion_column)
        return [name for name in names if name is not None]

    @property
    def test_columns(self) -> list[str]:
        read = {"keywords": self.keywords_column, "infilling": self.text_column, "completion": self.prompt_column}
        return [read[self.task]]

    def words_of(self, value) -> list[str]:
        """Return the keywords of a row: a list as it is, of a text what it holds.

        Raises:
            ValueError: If the text holds no list of texts.
        """
        if not isinstance(value, str):
            return value
        if self.keywords_separator is not None:
            return [word.strip() for word in value.split(self.keywords_separator)]
        try:
            words = json.loads(value)
        except json.JSONDecodeError:
            words = None
        if not are_texts(words):
            raise ValueError(
                f"{self.keywords_column} must be a list of words and phrases, a JSON list of them, or separated by "
                f"keywords_separator, got {value!r}"
            )
        return words

    @property
    def contexts(self) -> dict:
        """What is given of a text, beside what the row says."""
        if self.task == "completion":
            return {}
        drawn = {"infilling": {"spans": 1.0}, "keywords": {} if self.keywords_column else {"keywords": 1.0}}
        return {**drawn[self.task], **REENCODED}


def texts_of(value) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def are_texts(values) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def check_rows(args: FinetuningArguments, rows, split: str, columns: list[str]) -> None:
    """Raise a `ValueError` that names the row if a value is not what its column is read as."""
    for column in columns:
        for number, value in enumerate(rows[column]):
            if column == args.keywords_column:
                kind, right = "a list of words and phrases", are_texts(value) and all(map(str.strip, value))
            elif column == args.text_column and split != "test":
                kind, right = "a text or a list of texts", isinstance(value, str) or value != [] and are_texts(value)
            else:
                kind, right = "a text", isinstance(value, str)
            if not right:
                raise ValueError(f"{column} must be {kind}, got {value!r} in row {number} of the {split} data")


def with_lists(args: FinetuningArguments, splits):
    """Return the splits with keywords as lists, where they stood in texts."""
    for split, rows in splits.items():
        column = args.keywords_column
        if column is None or getattr(rows.features.get(column), "dtype", None) not in ("string", "large_string"):
            continue
        words = []
        for number, value in enumerate(rows[column]):
            try:
                words.append(None if value is None else args.words_of(value))
            except ValueError as error:
                raise ValueError(f"{error} in row {number} of the {split} data") from None
        splits[split] = rows.remove_columns(column).add_column(column, words)
    return splits


def insertion_examples(args: FinetuningArguments, tokenizer):
    """Return the function that tokenises texts and marks what of them is given."""
    limit = args.max_length

    def make(batch):
        texts = [texts_of(value) for value in batch[args.text_column]]
        words = batch[args.keywords_column] if args.keywords_column else [[]] * len(texts)
        pairs = [(text, row) for row, group in zip(words, texts, strict=True) for text in group]
        whole, wanted = [text for text, _ in pairs], bool(args.keywords_column)
        # a text may spell a special token: it means its letters
        encoded = tokenizer(whole, return_offsets_mapping=wanted, split_special_tokens=True)
        made = {"input_ids": [ids[:limit] for ids in encoded["input_ids"]]}
        made["complete"] = [len(ids) <= limit for ids in encoded["input_ids"]]
        if args.keywords_column:
            offsets = encoded["offset_mapping"]
            spans = [keyword_spans(text, row) for text, row in pairs]
            made["given"] = [marked(*pair)[:limit] for pair in zip(offsets, spans, strict=True)]
            made |= {"found": [len(row) for row in spans], "asked": [len(row) for _, row in pairs]}
        return made

    return make


def marked(offsets, spans) -> list[bool]:
    """Return for every token whether it lies in one of the spans of characters."""
    return [any(start < right and left < end for left, right in spans) for start, end in offsets]


def prompt_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return [without_eos(tokenizer, ids) for ids in tokenizer(list(texts), split_special_tokens=True)["input_ids"]]


def completion_examples(args: FinetuningArguments, tokenizer, insnext: bool):
    """Return the function that puts completions behind their prompts; only completions are learned."""
    # by insertion, STOP says that a text ends
    end = [] if insnext or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def make(batch):
        prompts = prompt_ids(tokenizer, batch[args.prompt_column])
        completions = batch[args.completion_column]
        completions = tokenizer(completions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        whole = [prompt + completion + end for prompt, completion in zip(prompts, completions, strict=True)]
        cut = [ids[: args.max_length] for ids in whole]
        given = [[place < len(prompt) for place in range(len(ids))] for prompt, ids in zip(prompts, cut, strict=True)]
        complete = [len(ids) <= args.max_length for ids in whole]
        labels = [
            [-100 if fixed else token for token, fixed in zip(*pair, strict=True)]
            for pair in zip(cut, given, strict=True)
        ]
        made = {"given": given, "complete": complete} if insnext else {"labels": labels}
        # the first token is never learned; STOP is, behind a whole text
        learned = [insnext and ends or not all(row[1:]) for row, ends in zip(given, complete, strict=True)]
        return {
            name: [value for value, kept in zip(values, learned, strict=True) if kept]
            for name, values in {"input_ids": cut, **made}.items()
        }

    return make


def make_examples(args: FinetuningArguments, tokenizer, insnext: bool):
    """Return the function that makes training examples of a batch of rows."""
    if args.task == "completion":
        return completion_examples(args, tokenizer, insnext)
    return insertion_examples(args, tokenizer)
