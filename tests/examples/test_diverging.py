"""A script whose training diverges says in which step, and writes nothing."""

import json
import random

import pytest
import run_pretraining

from tests.support.script_models import row, save_tiny_model


@pytest.mark.parametrize("model_type", ["insnext", "drt"])
def test_a_script_that_diverges_leaves_the_model_of_an_earlier_run(tmp_path, model_type):
    dice = random.Random(0)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(dice)) + "\n" for _ in range(24)))
    save_tiny_model(model_type, tmp_path / "model")
    args = [
        "--model_name_or_path",
        str(tmp_path / "model"),
        "--train_file",
        str(tmp_path / "rows.jsonl"),
        "--do_train",
    ]
    args += ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"), "--block_size", "32"]
    args += ["--use_cpu", "--report_to", "none", "--save_strategy", "no", "--max_steps", "4", "--disable_tqdm", "true"]
    args += ["--stage", "documents"] if model_type == "insnext" else []
    run_pretraining.main(args)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*") if path.is_file()}
    assert {"model.safetensors", "train_results.json"} <= {path.name for path in before}
    with pytest.raises(FloatingPointError, match=r"in step \d|after step \d"):
        run_pretraining.main([*args, "--learning_rate", "1e30"])
    assert all(path.read_bytes() == content for path, content in before.items())
