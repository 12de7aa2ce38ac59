"""What the tests of all kernels share: the budget of an error, dtypes, and compilation without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.support.equality import relative_error


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 227 * 1024  # bytes that a block may use on Hopper


def assert_as_accurate(ours: dict, twin: dict, exact: dict, dtype: torch.dtype) -> None:
    """Check name by name that `ours` is at most twice as wrong as the twin in the same dtype, plus one rounding."""
    assert ours.keys() == twin.keys() == exact.keys()
    for name in exact:
        error = relative_error(ours[name], exact[name])
        budget = 2 * relative_error(twin[name], exact[name]) + torch.finfo(dtype).eps
        assert error <= budget, f"{name}: relative error {error:.1e} above budget {budget:.1e}"


def compiled_for_sm90(code: str, timeout: float = 600) -> list[dict]:
    """Run `code` in a process in which every kernel launch compiles for sm_90 and then does nothing.

    Returns:
        One entry for each kernel and specialisation: name, dtypes, constants, warps, stages, shared (bytes),
        registers, stack (bytes of a thread; spilled registers live there).
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    script = Path(__file__).with_name("compile_sm90.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=code, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])
