"""Every Python block of the README runs, in order, as a reader would run them."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))


def python_blocks(text: str) -> list[tuple[int, str]]:
    return [
        (text[: match.start()].count("\n") + 2, match[1]) for match in re.finditer(r"```python\n(.*?)```", text, re.S)
    ]


def run_blocks(text: str, name: str, runs: Path) -> dict:
    """Run the blocks of a page one after the other, as a reader would; returns what they defined."""
    namespace = {}
    for line, block in python_blocks(text.replace('"runs/', f'"{runs}/')):
        exec(compile("\n" * (line - 1) + block, name, "exec"), namespace)
    return namespace


def test_the_first_python_stands_before_line_40():
    assert python_blocks(README)[0][0] < 40
    assert python_blocks("\n" * 50 + "```python\nx\n```")[0][0] > 40


def test_every_block_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    namespace = run_blocks(README, "README.md", tmp_path)
    assert "dog" in namespace["tokenizer"].decode(
        namespace["model"].generate(
            **namespace["model"].canvas(namespace["tokenizer"], keywords=["dog"]), max_new_tokens=3
        )[0]
    )
    with pytest.raises(NameError):
        exec(compile(python_blocks("```python\nundefined_name\n```")[0][1], "control", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_the_pages_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    run_blocks(page.read_text(encoding="utf-8"), page.name, tmp_path)


def test_every_path_named_exists():
    text = README + "".join(page.read_text(encoding="utf-8") for page in PAGES)
    paths = re.findall(r"`((?:examples|modeling_insnext|tests|docs)/[\w./-]+)`|\]\((docs/[\w./-]+)\)", text)
    missing = [path for pair in paths for path in pair if path and not (ROOT / path).exists()]
    assert not missing
