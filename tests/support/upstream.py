"""The test suites of other packages, taken from their source archives: nothing of them lies in this repository."""

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType


# where archives are unpacked; a folder that holds `NAME-VERSION/` already needs no registry
FOLDER = Path(os.environ.get("INSNEXT_SDISTS") or Path(__file__).parents[2] / "build" / "sdists")


def unpacked(package: str) -> Path:
    """Return the folder of the source archive of the installed `package`, fetched with pip where it is not there."""
    name = f"{package}-{importlib.metadata.version(package)}"
    folder = FOLDER / name
    if not folder.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest"]
        subprocess.run([*pip, str(FOLDER), name.replace("-", "==")], check=True)
        with tarfile.open(FOLDER / f"{name}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
    return folder


def suite(package: str, module: str, absent: dict[str, str]) -> ModuleType:
    """Import `tests/<module>.py` of the archive of `package`.

    Args:
        package: A distribution, and the name of its folder in the archive.
        module: Name of the module in the archive's `tests/`.
        absent: What the module imports and neither the archive nor the environment has: the name of a class by the
            module that it is imported from. An empty class stands for it.
    """
    root = f"{package}_tests"
    if root not in sys.modules:
        sys.modules[root] = _empty_module(root, [str(unpacked(package) / "tests")])
        for name, class_name in absent.items():
            full_name = f"{root}{name}" if name.startswith(".") else name
            parent = full_name.rpartition(".")[0]
            if parent:
                sys.modules.setdefault(parent, _empty_module(parent, []))
            sys.modules[full_name] = _empty_module(full_name, None)
            setattr(sys.modules[full_name], class_name, type(class_name, (), {}))
    return importlib.import_module(f"{root}.{module}")


def _empty_module(name: str, path: list[str] | None) -> ModuleType:
    spec = importlib.util.spec_from_loader(name, loader=None, is_package=path is not None)
    module = importlib.util.module_from_spec(spec)
    if path is not None:
        module.__path__ = path
    return module
