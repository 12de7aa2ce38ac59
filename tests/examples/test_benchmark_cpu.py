"""The benchmark of a step on a CPU runs as a whole; texts that are written in turns are written as they are alone."""

import json
import sys

import benchmark_cpu
import pytest
import step_clock
from cpu_rows import ROWS

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
    assert all(ratio["low"] <= ratio["ratio"] <= ratio["high"] for ratio in report["ratios"])
    text = (tmp_path / "table.md").read_text()
    assert all(f"Not measured: {name}, {reason}." in text for name, reason in report["left_out"].items())


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
