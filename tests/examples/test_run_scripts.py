"""Every run_*.py script trains, evaluates and predicts on tiny data, and a killed run ends as one that was not."""

import gzip
import itertools
import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForMultipleChoice, AutoTokenizer

from modeling_insnext import DrtForCausalLM, InsNextForInsertionLM
from tests.support.equality import same_bits
from tests.support.script_models import SHAPES, losses, row, save_tiny_model, weights
from tests.support.script_runner import run


STEPS = 7
TRAIN = f"--do_train --max_steps {STEPS} --save_steps 2 --logging_steps 1 --learning_rate 1e-2".split()
QUIET = "--use_cpu --report_to none --disable_tqdm true --per_device_train_batch_size 4".split()

# script, model types, how the model begins (new, from a checkpoint), arguments
CASES = {
    "sentences": ("run_pretraining", "insnext", "new", "--stage sentences --block_size 32 --do_eval"),
    "documents": ("run_pretraining", "insnext", "old", "--stage documents --block_size 48 --do_eval"),
    "adapted": (
        "run_pretraining",
        "insnext",
        "old",
        "--stage sentences --block_size 32 --adapter lora --lora_target_modules all-linear --head_learning_rate 3e-2 "
        "--left_to_right_share 0.9 0.3 --alignment_weight 0.5 --bf16 --do_eval",
    ),
    "drt": ("run_pretraining", "drt", "new", "--block_size 24 --do_eval"),
    "keywords": (
        "run_finetuning",
        "insnext",
        "old",
        "--task keywords --text_column texts --keywords_column words --adapter lora --do_predict",
    ),
    "infilling": (
        "run_finetuning",
        "insnext",
        "old",
        "--task infilling --adapter dora --do_eval --left_to_right_share 0.9 0.1",
    ),
    "completion-insnext": ("run_finetuning", "insnext", "old", "--task completion --do_eval --do_predict"),
    "completion-drt": (
        "run_finetuning",
        "drt",
        "old",
        "--task completion --adapter lora --lora_target_modules all-linear --do_eval --do_predict",
    ),
    "single-insnext": ("run_classification", "insnext", "old", "--text_columns text --do_eval --do_predict"),
    "pairs-insnext": (
        "run_classification",
        "insnext",
        "new",
        "--text_columns prompt completion --max_length 9 --label_column kind --do_eval",
    ),
    "pairs-drt": (
        "run_classification",
        "drt",
        "old",
        "--text_columns prompt completion --adapter lora --lora_dropout 0.2 --do_eval --do_predict",
    ),
    "choice": ("run_multiple_choice", "insnext", "old", "--do_eval"),
    "choice-lora": (
        "run_multiple_choice",
        "insnext",
        "old",
        "--adapter lora --do_eval --train_sampling_strategy group_by_length",
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with data, a tokenizer and a checkpoint of each model type."""
    folder = tmp_path_factory.mktemp("scripts")
    dice = random.Random(0)
    for name, count in (("train", 16), ("validation", 5), ("test", 3)):
        # a column that the other files lack
        rows = [{**row(dice), name: 1} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    for name in SHAPES:
        save_tiny_model(name, folder / name)
    return folder


def arguments(home: Path, output_dir: Path, case: str) -> tuple[str, list[str]]:
    script, model_type, begin, options = CASES[case]
    if begin == "new":
        model = ["--model_type", model_type, "--config_overrides", json.dumps(SHAPES[model_type])]
        model += ["--tokenizer_name", str(home / model_type)]
    else:
        model = ["--model_name_or_path", str(home / model_type)]
    data = [item for name in ("train", "validation") for item in (f"--{name}_file", str(home / f"{name}.jsonl"))]
    if "--do_predict" in options:
        data += ["--test_file", str(home / "test.jsonl")]
    where = ["--output_dir", str(output_dir), "--cache_dir", str(home / "cache")]
    return script, [*model, *data, *options.split(), *where, *TRAIN, *QUIET]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return same_bits(first, second)


# one of each script is killed; of the others the folder is taken as it is at that step
KILLED = ("sentences", "keywords", "single-insnext", "choice")


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(case, home, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    kill_at = random.Random(case).randint(3, STEPS - 1)
    copy_at = None if case in KILLED else (kill_at, str(parts))
    metrics = run(*arguments(home, whole, case), tmp_path / "whole.log", copy_at=copy_at)
    if case in KILLED:
        run(*arguments(home, parts, case), tmp_path / "killed.log", kill_at=kill_at)
    assert parts.is_dir() and not (parts / "trainer_state.json").exists()
    again = run(*arguments(home, parts, case), tmp_path / "resumed.log")
    assert "going on from" in (tmp_path / "resumed.log").read_text()

    assert len(losses(whole)) == STEPS and len(set(losses(whole))) == STEPS
    assert losses(parts) == losses(whole)
    assert weights(whole) and same(weights(parts), weights(whole))
    numbers = [name for name in metrics if not name.endswith(("_runtime", "_per_second"))]
    assert [again[name] for name in numbers] == [metrics[name] for name in numbers]
    check_results(case, whole, metrics)
    if "--do_predict" in CASES[case][-1]:
        assert (parts / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


def check_results(case: str, output_dir: Path, metrics: dict) -> None:
    script, model_type, _, options = CASES[case]
    if "--do_eval" in options:
        assert metrics["eval_loss"] > 0
        if script in ("run_classification", "run_multiple_choice"):
            assert metrics["eval_accuracy_low"] <= metrics["eval_accuracy"] <= metrics["eval_accuracy_high"]
            assert -1 <= metrics["eval_matthews"] <= 1
        elif model_type == "drt":
            assert metrics["eval_perplexity"] > 1
        else:
            assert {"eval_position_loss", "eval_token_loss"} <= metrics.keys()
    assert (output_dir / "adapter_model.safetensors").exists() == ("--adapter" in options)
    if case == "adapted":
        check_adaptation(output_dir)
        check_scored_adapter(output_dir)
    if case == "choice-lora":
        model = AutoPeftModel.from_pretrained(output_dir, import_allowlist=["modeling_insnext"])
        assert type(model.get_base_model()) is type(AutoModelForMultipleChoice.from_pretrained(output_dir))
    if "--do_predict" in options:
        rows = [json.loads(line) for line in (output_dir / "predictions.jsonl").read_text().splitlines()]
        assert len(rows) == 3
        for one in rows if case == "keywords" else []:
            first, second = one["words"]
            assert re.search(rf"(?<![a-z]){first}(?![a-z]).*(?<![a-z]){second}(?![a-z])", one["prediction"], re.DOTALL)
        for one in rows if script == "run_classification" else []:
            assert one["prediction"] in ("0", "1")


def check_adaptation(output_dir: Path) -> None:
    names = weights(output_dir).keys()
    trained_whole = {name.split("slot_head.")[1] for name in names if "slot_head" in name}
    assert {"left_proj.weight", "state_proj.weight", "stop_key"} <= trained_whole
    assert any("lora_A" in name for name in names) and not any("lora" in name for name in trained_whole)
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    distances = [entry["alignment_loss"] for entry in history if "alignment_loss" in entry]
    # the adapter begins as nothing: a cosine of 1, but for its rounding
    assert abs(distances[0]) < 4 * torch.finfo(torch.float32).eps < distances[-1]
    assert (output_dir / "loss.png").stat().st_size > 5_000


def check_scored_adapter(output_dir: Path) -> None:
    """The script scores under an adapter what the adapted model scores."""
    base = json.loads((output_dir / "adapter_config.json").read_text())["base_model_name_or_path"]
    data, folder = Path(base).parent / "validation.jsonl", output_dir / "scores"
    args = ["--model_name_or_path", base, "--data_file", str(data), "--output_dir", str(folder), "--use_cpu"]
    plain = run("run_scoring", args, output_dir / "log")
    args = [*args, "--adapter_name_or_path", str(output_dir), "--output_dir", str(folder) + "2"]
    report = run("run_scoring", args, output_dir / "log")
    model = PeftModel.from_pretrained(InsNextForInsertionLM.from_pretrained(base), output_dir).eval()
    tokenizer, nats = AutoTokenizer.from_pretrained(base), 0.0
    for line in data.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, :-1]
        nats -= float(log_p.gather(1, ids[0, 1:, None]).sum())
    assert report["nats_per_token"] == pytest.approx(nats / report["tokens"], rel=1e-5)
    assert abs(plain["nats_per_token"] - report["nats_per_token"]) > 1e-2


def test_control_another_seed_or_weights_without_the_optimizer_end_elsewhere(home, tmp_path):
    script, given = arguments(home, tmp_path / "whole", "drt")
    run(script, given, tmp_path / "log")
    run(script, [*given, "--seed", "1", "--output_dir", str(tmp_path / "seed")], tmp_path / "log")
    assert losses(tmp_path / "seed") != losses(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    (tmp_path / "weights").mkdir()
    shutil.move(checkpoint, tmp_path / "weights")
    run(script, [*given, "--output_dir", str(tmp_path / "weights")], tmp_path / "log")
    assert losses(tmp_path / "weights")[:4] == losses(tmp_path / "whole")[:4]
    assert losses(tmp_path / "weights") != losses(tmp_path / "whole")


def test_a_checkpoint_whose_writing_was_interrupted_is_left_out(home, tmp_path):
    script, given = arguments(home, tmp_path / "whole", "sentences")
    run(script, given, tmp_path / "log")
    expected = losses(tmp_path / "whole")
    for name in ("trainer_state.json", "model.safetensors"):
        (tmp_path / "whole" / name).unlink()
    shutil.rmtree(tmp_path / "whole" / f"checkpoint-{STEPS}")
    state = tmp_path / "whole" / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    run(script, given, tmp_path / "log")
    assert "checkpoint-4" in (tmp_path / "log").read_text()
    assert losses(tmp_path / "whole") == expected


@pytest.mark.parametrize("model_type", ["insnext", "drt"])
@pytest.mark.parametrize("task", ["perplexity", "multiple_choice"])
def test_scores_go_on_where_they_were_and_agree_with_the_model(task, model_type, home, tmp_path):
    def score(name, **options):
        given = ["--task", task, "--model_name_or_path", str(home / model_type), "--use_cpu", "--batch_size", "2"]
        given += ["--data_file", str(home / "validation.jsonl"), "--output_dir", str(tmp_path / name)]
        given += ["--max_length", "16", "--stride", "7", "--cache_dir", str(home / "cache")]
        return run("run_scoring", given, tmp_path / f"{name}.log", **options)

    report = score("whole")
    score("parts", kill_at=3)
    assert score("parts") == report
    lines = (tmp_path / "whole" / "scores.jsonl").read_text()
    assert (tmp_path / "parts" / "scores.jsonl").read_text() == lines
    rows = [json.loads(line) for line in (home / "validation.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(home / model_type)
    if task == "perplexity":
        counts = [len(tokenizer(one["text"])["input_ids"]) - 1 for one in rows]
        assert report["tokens"] == sum(counts) and report["perplexity"] > 1
        return
    model_class = {"insnext": InsNextForInsertionLM, "drt": DrtForCausalLM}[model_type]
    model = model_class.from_pretrained(home / model_type)
    front = tokenizer(rows[0]["query"])["input_ids"]
    answer = tokenizer(" the dog", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([front + answer])).logits.log_softmax(-1)[0]
    expected = sum(float(log_p[len(front) + i - 1, token]) for i, token in enumerate(answer))
    assert abs(json.loads(lines.split("\n")[0])["log_likelihood"] - expected) < 1e-4


def test_an_answer_in_a_blank_is_scored_by_orders_with_both_sides_given(home, tmp_path):
    data = tmp_path / "blanks.jsonl"
    rows = [{"query": "the _ sees a cat.", "choices": ["old man and a dog", "dog"], "gold": gold} for gold in (0, 1)]
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    given = ["--task", "multiple_choice", "--model_name_or_path", str(home / "insnext"), "--use_cpu", "--blank", "_"]
    given += ["--data_file", str(data), "--cache_dir", str(home / "cache"), "--num_orders", "3", "--score_end"]
    report = run("run_scoring", [*given, "--output_dir", str(tmp_path / "one")], tmp_path / "log")
    assert report["rows"] == 2 and report["accuracy"] == 0.5
    scores = [json.loads(line) for line in (tmp_path / "one" / "scores.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(home / "insnext")
    parts = [tokenizer("the")["input_ids"]]
    parts += tokenizer([" dog", " sees a cat."], add_special_tokens=False)["input_ids"]
    ids, places = (
        torch.tensor([sum(parts, [])]),
        torch.tensor([[0] * len(parts[0]) + [1] * len(parts[1]) + [2] * len(parts[2])]),
    )
    model = InsNextForInsertionLM.from_pretrained(home / "insnext")
    m = int((places == 1).sum())
    exact = model.score(ids, context_mask=places != 1, orders=torch.tensor(list(itertools.permutations(range(m)))))
    assert scores[1]["tokens"] == m + 1 and scores[1]["log_likelihood"] < 0
    # there are no more orders than draws, so all of them are taken
    assert math.factorial(m) <= 3 and abs(scores[1]["log_likelihood"] - float(exact)) < 1e-4
    # another seed, other orders; another command may not write into the same folder
    run("run_scoring", [*given, "--seed", "1", "--output_dir", str(tmp_path / "two")], tmp_path / "log")
    lines = [(tmp_path / name / "scores.jsonl").read_text() for name in ("one", "two")]
    assert lines[0] != lines[1]
    with pytest.raises(AssertionError, match="output_dir must be empty or hold this command's scores"):
        run("run_scoring", [*given, "--seed", "1", "--output_dir", str(tmp_path / "one")], tmp_path / "log")


@pytest.mark.slow
def test_the_classification_table_is_made_of_runs_that_are_not_run_again(home, tmp_path):
    (tmp_path / "nlu").mkdir()
    rows = "".join(
        json.dumps({"sentence": one["text"], "label": one["label"]}) + "\n"
        for one in map(json.loads, (home / "train.jsonl").read_text().splitlines())
    )
    for name in ("sst2_dev.jsonl", "cola_in_domain_train.jsonl", "cola_in_domain_dev.jsonl"):
        (tmp_path / "nlu" / name).write_text(rows)
    (tmp_path / "nlu" / "sst2_train.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    given = (
        f"--data_dir {tmp_path} --checkpoint {home / 'insnext'} --output {tmp_path / 'table'} --runs {tmp_path}/runs"
    )
    given = [*given.split(), "--max_steps", "2", "--seeds", "0", "1"]
    report = run("classification_table", given, tmp_path / "log")
    assert [len(runs) for results in report["results"].values() for runs in results.values()] == [2] * 6
    assert len((tmp_path / "table.md").read_text().split("majority class")) == 3
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/eval_results.json"))
    again = run("classification_table", given, tmp_path / "log")
    assert again["results"] == report["results"]
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/eval_results.json")) == before
