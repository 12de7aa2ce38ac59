"""The tree as a package: what is installed, what is committed, and what the remote code may import."""

import ast
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import modeling_insnext
from tests.support.dead_names import dead_names


ROOT = Path(__file__).parents[1]
REMOTE_CODE = [ROOT / "modeling_insnext" / name for name in ("insnext", "drt")]
MAX_LINES = 600
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|opt|root|home|Users|mnt)/\w|\bshared/(?:data|reference|design)")
DATA_SUFFIXES = (".jsonl", ".gz", ".npz", ".parquet", ".arrow", ".bin", ".pt", ".pkl")
FOLLOWED_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)  # as transformers reads remote code


def project_files() -> list[Path]:
    """Files that are committed, or would be by `git add .`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [path for path in map(ROOT.joinpath, listed.stdout.splitlines()) if path.is_file()]


def source_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def declared_packages() -> set[str]:
    code = "import setuptools; setuptools.setup = lambda **options: print(*options['packages']); import setup"
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def packages_on_disk(root: Path) -> set[str]:
    folders = [*root.glob("modeling_insnext/**/__init__.py"), *root.glob("kernels/insnext_kernels/**/__init__.py")]
    names = (path.parent.relative_to(root).as_posix().removeprefix("kernels/") for path in folders)
    return {name.replace("/", ".") for name in names}


def test_every_folder_of_code_is_installed():
    assert declared_packages() == packages_on_disk(ROOT)


def test_a_folder_that_setup_forgets_is_noticed(tmp_path):
    (tmp_path / "kernels" / "insnext_kernels" / "new").mkdir(parents=True)
    (tmp_path / "kernels" / "insnext_kernels" / "new" / "__init__.py").touch()
    assert packages_on_disk(tmp_path) == {"insnext_kernels.new"}
    assert packages_on_disk(tmp_path) - declared_packages()


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert "kernels" not in declared_packages()


FIND_KERNELS = "import sys; sys.path[:0] = sys.argv[1:]; import kernels; print(kernels.__file__)"


@pytest.mark.parametrize("ours", [ROOT, ROOT / "tests"], ids=["root", "tests"])
def test_our_folders_of_that_name_do_not_hide_the_package_that_transformers_imports(ours, tmp_path):
    (tmp_path / "theirs" / "kernels").mkdir(parents=True)
    (tmp_path / "theirs" / "kernels" / "__init__.py").touch()

    def found(*folders):
        command = [sys.executable, "-c", FIND_KERNELS, *map(str, folders)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout.strip()

    assert found(ours, tmp_path / "theirs").startswith(str(tmp_path / "theirs"))
    # control: a package of that name in front does
    (tmp_path / "front" / "kernels").mkdir(parents=True)
    (tmp_path / "front" / "kernels" / "__init__.py").touch()
    assert found(tmp_path / "front", tmp_path / "theirs").startswith(str(tmp_path / "front"))


def test_the_version_stands_in_one_place():
    assert modeling_insnext.__version__ == version("modeling-insnext")
    assigned = re.compile(r"""^\s*(?:__)?version(?:__)?\s*=\s*["']\d""", re.MULTILINE)
    assert assigned.search('[project]\nversion = "1.2"')
    files = [path for path in project_files() if path.suffix in (".py", ".toml", ".cfg")]
    assert [path for path in files if assigned.search(source_text(path))] == [ROOT / "modeling_insnext/__init__.py"]


def test_no_machine_path_is_committed():
    assert MACHINE_PATH.search("data = '/ho" + "me/me/corpus'")
    assert not MACHINE_PATH.search("https://example.org/home/page and examples/checkpoints")
    text_suffixes = (".py", ".md", ".toml", ".txt", ".json", ".cfg", ".yml", "")
    for path in project_files():
        if path.suffix in text_suffixes:
            found = MACHINE_PATH.search(source_text(path))
            assert not found, f"{path.relative_to(ROOT)} names a path of one machine: {found[0]}"


def test_no_corpus_is_committed():
    assert "corpus.jsonl.gz".endswith(DATA_SUFFIXES)
    assert [path for path in project_files() if path.name.endswith(DATA_SUFFIXES)] == []


def test_no_file_of_code_is_too_long():
    lengths = {path: source_text(path).count("\n") for path in project_files() if path.suffix == ".py"}
    assert Path(__file__) in lengths
    assert {str(path): lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def comes_with_transformers() -> set[str]:
    """Names of the packages that Transformers itself requires: remote code meets them wherever it is loaded."""
    plain = [line for line in requires("transformers") if "extra ==" not in line]
    return {re.match(r"[\w.-]+", line)[0].replace("-", "_") for line in plain}


def remote_code_faults(text: str, modules: set[str]) -> list[str]:
    """Say what keeps a file from working as remote code, whose imports transformers finds by regular expression."""
    tree = ast.parse(text)
    tried = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    allowed = {*sys.stdlib_module_names, "torch", "transformers", *comes_with_transformers()}
    faults, relative = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            relative.append(node.module or "")
            if node.level > 1 or node.module not in modules:
                faults.append(f"line {node.lineno}: not one dot and a module of the same folder")
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        outside = [name for name in names if name.split(".")[0] not in allowed]
        if outside and id(node) not in tried:
            faults.append(f"line {node.lineno}: {outside[0]} is imported outside a `try`")
        if any(name.split(".")[0] == "modeling_insnext" for name in names):
            faults.append(f"line {node.lineno}: the installed package is imported")
    if sorted(FOLLOWED_IMPORT.findall(text)) != sorted(relative):
        faults.append("transformers would follow other imports than Python does")
    return faults


@pytest.mark.parametrize(
    "path",
    [path for folder in REMOTE_CODE for path in sorted(folder.glob("*.py"))],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_a_file_of_a_model_works_as_remote_code(path):
    modules = {file.stem for file in path.parent.glob("*.py")}
    assert remote_code_faults(source_text(path), modules) == []


@pytest.mark.parametrize(
    "text",
    [
        "from . import slots",
        "from ..data import orders",
        "from .slots.table import rows",
        "from .absent import rows",
        "import datasets",
        "def f():\n    import datasets",
        "try:\n    import modeling_insnext\nexcept ImportError:\n    pass",
        'def f():\n    """\n    from .slots import rows\n    """',
        "x = 1; from .slots import rows",
    ],
)
def test_faulty_remote_code_is_noticed(text):
    assert remote_code_faults(text, {"slots"})


def test_a_name_that_nobody_uses_is_found_and_one_that_a_reader_uses_is_not(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "code.py").write_text("LIMIT = 3\n\n\ndef used():\n    pass\n\n\ndef dead():\n    used()\n")
    (tmp_path / "reader.py").write_text("from ours.code import LIMIT\n\nprint(LIMIT)\n")
    found = dead_names([tmp_path / "ours"], [tmp_path / "reader.py"])
    assert [line.split(": ")[1].split(" (")[0] for line in found] == ["unused function 'dead'"]
    assert len(dead_names([tmp_path / "ours"], [])) == 2


HIDE_OPTIONAL_PACKAGES = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in {"accelerate", "datasets", "evaluate", "insnext_kernels", "peft", "triton"}
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def run_without_optional_packages(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", HIDE_OPTIONAL_PACKAGES + code], capture_output=True, text=True)


def test_the_package_imports_without_its_optional_packages():
    done = run_without_optional_packages("import modeling_insnext, modeling_insnext.data")
    assert done.returncode == 0, done.stderr
    assert "No module named 'accelerate'" in run_without_optional_packages("import accelerate").stderr
