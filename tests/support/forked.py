"""`subprocess.run` of a Python command, forked from a process that has imported PyTorch, which takes the time."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path


SERVER = Path(__file__).with_name("fork_server.py")
# nothing of this repository, nothing that reads the environment when it is imported (as huggingface_hub does)
CLEAN = ("torch", "torch._dynamo", "torch.distributed.tensor", "PIL.Image", "jinja2", "yaml", "regex")


@cache
def server(modules: tuple[str, ...]) -> subprocess.Popen:
    """Return the process that has imported the modules; it ends with this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRITON_"))}
    process = subprocess.Popen(
        [sys.executable, "-I", str(SERVER), *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**kept, "OMP_NUM_THREADS": "1"},
    )
    # closes its input, at which it ends, and waits for it
    atexit.register(process.communicate)
    return process


def run(command: list[str], cwd: Path, env: dict[str, str], modules: tuple[str, ...] = CLEAN):
    """Run `[python, "-c", code, ...]`, `[python, "-m", module, ...]` or `[python, file, ...]`; return it completed."""
    process = server(modules)
    with tempfile.TemporaryDirectory() as folder:
        output = {name: str(Path(folder, name)) for name in ("stdout", "stderr")}
        job = {"arguments": [*map(str, command[1:])], "cwd": str(cwd), "env": env, **output}
        print(json.dumps(job), file=process.stdin, flush=True)
        status = int(process.stdout.readline())
        out, err = (Path(path).read_text(errors="replace") for path in output.values())
    return subprocess.CompletedProcess(command, status, out, err)
