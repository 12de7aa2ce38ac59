"""Folders saved when every file of code ended in its architecture's name: their code travels with them, and loads."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.clean_process import run_clean
from tests.support.saved import MAKERS, save_model


KEPT = ("configuration", "modeling", "generation")
WRITE = """
import json
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("old", trust_remote_code=True)
files = sorted(name.rpartition(".")[2] for name in sys.modules if name.startswith("transformers_modules"))
ids = model.generate(torch.tensor([[1, 5, 6, 7]]), max_new_tokens=5, do_sample=False).tolist()
print(json.dumps({"ids": ids, "files": files}))
"""


def with_old_names(folder: Path, architecture: str) -> Path:
    """Give the files of code in a saved folder the names that they had, imports too."""
    names = [path.stem for path in folder.glob("*.py") if path.stem.rpartition("_")[0] not in KEPT]
    for path in list(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for name in names:
            text = re.sub(rf"(from \.{name})(?= import)", rf"\1_{architecture}", text)
        stem = f"{path.stem}_{architecture}" if path.stem in names else path.stem
        path.unlink()
        (folder / f"{stem}.py").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("architecture", MAKERS)
def test_a_folder_of_the_old_names_loads_with_its_own_code_and_writes_the_same(architecture, tmp_path):
    old = with_old_names(save_model(architecture, tmp_path / "old"), architecture)
    assert (old / f"cache_{architecture}.py").exists() and not (old / "cache.py").exists()
    done = run_clean(WRITE, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert f"cache_{architecture}" in found["files"]
    # with the package at hand its classes read the same weights
    model = AutoModelForCausalLM.from_pretrained(old)
    assert type(model).__module__.startswith("modeling_insnext.")
    ids = model.generate(torch.tensor([[1, 5, 6, 7]]), max_new_tokens=5, do_sample=False)
    assert ids.tolist() == found["ids"]
    # control: without one of its files it does not load
    (old / f"layers_{architecture}.py").unlink()
    assert run_clean(WRITE, tmp_path).returncode != 0
