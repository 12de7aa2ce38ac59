"""A Python process that cannot import this package: a checkpoint must do with the code it carries."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import forked


OURS = ("modeling_insnext", "insnext_kernels")
HIDE = """
import sys
from importlib.abc import MetaPathFinder


class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ImportError(f"{{name}} is hidden")


sys.meta_path.insert(0, Hidden())
"""


def run_clean(
    code: str, folder: Path, *arguments: str, hidden: tuple[str, ...] = OURS, **environment: str
) -> subprocess.CompletedProcess:
    """Run code in `folder`, with an empty cache of its own, without a network and with the packages `hidden`.

    The process is forked from one that has imported nothing of this repository, and Hugging Face only where nothing of
    it is hidden or may depend on what is.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRITON_"))}
    own = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HIDE.format(hidden=tuple(hidden)) + code, *arguments]
    modules = forked.READING if set(hidden) <= {*OURS} and hidden else forked.CLEAN
    return forked.run(command, folder, {**kept, **own, **environment}, modules)
