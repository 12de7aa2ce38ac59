"""Which checkpoint a script goes on from, and what it says where that is not what the command asks for."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_pretraining
from transformers.trainer import TRAINER_STATE_NAME

from modeling_insnext.runs import checkpoint_to_resume
from tests.support.script_models import save_tiny_model


QUIET = "--use_cpu --report_to none --disable_tqdm true --stage sentences --block_size 32".split()
TEXTS = {
    "train": ["The old man runs. A dog sees the cat and the ball."] * 6,
    "validation": ["A young woman finds the big red house. The sea and a cat."] * 4,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resuming")
    save_tiny_model("insnext", folder / "lm")
    for split, texts in TEXTS.items():
        rows = [{"text": text, "body": text} for text in texts]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(home: Path, output_dir: Path, *given: str, model: str | None = None) -> dict:
    where = ["--model_name_or_path", model or str(home / "lm"), "--cache_dir", str(home / "cache")]
    return run_pretraining.main([*QUIET, *where, "--output_dir", str(output_dir), *given])


def checkpoints(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / TRAINER_STATE_NAME).write_text("{}")


def test_the_checkpoint_to_go_on_from(tmp_path):
    def found(given, do_train=True):
        training = SimpleNamespace(do_train=do_train, resume_from_checkpoint=given, output_dir=str(tmp_path))
        return checkpoint_to_resume(training)

    assert found(None) is found("False") is found(False) is None
    with pytest.raises(ValueError, match="resume_from_checkpoint True needs a checkpoint in output_dir"):
        found("True")
    checkpoints(tmp_path, "checkpoint-2", "checkpoint-10", "checkpoint-best")
    last = str(tmp_path / "checkpoint-10")
    assert found(None) == found("True") == found("true") == last
    assert found("False") is found(None, do_train=False) is None
    best = str(tmp_path / "checkpoint-best")
    assert found(best) == best
    with pytest.raises(ValueError, match="must be True, False or a complete checkpoint, got 'checkpoint-3'"):
        found("checkpoint-3")


def test_a_run_that_ended_and_other_arguments_are_told(home, tmp_path, caplog):
    trained = ["--train_file", str(home / "train.jsonl"), "--do_train", "--max_steps", "1", "--save_steps", "1"]
    run(home, tmp_path, *trained)
    assert "nothing is trained" not in caplog.text
    before = {name: (tmp_path / name).read_bytes() for name in ("model.safetensors", "train_results.json")}
    run(home, tmp_path, *trained)
    assert "nothing is trained" in caplog.text and "step 1 of 1" in caplog.text
    assert "other arguments" not in caplog.text
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not (tmp_path / "checkpoint-2").exists()
    run(home, tmp_path, *trained, "--text_column", "body", "--max_steps", "2")
    assert "trained with other arguments: text_column 'text', now 'body'" in caplog.text
    caplog.clear()
    run(home, tmp_path, *trained, "--text_column", "body", "--resume_from_checkpoint", "False")
    assert "nothing is trained" not in caplog.text and "other arguments" not in caplog.text


def test_evaluation_is_the_same_without_training_in_the_same_command(home, tmp_path):
    data = [item for split in TEXTS for item in (f"--{split}_file", str(home / f"{split}.jsonl"))]
    given = [*data, "--do_eval", "--contexts", '{"keywords": 1.0}', "--save_strategy", "no"]
    both = run(home, tmp_path / "both", *given, "--do_train", "--max_steps", "1")
    alone = run(home, tmp_path / "alone", *given, model=str(tmp_path / "both"))
    assert alone["eval_loss"] == both["eval_loss"]
