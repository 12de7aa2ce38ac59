"""Classes keep their names and their order: in checkpoints trained on, in adapters, in data without labels."""

import json
from pathlib import Path

import pytest
import run_classification
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.support.equality import same_bits
from tests.support.script_models import save_tiny_model


QUIET = "--use_cpu --report_to none --disable_tqdm true --save_strategy no --text_columns text --max_steps 1".split()
# weights stay as they were loaded
STILL = ["--do_train", "--learning_rate", "0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A language model, rows whose labels are names or numbers, and the same as a data set with a `ClassLabel`."""
    folder = tmp_path_factory.mktemp("classes")
    save_tiny_model("insnext", folder / "lm")
    kinds = {"names": ["yes", "no"], "numbers": [0, 1], "others": ["bad", "good"], "three": ["bad", "good", "fair"]}
    for kind, labels in kinds.items():
        rows = [{"text": f"the dog {number}", "label": labels[number % len(labels)]} for number in range(6)]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    features = Features({"text": Value("string"), "label": ClassLabel(names=kinds["names"])})
    for name, last in (("labelled", 1), ("unlabelled", -1)):
        (folder / name).mkdir()
        for split in ("train", "test"):
            label = last if split == "train" else -1
            rows = {"text": ["a cat", "the dog", "a ball"], "label": [0, 1, label]}
            Dataset.from_dict(rows, features).to_parquet(folder / name / f"{split}.parquet")
    tuned, data = str(folder / "tuned"), ["--dataset_name", str(folder / "labelled")]
    given = ["--model_name_or_path", str(folder / "lm"), *data, "--do_train", "--save_strategy", "steps"]
    run_classification.main([*QUIET, *given, "--cache_dir", str(folder / "cache"), "--output_dir", tuned])
    return folder


def run(home: Path, model: str, output_dir: Path, *given: str) -> dict:
    where = ["--cache_dir", str(home / "cache"), "--output_dir", str(output_dir)]
    return run_classification.main([*QUIET, "--model_name_or_path", str(home / model), *where, *given])


def classes(folder: Path) -> list[str]:
    return list(AutoConfig.from_pretrained(folder).id2label.values())


def head(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["score.weight"]


def test_a_checkpoint_with_the_same_classes_keeps_their_order(home, tmp_path):
    assert classes(home / "tuned") == ["yes", "no"]
    run(home, "tuned", tmp_path, "--train_file", str(home / "names.jsonl"), *STILL)
    assert classes(tmp_path) == ["yes", "no"]
    assert same_bits(head(tmp_path), head(home / "tuned"))


@pytest.mark.parametrize("kind", ["others", "three", "numbers"])
def test_a_checkpoint_with_other_classes_gets_a_new_head(kind, home, tmp_path, caplog):
    run(home, "tuned", tmp_path, "--train_file", str(home / f"{kind}.jsonl"), *STILL)
    assert (
        classes(tmp_path)
        == {
            "others": ["bad", "good"],
            "three": ["bad", "fair", "good"],
            "numbers": ["0", "1"],
        }[kind]
    )
    assert "a new one is made" in caplog.text
    assert not same_bits(head(tmp_path)[:2], head(home / "tuned"))


def test_going_on_in_a_folder_keeps_the_classes_and_refuses_others(home, tmp_path):
    more = ["--train_file", str(home / "names.jsonl"), "--do_train", "--save_strategy", "steps", "--save_steps", "1"]
    data = ["--dataset_name", str(home / "labelled"), *more[2:]]
    run(home, "lm", tmp_path, *data)
    run(home, "lm", tmp_path, *more, "--max_steps", "2")
    assert classes(tmp_path) == classes(tmp_path / "checkpoint-2") == ["yes", "no"]
    others = ["--train_file", str(home / "others.jsonl"), *more[2:], "--max_steps", "3"]
    with pytest.raises(ValueError, match=r"checkpoint-2 .*\['yes', 'no'\].*\['bad', 'good'\]"):
        run(home, "lm", tmp_path, *others)


def test_a_row_without_a_label_is_for_prediction_only(home, tmp_path):
    data = ["--dataset_name", str(home / "unlabelled")]
    with pytest.raises(ValueError, match="label must be one of .*got -1 in row 2"):
        run(home, "tuned", tmp_path, *data, "--do_train")
    run(home, "tuned", tmp_path, *data, "--do_predict")
    rows = [json.loads(row) for row in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and {row["prediction"] for row in rows} <= {"yes", "no"}


def test_a_head_without_names_takes_the_numbers(home, tmp_path):
    evaluated = ["--validation_file", str(home / "numbers.jsonl"), "--do_eval"]
    assert run(home, "lm", tmp_path, *evaluated)["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"one of \['yes', 'no'\], got 0 in row 0"):
        run(home, "tuned", tmp_path, *evaluated)


def test_an_adapter_knows_its_classes(home, tmp_path):
    data = [item for name in ("train", "validation", "test") for item in (f"--{name}_file", str(home / "three.jsonl"))]
    trained = [*data, "--adapter", "lora", "--do_train", "--do_eval", "--learning_rate", "1"]
    saved = ["--save_strategy", "steps", "--save_steps", "1"]
    expected = run(home, "lm", tmp_path / "adapter", *trained, *saved)["eval_loss"]
    for folder in ("adapter", "adapter/checkpoint-1"):
        given = [*data, "--adapter_name_or_path", str(tmp_path / folder), "--do_eval", "--do_predict"]
        assert run(home, "lm", tmp_path / "again", *given)["eval_loss"] == pytest.approx(expected, abs=1e-6)
        lines = (tmp_path / "again" / "predictions.jsonl").read_text().splitlines()
        assert {json.loads(line)["prediction"] for line in lines} <= {"bad", "fair", "good"}
    with pytest.raises(ValueError, match=r"adapter was trained on .*'fair'.*\['no', 'yes'\]"):
        other = ["--adapter_name_or_path", str(tmp_path / "adapter"), "--train_file", str(home / "names.jsonl")]
        run(home, "lm", tmp_path / "again", *other, "--do_train")
    # the folder loads as that of any adapter, which config.json would prevent
    for auto_class in (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification):
        names = {
            int(index): name for index, name in json.loads((tmp_path / "adapter/id2label.json").read_text()).items()
        }
        model = auto_class.from_pretrained(tmp_path / "adapter", id2label=names)
        assert list(model.config.id2label.values()) == ["bad", "fair", "good"]
