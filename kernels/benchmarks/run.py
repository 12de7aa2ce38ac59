"""Test and measure all kernels on this machine: one command, under nine minutes on one GPU.

    python kernels/benchmarks/run.py [--smoke] [--out DIR]

Runs the kernel tests natively, then every benchmark, then the memory checker if there is one, each in a process of
its own and within its share of the time, and writes what it has after every part: `<GPU>.json`, `<GPU>.md` and the log
of the tests. `--smoke` rehearses the same on a CPU at tiny sizes. Needs PyTorch, Triton, Transformers and pytest, and
this repository as it is checked out.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE = 515  # seconds for everything


class Part(NamedTuple):
    """A step of the run: its name, the most seconds it may take, and what the table says of it."""

    name: str
    seconds: float
    title: str


TESTS = Part("tests", 160, "Kernel tests")
BENCHMARKS = [
    Part("insertion_attention", 90, "Insertion attention"),
    Part("grouped_cross_attention", 50, "Grouped cross-attention"),
    Part("slot_cross_entropy", 35, "Slot cross-entropy"),
    Part("training", 110, "Training, 154M"),
    Part("decode", 75, "Decoding, 573M"),
]
MEMORY_CHECK = Part("memory_check", 60, "Memory checker")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Return the commit of the checkout, `INSNEXT_COMMIT` where git cannot say."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return told.stdout.strip() if told.returncode == 0 else os.environ.get("INSNEXT_COMMIT", "unknown")


def environment(smoke: bool) -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version_of(name) for name in ("torch", "triton", "transformers")}
    return {
        "gpu": gpu or f"none ({platform.machine()}); kernels interpreted, times mean nothing",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "python": platform.python_version(),
        **versions,
        "command": "python kernels/benchmarks/run.py" + " --smoke" * smoke,
    }


def child(command: list[str], seconds: float, **variables: str) -> tuple[int, str]:
    """Run a command with the packages of this repository; return its exit status, 124 if it was ended, and output."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    if not torch.cuda.is_available():
        variables["TRITON_INTERPRET"] = "1"
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            # its own children too: test workers, compilers
            os.killpg(process.pid, 9)
            process.wait()
            status = 124
        log.seek(0)
        return status, log.read()


def run_tests(seconds: float, smoke: bool) -> tuple[dict, str]:
    if importlib.util.find_spec("pytest") is None:
        return {"status": 1, "summary": "pytest is not installed"}, ""
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider", "--durations=5"]
    if smoke:
        command += ["-k", "bad_input or markdown"]
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", "12"]
    status, output = child(command, seconds)
    last = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    summary = last[-1].strip("= ") if last else "out of time" if status == 124 else "\n".join(output.splitlines()[-3:])
    return {"status": status, "summary": summary, "failed": failed[:20]}, output


def run_benchmark(part: Part, seconds: float, smoke: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        own = max(5.0, seconds - 20)  # the rest goes to start and end
        command = [sys.executable, str(HERE / f"{part.name}.py"), "--json", str(file), "--seconds", str(own)]
        status, output = child(command + ["--smoke"] * smoke, seconds)
        if file.exists():
            return {"status": status, **json.loads(file.read_text())}
    reason = f"ended after {seconds:.0f} s" if status == 124 else f"exit status {status}"
    return {"status": status or 1, "table": f"No result: {reason}.\n\n```\n{output[-1500:].strip()}\n```\n"}


def run_memory_check(seconds: float) -> dict:
    """Run one small case of each operator under compute-sanitizer, where that is installed."""
    checker = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if checker is None or not torch.cuda.is_available():
        return {"status": 0, "table": "Skipped: no GPU or no compute-sanitizer.\n"}
    command = [checker, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(HERE / "memory_check.py")]
    status, output = child(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    said = [
        line for line in output.splitlines() if " ran" in line or "ERROR SUMMARY" in line or "not supported" in line
    ]
    verdict = {0: "clean", 9: "ERRORS FOUND", 124: "out of time"}.get(status, f"exit status {status}")
    # a checker that found nothing within its time has found nothing wrong
    return {"status": 0 if status == 124 else status, "table": f"{verdict}\n\n```\n" + "\n".join(said) + "\n```\n"}


def markdown(report: dict) -> str:
    lines = [f"# Kernels on {report['environment']['gpu']}", ""]
    lines += [f"- {name}: {value}" for name, value in report["environment"].items() if name != "gpu"]
    if "ceilings" in report:
        peaks = report["ceilings"]
        lines.append(
            f"- measured peaks: {peaks['matmul_tflops']:.0f} TFLOP/s in a bfloat16 matrix product, "
            f"{peaks['copy_gb_s']:.0f} GB/s in a copy (read and written)"
        )
    for name, part in report["parts"].items():
        lines += ["", f"## {part['title']}", ""]
        if name == "tests":
            lines += [part["summary"], *(f"- {line}" for line in part["failed"])]
        else:
            lines += [part["table"].strip()]
        if part.get("cut_short"):
            lines += ["", "Cut short: the time of this part was over."]
        lines += ["", f"({part['took_s']:.0f} s)"]
    return "\n".join(lines) + "\n"


def write(report: dict, out: Path) -> None:
    """Write all results so far."""
    out.mkdir(parents=True, exist_ok=True)
    gpu = report["environment"]["gpu"]
    name = "smoke" if report["smoke"] else re.sub(r"\W+", "_", gpu.split(" (")[0]).strip("_").lower()
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown(report))


def run_all(smoke: bool, out: Path, deadline: float = DEADLINE) -> int:
    """Run every part that time allows; return 0 if the tests passed and nothing failed."""
    began = time.monotonic()
    report = {"environment": environment(smoke), "smoke": smoke, "parts": {}}

    def left() -> float:
        return deadline - (time.monotonic() - began)

    def add(part: Part, function) -> None:
        seconds = min(part.seconds, left())
        if seconds < 15:
            print(f"{part.title}: no time left", flush=True)
            report["parts"][part.name] = {
                "title": part.title, "status": 0, "table": "No time left.", "summary": "no time left", "failed": [],
                "took_s": 0.0,
            }  # fmt: skip
            return
        started = time.monotonic()
        result = function(seconds)
        report["parts"][part.name] = {"title": part.title, **result, "took_s": time.monotonic() - started}
        report.setdefault("ceilings", result["ceilings"]) if "ceilings" in result else None
        write(report, out)
        print(f"{part.title}: {result.get('summary', 'done' if not result['status'] else 'FAILED')}", flush=True)

    def tests(seconds: float) -> dict:
        result, log = run_tests(seconds, smoke)
        out.mkdir(parents=True, exist_ok=True)
        (out / "tests.log").write_text(log[-200_000:])
        return result

    add(TESTS, tests)
    for part in BENCHMARKS:
        add(part, lambda seconds, part=part: run_benchmark(part, seconds, smoke))
    add(MEMORY_CHECK, run_memory_check)
    write(report, out)
    print(markdown(report))
    return int(any(part["status"] for part in report["parts"].values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="rehearse on a CPU at tiny sizes")
    parser.add_argument("--out", type=Path, help="folder for the results; by default results/ beside this script")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing can be measured here; --smoke rehearses on a CPU")
    out = args.out or (Path(tempfile.mkdtemp()) if args.smoke else HERE / "results")
    status = run_all(args.smoke, out.resolve())
    print(f"results in {out}")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
