"""Forks Python processes from one that has imported what takes the time: run by `tests/support/forked.py`.

Each line read is a job in JSON, each line written the exit status of one. It must not import anything of this
repository by itself; its arguments name what it imports.
"""

import importlib
import json
import os
import runpy
import sys
import traceback
from contextlib import suppress


def enter(job: dict) -> None:
    """Become the process that was asked for: its folder, its environment, its output."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for descriptor, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, descriptor)
    # as Python does at its start, after the interpreter's own folders
    sys.path[:0] = filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))


def execute(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does: `-c CODE ...`, `-m MODULE ...` or `FILE ...`, each also after `-I`."""
    isolated = arguments[0] == "-I"
    kind, *rest = arguments[isolated:]
    if kind == "-c":
        sys.argv, folder = ["-c", *rest[1:]], os.getcwd()
    elif kind == "-m":
        sys.argv, folder = rest, os.getcwd()
    else:
        sys.argv, folder = [kind, *rest], os.path.dirname(os.path.abspath(kind))
    if not isolated:
        sys.path.insert(0, folder)
    if kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(kind, run_name="__main__")


def child(job: dict) -> int:
    enter(job)
    status = 0
    try:
        execute(job["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for name in sys.argv[1:]:
        # what is not installed cannot be imported beforehand
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os._exit(child(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    main()
