"""Compile kernels for Hopper without a GPU: `PYTHONPATH=.:kernels python tests/support/compile_sm90.py < code`.

Runs the Python code on standard input with every Triton launch replaced by a compilation for sm_90, specialised to
the launch's own arguments. Nothing is executed, so results are garbage, but what the interpreter accepts and the
compiler refuses comes to light. The last line printed is a JSON list of reports.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type


TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
REPORTS: dict[tuple, dict] = {}


def resources(cubin: bytes) -> dict:
    """Return registers and stack bytes of a thread, as cuobjdump reads them off machine code."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([str(cuobjdump), "-res-usage", file.name], capture_output=True, text=True)
    found = re.findall(r"\b(REG|STACK):(\d+)", told.stdout)
    return {{"REG": "registers", "STACK": "stack"}[name]: int(value) for name, value in found}


def compile_launch(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
    """Take the place of `JITFunction.run`."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    bound = inspect.signature(self.fn).bind(*args, **kwargs)
    bound.apply_defaults()
    signature, constants, attributes = {}, {}, {}

    def type_of(value, path: tuple[int, ...], constant: bool, specialise: bool):
        """Return the type of an argument, of a tuple those of its parts; note constants and alignment."""
        if isinstance(value, tuple) and not constant:
            # Triton specialises the parts of a tuple whatever is said of the tuple
            parts = [type_of(part, (*path, i), False, True) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if constant or value is None or specialise and type(value) is int and value == 1:
            constants[path] = value
            return "constexpr"
        aligned = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if specialise and isinstance(aligned, int) and not isinstance(aligned, bool) and aligned % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return mangle_type(value)

    for i, (param, value) in enumerate(zip(self.params, bound.arguments.values(), strict=True)):
        signature[param.name] = type_of(value, (i,), param.is_constexpr, not param.do_not_specialize)
    key = (
        self.fn.__qualname__,
        str(signature),
        str(constants),
        str(attributes),
        *options.items(),
    )
    if key in REPORTS:
        return
    source = ASTSource(self, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGET, options=options)
    tensors = re.findall(r"\*(\w+)", str(signature))
    REPORTS[key] = {
        "name": self.fn.__name__,
        "dtypes": sorted(set(tensors)),
        "constants": {
            ".".join([self.params[i].name, *map(str, parts)]): str(value) for (i, *parts), value in constants.items()
        },
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "shared": compiled.metadata.shared,
        **resources(compiled.asm["cubin"]),
    }


def main() -> None:
    JITFunction.run = compile_launch
    from insnext_kernels import common

    common.can_launch = lambda tensor: True
    exec(compile(sys.stdin.read(), "<code>", "exec"), {"__name__": "__main__"})
    print(json.dumps(list(REPORTS.values())))


if __name__ == "__main__":
    main()
