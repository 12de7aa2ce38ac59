"""The scripts around DRT run as their docstrings say, on tiny data: prepare, train, resume, needles, evaluation."""

import gzip
import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parents[2]
SIZES = (
    "--length 256 --chunk_size 16 --sliding_window 48 --num_retrieved_chunks 3 --hidden_size 32 "
    "--intermediate_size 48 --num_attention_heads 2 --num_lower_layers 1 --evaluation_rows 2 "
    '--per_device_train_batch_size 2 --use_cpu --report_to none --logging_steps 1 --needles {"passkey":[1,1]}'
).split()


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    (folder / "books").mkdir()
    texts = list(pydoc_data.topics.topics.values())
    for name, part in (("train", texts[:20]), ("valid", texts[20:24])):
        with gzip.open(folder / "books" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text, "children": False}) + "\n" for text in part)
    run("checkpoints/prepare_books.py", "--data_dir", str(folder), "--output_dir", str(folder), "--vocab_size", "400")
    return folder


def losses(output_dir: Path) -> list[float]:
    state = json.loads(
        (max(output_dir.glob("checkpoint-*"), key=lambda p: int(p.name[11:])) / "trainer_state.json").read_text()
    )
    return [row["loss"] for row in state["log_history"] if "loss" in row]


@pytest.mark.slow
def test_training_goes_on_where_it_was_stopped_and_needles_are_asked_for(corpus, tmp_path):
    assert np.load(corpus / "train.npy").dtype == np.uint16
    train = ("checkpoints/train_drt.py", "--corpus", str(corpus), *SIZES)
    run(*train, "--output_dir", str(tmp_path / "whole"), "--max_steps", "4", "--save_steps", "4")
    run(*train, "--output_dir", str(tmp_path / "parts"), "--max_steps", "4", "--save_steps", "2")
    for name in ("checkpoint-4", "final"):
        target = tmp_path / "parts" / name
        target.rename(tmp_path / name)
    run(*train, "--output_dir", str(tmp_path / "parts"), "--max_steps", "4", "--save_steps", "2")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(set(losses(tmp_path / "whole"))) == 4

    run(*train, "--output_dir", str(tmp_path / "window"), "--max_steps", "1", "--baseline", "sliding_window")
    models = [f"{name}={tmp_path / folder / 'final'}" for name, folder in (("drt", "whole"), ("window", "window"))]
    needles = "--lengths 256 512 --samples 3 2 --kinds passkey two_hop --location disk".split()
    text = str(corpus / "valid.npy")
    output = ("--output", str(tmp_path / "needles"))
    run("studies/needle_in_a_haystack.py", "--models", *models, "--haystack", text, *needles, *output)
    report = json.loads((tmp_path / "needles.json").read_text())
    assert [report["results"]["window"]["two_hop"][str(n)]["exact"]["n"] for n in (256, 512)] == [3, 2]
    assert (tmp_path / "needles.png").stat().st_size > 10_000

    sizes = (
        "--contexts 32 128 --places 3 --targets 16 --decode_contexts 200 600 --steps 16 --searches exact faiss".split()
    )
    run("studies/evaluate_drt.py", "--models", *models, "--text", text, *sizes, "--output", str(tmp_path / "drt"))
    report = json.loads((tmp_path / "drt.json").read_text())
    assert report["perplexity"]["window"]["32"]["loss"] > 0
    for search in ("exact", "faiss"):
        cell = report["decoding"][search]["600"]
        assert cell["computed_bytes"] == (600 + 16) // 16 * 2 * 16 * 32 * 4
    short, long = (report["decoding"]["faiss"][context]["device_bytes"] for context in ("200", "600"))
    # without landmarks, the numbers of the chunks are all that grows: eight bytes each, doubled
    assert long - short <= 8 * 64
