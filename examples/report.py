"""What the measuring scripts of this folder share: where a figure was made, and writing it down."""

import json
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
import transformers


def environment(**more) -> dict:
    """Return the processor, the versions and the day that figures belong to, with `more` in front."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "CPU": cpu,
        **more,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def command(script: str, args: list[str] | None = None, data_dir: str | None = None) -> str:
    """Return the command that runs a script of this folder, by default with this process's arguments.

    Args:
        script: Its file.
        args: Its arguments, if it was called.
        data_dir: Folder that the command names DATA: where it lies is each reader's own.
    """
    line = shlex.join(["python", f"examples/{Path(script).name}", *(args or sys.argv[1:])])
    return line if data_dir is None else line.replace(data_dir, "DATA")


def write_atomically(path: str | Path, text: str) -> None:
    """Write a file, UTF-8; it appears at once or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_report(output: str, report: dict, table: str) -> None:
    """Write `output`.json and, with the command and the environment below the table, `output`.md; each in one move."""
    facts = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    text = f"{table}\n\n`{report['command']}`; {facts}\n"
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(report, indent=1)), (".md", text)):
        write_atomically(f"{output}{suffix}", content)
    print(text)
