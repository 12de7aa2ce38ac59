"""What the studies share: running a script, where a figure was made, and writing it down."""

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import HfArgumentParser

from modeling_insnext.runs import write_atomically


SCRIPTS = Path(__file__).parents[1] / "scripts"
# of the studies, from the root of the repository
RESULTS = "examples/studies/results"


class Study(NamedTuple):
    """What a study found: its results, the table of them, and what figures belong to beside the machine."""

    results: Any
    table: str
    facts: dict[str, Any]


def run_study(script: str, arguments_class: type, study: Callable[..., Study], argv: list[str] | None = None) -> dict:
    """Run a study with the arguments of a command line, and write its report and its table; return the report.

    Args:
        script: The study's file.
        arguments_class: A dataclass with `data_dir` and `output`; `threads` are set where it has them.
        study: From arguments to what is found.
        argv: The command line, by default this process's.
    """
    (args,) = HfArgumentParser(arguments_class).parse_args_into_dataclasses(argv)
    threads = {name: value for name, value in vars(args).items() if name == "threads"}
    if threads:
        torch.set_num_threads(args.threads)
    results, table, facts = study(args)
    report = {
        "command": command(script, argv, args.data_dir),
        "results": results,
        "environment": environment(**facts, **threads),
    }
    write_report(args.output, report, table)
    return report


def run_script(name: str, args: list[str]) -> None:
    """Run a script of the room next door, as a user does, in a process of its own; its output comes through.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    subprocess.run([sys.executable, str(SCRIPTS / name), *args], check=True)


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
    """Return the command that runs a study, by default with this process's arguments.

    Args:
        script: The study's file.
        args: Its arguments, if it was called.
        data_dir: Folder that the command names DATA: where it lies is each reader's own.
    """
    line = shlex.join(["python", f"examples/studies/{Path(script).name}", *(args or sys.argv[1:])])
    return line if data_dir is None else line.replace(data_dir, "DATA")


def write_report(output: str, report: dict, table: str) -> None:
    """Write `output`.json and, with the command and the environment below the table, `output`.md; each in one move."""
    facts = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    text = f"{table}\n\n`{report['command']}`; {facts}\n"
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(report, indent=1)), (".md", text)):
        write_atomically(f"{output}{suffix}", content)
    print(text)
