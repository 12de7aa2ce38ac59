"""What the tests of all kernels share: the error measure and its budget, dtypes, and compilation without a GPU.

The name is not `helpers`: test folders are no packages, so the names of their modules must differ.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 227 * 1024  # bytes that a block may use on Hopper


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return |actual - exact| / |exact|; NaN, or another pattern of -inf, fails at once."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)} in the place of {tuple(exact.shape)}"
    assert not actual.isnan().any(), "nan in the result"
    assert torch.equal(actual.isneginf(), exact.isneginf()), "another pattern of -inf"
    finite = ~exact.isneginf()
    actual, exact = actual.double()[finite], exact.double()[finite]
    return ((actual - exact).norm() / exact.norm().clamp_min(1e-300)).item()


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
