"""The benchmarks on a CPU: what they write, and that a part that fails or hangs takes nothing else with it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from insnext_kernels import slot_cross_entropy
from tests.support.kernels import ROOT


BENCHMARKS = ROOT / "kernels" / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a script of the benchmarks by name; its neighbours lie beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import importlib

    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_markdown_writes_every_row_and_escapes_bars(module):
    markdown = module("timing").markdown
    text = markdown([{"a": 1.23456, "b": None}, {"a": 1234.5, "b": "x|y"}], {"a": "A", "b": "B"})
    assert text.splitlines() == ["| A | B |", "| --- | --- |", "| 1.23 | - |", "| 1234 | x\\|y |"]
    assert markdown([]) == "(no rows)\n"


def test_a_clock_runs_out(module):
    clock = module("timing").Clock(0.05)
    assert not clock.over() and 0 < clock.left() <= 0.05
    time.sleep(0.06)
    assert clock.over() and clock.left() == 0


def test_the_slots_of_a_text_are_those_of_list_insertion(module):
    births, deaths, targets = module("slot_cross_entropy").insertion_slots(12, 3)
    for t in range(12):
        alive = [s for s in range(24) if births[s] <= t < deaths[s]]
        assert len(alive) == t + 1
        assert targets[t] in alive or t == 11 and targets[t] == 24


def test_the_peer_of_the_benchmark_computes_the_same(module, monkeypatch):
    benchmark = module("slot_cross_entropy")
    monkeypatch.setattr(benchmark, "STATES_PER_CHUNK", 5)
    tensors = [x.cpu() if x is not None else x for x in benchmark.tensors_of(2, 12, 8, True, torch.float64)]
    ours = slot_cross_entropy(*tensors, cap=30.0, impl="reference")
    assert torch.allclose(benchmark.chunked(*tensors, cap=30.0), ours, rtol=1e-12, atol=0)


def fake_run(run, monkeypatch, tmp_path, results, deadline=500.0):
    """Run all parts, each of which returns or raises what `results` says."""
    monkeypatch.setattr(run, "run_tests", lambda seconds, smoke: (results["tests"], "log"))
    monkeypatch.setattr(run, "run_memory_check", lambda seconds: {"status": 0, "table": "clean"})
    monkeypatch.setattr(run, "run_benchmark", lambda part, seconds, smoke: results.get(part.name, results["other"]))
    status = run.run_all(True, tmp_path, deadline)
    return status, json.loads((tmp_path / "smoke.json").read_text()), (tmp_path / "smoke.md").read_text()


def test_the_report_names_machine_versions_commit_and_date(module, monkeypatch, tmp_path):
    passed = {"status": 0, "summary": "3 passed", "failed": []}
    other = {"status": 0, "table": "| x |", "ceilings": {"matmul_tflops": 700.0, "copy_gb_s": 4000.0}}
    status, report, text = fake_run(module("run"), monkeypatch, tmp_path, {"tests": passed, "other": other})
    assert status == 0 and len(list(tmp_path.iterdir())) == 3
    assert {"gpu", "date", "commit", "torch", "triton", "transformers", "python"} <= report["environment"].keys()
    assert all(str(value) in text for value in report["environment"].values())
    assert "3 passed" in text and text.count("| x |") == 5 and "700 TFLOP/s" in text


def test_a_part_that_fails_is_reported_and_hides_no_other(module, monkeypatch, tmp_path):
    failed = {"status": 1, "summary": "1 failed, 2 passed", "failed": ["FAILED tests/kernels/test_x.py::test_y"]}
    results = {"tests": failed, "training": {"status": 1, "table": "No result: exit status 1."}}
    results["other"] = {"status": 0, "table": "| x |"}
    status, _, text = fake_run(module("run"), monkeypatch, tmp_path, results)
    assert status == 1 and "test_y" in text and "No result: exit status 1." in text and text.count("| x |") == 4


def test_what_no_time_is_left_for_is_left_out_by_name(module, monkeypatch, tmp_path):
    passed = {"status": 0, "summary": "3 passed", "failed": []}
    results = {"tests": passed, "other": {"status": 0, "table": "| x |"}}
    status, _, text = fake_run(module("run"), monkeypatch, tmp_path, results, deadline=1.0)
    assert status == 0 and text.count("No time left.") == 6 and "no time left" in text


def test_a_child_that_hangs_is_ended_with_its_own_children(module):
    started = time.monotonic()
    code = "import subprocess, sys; print('here', flush=True); subprocess.run([sys.executable, '-c', 'while 1: pass'])"
    status, output = module("run").child([sys.executable, "-c", code], 3)
    assert status == 124 and output.strip() == "here" and time.monotonic() - started < 30


def test_a_benchmark_that_breaks_says_why(module, monkeypatch, tmp_path):
    run = module("run")
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "slow.py").write_text("raise RuntimeError('no such kernel')")
    result = run.run_benchmark(run.Part("slow", 60, "Slow"), 60, True)
    assert result["status"] == 1 and "no such kernel" in result["table"]


def test_all_parts_fit_into_the_time(module):
    run = module("run")
    assert run.DEADLINE < 9 * 60
    for part in run.BENCHMARKS:
        assert (BENCHMARKS / f"{part.name}.py").exists()


def test_the_operations_of_a_step_are_counted_as_the_models_multiply(module):
    from torch.utils.flop_counter import FlopCounterMode

    training = module("training")
    torch.manual_seed(0)
    shape = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = training.InsNextForInsertionLM(training.InsNextConfig(**shape, num_attention_heads=2)).to(training.DEVICE)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**training.batch_of(2, 64, 500)).loss.backward()
    # eager attention and the eager loss also multiply what is hidden or dead
    counted = training.operations(model, 2, 64)
    assert 0.8 < counted / counter.get_total_flops() < 1.05


@pytest.mark.slow
def test_the_whole_run_is_rehearsed_on_a_cpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "smoke.json").read_text())
    assert len(report["parts"]) == 7 and not any(part["status"] for part in report["parts"].values())


@pytest.mark.slow
def test_every_case_of_the_memory_check_runs():
    run = [sys.executable, str(BENCHMARKS / "memory_check.py")]
    paths = {"PYTHONPATH": str(ROOT / "kernels"), "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(run, env=paths, capture_output=True, text=True, timeout=200)
    assert done.stdout.count(" ran") == 3, done.stderr[-3000:]
