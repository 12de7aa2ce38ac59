"""Rows of files and of the Hub, checked, and the insertion sequences made of them."""

import csv
import gzip
import inspect
import json
import logging
from collections.abc import Iterator

import datasets
from datasets import Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetGenerationError

from modeling_insnext.data import (
    ContextMixture,
    InsertionCollator,
    piece_table,
    rarity_table,
    sentence_end_table,
    word_start_table,
)

from .arguments import DataArguments, InsertionArguments, ModelArguments, data_format, json_object


SCALARS = {str, int, float, bool}

logger = logging.getLogger(__name__)


def load_splits(data: DataArguments, model: ModelArguments) -> DatasetDict:
    """Return the splits train, validation and test, as far as they were given."""
    if data.dataset_name is not None:
        splits = datasets.load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=model.cache_dir)
    else:
        # each for itself, as their columns may differ
        splits = DatasetDict()
        for name, path in data.files.items():
            splits[name] = read_file(f"{name}_file", path, model.cache_dir)
    limits = {"train": data.max_train_samples}
    for name, rows in splits.items():
        limit = limits.get(name, data.max_eval_samples)
        splits[name] = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return splits


def read_file(name: str, path: str, cache_dir: str | None) -> Dataset:
    """Return the rows of a file; a column that holds texts in one row and numbers in another is read as texts.

    In csv an empty cell has no value, and a cell that reads null, NA or None has that word.
    """
    kind = data_format(name, path)
    options = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    options |= {"data_files": path, "split": "train", "cache_dir": cache_dir}
    try:
        rows = datasets.load_dataset(kind, **options)
    except DatasetGenerationError:
        if kind == "text":
            raise
        rows = None
    # newer versions of `datasets` keep such a column of JSON as it is, older ones and csv end here
    if rows is not None and not any(type(feature).__name__ == "Json" for feature in rows.features.values()):
        return rows
    columns = mixed_columns(path) if kind == "json" else next(csv.reader(lines_of(path)))
    if not columns:
        return datasets.load_dataset(kind, **options)
    logger.warning("%s mixes texts and numbers in a column, which is read as texts: %s", name, path)
    if kind == "csv":
        return datasets.load_dataset(kind, features=Features(dict.fromkeys(columns, Value("string"))), **options)
    return Dataset.from_list([with_texts(row, columns) for row in json_rows(path)])


def lines_of(path: str) -> Iterator[str]:
    """Yield the lines of a file, gzipped or not; a line ends at a newline and nowhere else."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
        yield from lines


def json_rows(path: str) -> Iterator[dict]:
    """Yield the rows of a file of JSON lines."""
    for line in lines_of(path):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"a line of {path} must be a JSON object, got {line.strip()[:80]!r}")
        yield row


def mixed_columns(path: str) -> set[str]:
    """Return the columns that hold texts in some rows and numbers in others, and nothing else."""
    kinds: dict[str, set] = {}
    for row in json_rows(path):
        for column, value in row.items():
            if value is not None:
                kinds.setdefault(column, set()).add(type(value))
    return {column for column, found in kinds.items() if str in found and found & {int, float} and found <= SCALARS}


def with_texts(row: dict, columns: set[str]) -> dict:
    return {name: str(value) if name in columns and value is not None else value for name, value in row.items()}


def split_of(splits: DatasetDict, name: str, columns: list[str]) -> Dataset:
    """Return a split that has these columns.

    Raises:
        ValueError: If the split, a column or a value is missing, or the split has no rows.
    """
    if name not in splits:
        raise ValueError(f"the data must have a split {name!r}, got {sorted(splits)}")
    missing = [column for column in columns if column not in splits[name].column_names]
    if missing:
        raise ValueError(f"{name} data must have the columns {columns}, got {splits[name].column_names}")
    if not len(splits[name]):
        raise ValueError(f"{name} data must have at least one row, got 0")
    for column in columns:
        values = splits[name].data.column(column)
        if values.null_count:
            row = values.is_null().index(True).as_py()
            raise ValueError(f"{name} data must have a value in every row, got None for {column!r} in row {row}")
    return splits[name]


def check_texts(splits: DatasetDict, columns: list[str]) -> None:
    """Raise a `ValueError` if one of these columns holds something else than texts."""
    for split, rows in splits.items():
        for column in set(columns) & set(rows.column_names):
            kind = getattr(rows.features[column], "dtype", rows.features[column])
            # a column without any value is `split_of`'s to refuse
            if kind not in ("string", "large_string", "null"):
                raise ValueError(f"{split} data must have texts in {column!r}, got {kind}")


def mapped(rows: Dataset, function, data: DataArguments, training) -> Dataset:
    """Return what `function` makes of batches of rows and, if it takes them, of the rows' numbers.

    The main process does it first, the others read its cache.
    """
    with training.main_process_first(desc="preparing the data"):
        made = rows.map(
            function,
            batched=True,
            with_indices=len(inspect.signature(function).parameters) == 2,
            remove_columns=rows.column_names,
            num_proc=data.preprocessing_num_workers,
            load_from_cache_file=not data.overwrite_cache,
            desc="Preparing",
        )
    if not len(made):
        raise ValueError(f"the data must make at least one example, got none from {len(rows)} rows")
    return made


def without_eos(tokenizer, ids: list[int]) -> list[int]:
    """Return a tokenised text that does not end yet."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def body(tokenizer, ids: list[int]) -> list[int]:
    """Return a tokenised text without BOS in front and EOS behind."""
    ids = ids[1:] if ids and ids[0] == tokenizer.bos_token_id else ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def wanted_examples(splits: DatasetDict, columns: list[str], make, data: DataArguments, training) -> dict:
    """Return what `make` makes of the splits that training and evaluation need, as arguments of a `Trainer`."""
    needed = {"train_dataset": ("train", training.do_train), "eval_dataset": ("validation", training.do_eval)}
    return {
        name: mapped(split_of(splits, split, columns), make, data, training)
        for name, (split, wanted) in needed.items()
        if wanted
    }


def insertion_collator(args: InsertionArguments, tokenizer, texts, contexts: dict, training, **options):
    """Return the collator of insertion sequences over whole words.

    Args:
        args: What was given.
        tokenizer: Tokenizer of the model.
        texts: Tokenised texts, for the rarity of tokens, which keywords are chosen by.
        contexts: Shares of `ContextMixture`, if none were given.
        training: Training arguments; the seed of all draws is theirs for data.
        **options: More fields of `InsertionCollator`.
    """
    order = args.order_spec
    shares = contexts if args.contexts is None else json_object("contexts", args.contexts)
    rare = bool(shares.get("keywords")) or "keyword_first" in order
    return InsertionCollator(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        order=order,
        contexts=ContextMixture(**shares),
        left_to_right_share=args.shares,
        word_starts=word_start_table(tokenizer),
        sentence_ends=sentence_end_table(tokenizer),
        token_rarity=rarity_table((text["input_ids"] for text in texts), len(tokenizer)) if rare else None,
        pieces=piece_table(tokenizer) if "program_lines" in order else None,
        context_step_weight=3.0 if args.context_step_weight is None else args.context_step_weight,
        seed=training.seed if training.data_seed is None else training.data_seed,
        **options,
    )
