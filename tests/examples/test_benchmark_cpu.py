"""The benchmark of a step on a CPU runs as a whole; texts that are written in turns are written as they are alone."""

import json
import sys

import benchmark_cpu
import numpy as np
import pytest
import step_clock
from cpu_rows import ROWS, Sides

from tests.support.equality import same_bits
from tests.support.insnext import shipped_model


def test_the_smoke_run_has_every_row_and_says_what_it_left_out(tmp_path, monkeypatch):
    fast = sorted(set(ROWS) - {"loading"})
    monkeypatch.setattr(
        sys, "argv", ["benchmark_cpu.py", "--smoke", "--output", str(tmp_path / "table"), "--rows", *fast]
    )
    benchmark_cpu.main()
    report = json.loads((tmp_path / "table.json").read_text())
    measured = {ratio["what"] for ratio in report["ratios"]}
    for row in ("model: step, 2 rows, n = 12", "mini: step, 4 beams, n = 8", "DRT of 1 layers: step behind 90 tokens"):
        assert row in measured
    assert {"model: step, 1 rows, n = 12", "its source: step, 1 rows, n = 12"} <= measured
    assert all(ratio["low"] <= ratio["ratio"] <= ratio["high"] for ratio in report["ratios"])
    text = (tmp_path / "table.md").read_text()
    assert all(f"Not measured: {name}, {reason}." in text for name, reason in report["left_out"].items())


def test_a_row_that_fails_is_said_to_and_the_others_are_kept(tmp_path, monkeypatch):
    def fails(args):
        yield Sides("first line", "itself", None, np.ones(4), np.ones(4))
        raise ValueError(f"no row of {args.model}")

    monkeypatch.setattr(benchmark_cpu, "ROWS", {"fails": fails, "bookkeeping": ROWS["bookkeeping"]})
    asked = ["--smoke", "--output", str(tmp_path / "table"), "--rows", "fails", "bookkeeping"]
    monkeypatch.setattr(sys, "argv", ["benchmark_cpu.py", *asked])
    with pytest.raises(SystemExit, match="rows that failed: fails"):
        benchmark_cpu.main()
    report = json.loads((tmp_path / "table.json").read_text())
    assert report["left_out"] == {"fails": "it failed with ValueError"}
    assert [ratio["what"].split(",")[0] for ratio in report["ratios"]] == ["first line"] + 2 * [
        "mini: step without weights"
    ]


@pytest.mark.parametrize(
    ("asked", "rule"), [(["--rows", "stpes"], "rows must be of"), (["--steps", "3"], "at least 4")]
)
def test_what_cannot_be_measured_is_refused(asked, rule, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark_cpu.py", *asked])
    with pytest.raises(ValueError, match=rule):
        benchmark_cpu.main()


def test_texts_written_in_turns_are_what_they_are_alone_and_every_step_has_a_time():
    model = shipped_model()
    written = []
    jobs = [(model, lambda tokens=tokens: written.append(step_clock.write(model, tokens, 6))) for tokens in (9, 12)]
    clocks = step_clock.in_turns(*jobs)
    assert [len(clock.steps()) for clock in clocks] == [5, 5]
    assert all((clock.steps() > 0).all() for clock in clocks)
    for text, tokens in zip(written, (9, 12), strict=True):
        assert same_bits(text, step_clock.write(model, tokens, 6))


def test_an_error_in_one_text_ends_the_others_too_and_is_raised():
    model = shipped_model()

    def fails():
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        step_clock.in_turns((model, fails), (model, lambda: step_clock.write(model, 9, 4)))
