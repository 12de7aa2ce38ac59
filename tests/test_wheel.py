"""The wheel alone: what is in it, and both models used from another folder, where the tree cannot be reached."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

USE_BOTH = """
import sys
from importlib.metadata import version
from pathlib import Path

site = Path(sys.argv[1])
# an editable install of the tree puts a finder of its own in front, and folders behind
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path[:] = [str(site), *(path for path in sys.path if not Path(path, "modeling_insnext").exists())]

import torch
import insnext_kernels
import modeling_insnext
from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextConfig, InsNextForInsertionLM
from modeling_insnext.data import InsertionCollator
from transformers import AutoModelForCausalLM

assert all(Path(module.__file__).is_relative_to(site) for module in (modeling_insnext, insnext_kernels))
assert (site / "modeling_insnext" / "py.typed").exists()
shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
drt = {"num_lower_layers": 1, "retrieval_groups": [1], "chunk_size": 4, "sliding_window": 8}
ids = torch.arange(3, 23)[None]
for model in (
    InsNextForInsertionLM(InsNextConfig(**shape, num_hidden_layers=1)),
    DrtForCausalLM(DrtConfig(**shape, **drt)),
):
    model.eval().save_pretrained("saved")
    loaded = AutoModelForCausalLM.from_pretrained("saved")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.generate(ids, max_new_tokens=3).shape[0] == 1
print("USED", modeling_insnext.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the committed and uncommitted files, built outside the tree, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in listed.stdout.splitlines():
        if name.startswith(("modeling_insnext/", "kernels/")) or name in ("setup.py", "pyproject.toml", "README.md"):
            if (ROOT / name).is_file():
                (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    done = subprocess.run([*command, str(folder / "tree")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"modeling_insnext", "insnext_kernels"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "modeling_insnext").rglob("*.py")}
    assert sources <= set(names)


@pytest.mark.slow
def test_both_models_work_from_the_wheel_in_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", str(site)]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-I", "-c", USE_BOTH]
    done = subprocess.run([*command, str(site)], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "USED" in done.stdout
    # control: without the wheel the tree is out of reach there
    done = subprocess.run([*command, str(elsewhere)], cwd=elsewhere, capture_output=True, text=True)
    assert "No module named" in done.stderr
