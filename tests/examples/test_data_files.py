"""Files of rows as other tools write them: words that look like nothing, labels of two types, keywords in a cell."""

import gzip
import json
import logging

import pytest
import run_classification
import run_finetuning
from common.data import read_file, split_of
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError


WORDS = ["null", "NA", "N/A", "None", "NaN", "n/a", "nan", "#N/A"]


def write_csv(path, header, rows):
    quoted = [",".join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in rows]
    path.write_text("\n".join([",".join(header), *quoted]) + "\n")
    return str(path)


def test_words_that_look_like_nothing_are_words_in_csv(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["text", "label"], [(word, number) for number, word in enumerate(WORDS)])
    rows = split_of({"train": read_file("train_file", path, str(tmp_path / "cache"))}, "train", ["text", "label"])
    assert rows["text"] == WORDS and rows["label"] == list(range(len(WORDS)))
    # control: an empty cell has no value
    path = write_csv(tmp_path / "b.csv", ["text", "label"], [("a", 1), ("", 2)])
    made = read_file("train_file", path, str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="must have a value in every row, got None for 'text' in row 1"):
        split_of({"train": made}, "train", ["text", "label"])


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv"])
def test_labels_of_two_types_are_names(tmp_path, suffix, caplog):
    labels = [0, 1] * 6000 + ["1", "two", "0"]
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        write_csv(path, ["text", "label"], [("a", label) for label in labels])
    else:
        lines = "".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels)
        path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith("gz") else lines.encode())
    with caplog.at_level(logging.WARNING):
        rows = read_file("train_file", str(path), str(tmp_path / "cache"))
    assert rows["label"] == [str(label) for label in labels] and set(rows["text"]) == {"a"}
    assert "mixes texts and numbers in a column, which is read as texts" in caplog.text
    args = run_classification.ClassificationArguments(["text"])
    assert run_classification.trained_classes(args, DatasetDict(train=rows)) == ["0", "1", "two"]


def test_what_is_no_mixture_of_scalars_is_left_to_its_reader(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": [1]}\n{"text": "b", "label": "1"}\n')
    try:
        rows = read_file("train_file", str(path), str(tmp_path / "cache"))
    except DatasetGenerationError:
        # as older versions of the library end
        return
    assert rows["text"] == ["a", "b"] and rows["label"][0] == [1]


def keywords(cells, **options):
    args = run_finetuning.FinetuningArguments(task="keywords", keywords_column="words", **options)
    splits = DatasetDict(train=Dataset.from_dict({"text": ["a"] * len(cells), "words": cells}))
    return list(run_finetuning.with_lists(args, splits)["train"]["words"])


def test_keywords_stand_in_a_cell():
    assert keywords(['["old man", "sea"]', "[]"]) == [["old man", "sea"], []]
    assert keywords(["old man; sea", "dog"], keywords_separator=";") == [["old man", "sea"], ["dog"]]
    assert keywords([["old man", "sea"]]) == [["old man", "sea"]]
    assert keywords([["old man; sea"]], keywords_separator=";") == [["old man; sea"]]


@pytest.mark.parametrize("cell", ["old man, sea", '{"a": 1}', "[1, 2]", '"dog"'])
def test_a_cell_without_a_list_is_named(cell):
    with pytest.raises(
        ValueError, match="words must be a list of words .*, a JSON list .* in row 1 of the train data"
    ):
        keywords(['["dog"]', cell])


@pytest.mark.parametrize(
    "options", [{"keywords_separator": ";"}, {"keywords_column": "words", "keywords_separator": ""}]
)
def test_a_separator_needs_a_column_and_is_something(options):
    with pytest.raises(ValueError, match="keywords_separator must be a mark and needs keywords_column"):
        run_finetuning.FinetuningArguments(task="keywords", **options)
