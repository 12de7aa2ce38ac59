"""A checkpoint carries its code as one flat folder, so that the two architectures cannot share a file: what both need
stands in each, and must not drift apart."""

from pathlib import Path

import pytest

import modeling_insnext


PACKAGE = Path(modeling_insnext.__file__).parent


def nameless(name: str, architecture: str) -> str:
    text = (PACKAGE / architecture / f"{name}.py").read_text(encoding="utf-8")
    text = text.replace("modeling-insnext==", "the package==")
    for own in {"insnext": ("InsNeXt", "InsNext", "insnext"), "drt": ("DRT", "Drt", "drt")}[architecture]:
        text = text.replace(own, "NAME")
    return text


@pytest.mark.parametrize("name", ["checkpoint", "peft_targets", "prompt_learning", "rope"])
def test_both_architectures_hold_the_same_file_but_for_their_names(name):
    assert nameless(name, "insnext") == nameless(name, "drt")


def test_the_metric_of_keywords_stands_alone_and_finds_them_as_training_does():
    """A module of `evaluate` travels without this package."""
    metric = PACKAGE.parent / "examples" / "metrics" / "keyword_coverage" / "forms.py"
    assert metric.read_text(encoding="utf-8") == (PACKAGE / "data" / "forms.py").read_text(encoding="utf-8")


def test_control_other_files_differ():
    assert nameless("cache", "insnext") != nameless("cache", "drt")
