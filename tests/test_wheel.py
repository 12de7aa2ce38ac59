"""The wheel alone: what is in it, and both models used from another folder, where the tree cannot be reached."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

ONLY_THE_WHEEL = """
import sys
from pathlib import Path

site = Path(sys.argv[1])
# an editable install of the tree puts a finder of its own in front, and folders behind
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path[:] = [str(site), *(path for path in sys.path if not Path(path, "modeling_insnext").exists())]
"""

USE_BOTH = """
import torch
import insnext_kernels
import modeling_insnext
from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextConfig, InsNextForInsertionLM
from modeling_insnext.data import InsertionCollator
from transformers import AutoModelForCausalLM

assert all(Path(module.__file__).is_relative_to(site) for module in (modeling_insnext, insnext_kernels))
shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
drt = {"num_lower_layers": 1, "retrieval_groups": [1], "chunk_size": 4, "sliding_window": 8}
ids = torch.arange(3, 23)[None]
for model in (
    InsNextForInsertionLM(InsNextConfig(**shape, num_hidden_layers=1)),
    DrtForCausalLM(DrtConfig(**shape, **drt)),
):
    model.eval().save_pretrained("saved")
    loaded = AutoModelForCausalLM.from_pretrained("saved")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.generate(ids, max_new_tokens=3).shape[0] == 1
print("USED", modeling_insnext.__version__)
"""

# as `python SCRIPT ARGUMENTS` does it
RUN_SCRIPT = """
import runpy

sys.argv = sys.argv[2:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
import modeling_insnext

assert Path(modeling_insnext.__file__).is_relative_to(site)
"""
EXAMPLES = {
    "quickstart.py": ["--checkpoint", str(ROOT / "examples" / "checkpoints" / "insnext-mini"), "--steps", "4"],
    "scripts/run_scoring.py": [
        *("--task", "perplexity", "--data_file", "rows.jsonl", "--output_dir", "scores"),
        *("--model_name_or_path", str(ROOT / "examples" / "checkpoints" / "drt-mini")),
    ],
}


def run_isolated(code: str, site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-I", "-c", ONLY_THE_WHEEL + code, str(site), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


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


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder that the wheel is installed in."""
    site = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", str(site)]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return site


@pytest.mark.slow
def test_both_models_work_from_the_wheel_in_another_folder(site, tmp_path):
    done = run_isolated(USE_BOTH, site, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "USED" in done.stdout
    # control: without the wheel the tree is out of reach there
    done = run_isolated(USE_BOTH, tmp_path / "empty", tmp_path)
    assert "No module named" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES)
def test_examples_work_with_the_wheel_from_another_folder(site, tmp_path, script):
    (tmp_path / "rows.jsonl").write_text('{"text": "A dog ran to the park."}\n{"text": "The sea was calm."}\n')
    done = run_isolated(RUN_SCRIPT, site, tmp_path, str(ROOT / "examples" / script), *EXAMPLES[script])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout
