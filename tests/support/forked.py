"""`subprocess.run` of a Python command, forked from a process that has imported what takes the time."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path


SERVER = Path(__file__).with_name("fork_server.py")
# nothing of this repository, and nothing of Hugging Face
CLEAN = ("torch", "torch._dynamo", "torch.distributed.tensor", "PIL.Image", "jinja2", "yaml", "regex")
# what every process that loads a checkpoint imports
READING = (
    *CLEAN,
    "peft",
    "safetensors.torch",
    "transformers.conversion_mapping",
    "transformers.dynamic_module_utils",
    "transformers.generation",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)


@cache
def server(modules: tuple[str, ...], settings: tuple[tuple[str, str], ...]) -> tuple[subprocess.Popen, Path]:
    """Return the process that has imported the modules with these variables set, and its HF_HOME; it ends with us."""
    dropped = ("HF_", "PYTHON", "TRITON_") if modules == CLEAN else ("HF_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    home = Path(tempfile.mkdtemp())
    process = subprocess.Popen(
        [sys.executable, "-I", str(SERVER), *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**kept, **dict(settings), "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    # closes its input, at which it ends, and waits for it
    atexit.register(process.communicate)
    return process, home


def run(command: list[str], cwd: Path, env: dict[str, str], modules: tuple[str, ...] = CLEAN):
    """Run `[python, "-c", code, ...]`, `[python, "-m", module, ...]` or `[python, file, ...]`; return it completed.

    Where Hugging Face is among the modules, it has read its variables already: HF_HOME is another folder than that of
    `env`, empty at the start too, and without an HF_ENDPOINT the process is offline. TRITON_* are ours.
    """
    if modules == CLEAN:
        process, _ = server(modules, ())
    else:
        settings = {name: env[name] for name in sorted(env) if name.startswith("HF_") and name != "HF_HOME"}
        if settings.get("HF_HUB_OFFLINE") == "1" or "HF_ENDPOINT" not in settings:
            settings = {"HF_HUB_OFFLINE": "1"}
        process, home = server(modules, tuple(settings.items()))
        for path in home.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        env = {**env, **settings, "HF_HOME": str(home)}
    with tempfile.TemporaryDirectory() as folder:
        output = {name: str(Path(folder, name)) for name in ("stdout", "stderr")}
        job = {"arguments": [*map(str, command[1:])], "cwd": str(cwd), "env": env, **output}
        print(json.dumps(job), file=process.stdin, flush=True)
        status = int(process.stdout.readline())
        out, err = (Path(path).read_text(errors="replace") for path in output.values())
    return subprocess.CompletedProcess(command, status, out, err)
