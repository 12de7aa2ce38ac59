"""A Python process that cannot import this package: a checkpoint must do with the code it carries."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import forked


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
    code: str, folder: Path, *arguments: str, hidden=("modeling_insnext", "insnext_kernels"), **environment: str
) -> subprocess.CompletedProcess:
    """Run code in `folder`, with an empty cache of its own, without a network and with the packages `hidden`.

    The process is forked from one that has imported PyTorch and nothing of Hugging Face or of this repository, unless
    Triton is told something: it listens only while it is imported, which PyTorch does.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    own = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HIDE.format(hidden=tuple(hidden)) + code, *arguments]
    variables = {**kept, **own, **environment}
    if any(name.startswith("TRITON_") for name in environment):
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    return forked.run(command, folder, variables)
