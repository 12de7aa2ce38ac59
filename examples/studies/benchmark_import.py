"""What importing the package costs beside Transformers, each import in processes of its own, in turns.

    python examples/studies/benchmark_import.py --output examples/studies/results/benchmark_import

`import transformers` defers nearly everything; the second row is what any model of Transformers loads, a Llama.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from statistics import median

from report import RESULTS, environment, write_report
from tqdm import tqdm
from transformers import HfArgumentParser


MODEL = "from transformers import LlamaForCausalLM"
# what is imported before, and what is timed
IMPORTS = {
    "transformers": ("pass", "import transformers"),
    "a model of Transformers": ("pass", MODEL),
    "modeling_insnext, after it": (MODEL, "import modeling_insnext"),
}
TIMED = "import time; {}; started = time.perf_counter(); {}; print(time.perf_counter() - started)"


@dataclass
class ImportArguments:
    output: str = field(default=f"{RESULTS}/benchmark_import", metadata={"help": "Writes .json and .md."})
    repeats: int = field(default=15, metadata={"help": "Processes of each kind, after one that warms the disk."})


def seconds(before: str, timed: str) -> float:
    command = [sys.executable, "-c", TIMED.format(before, timed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main():
    (args,) = HfArgumentParser(ImportArguments).parse_args_into_dataclasses()
    times = {name: [] for name in IMPORTS}
    for turn in tqdm(range(args.repeats + 1), desc="turns", disable=None):
        for name, statements in IMPORTS.items():
            spent = seconds(*statements)
            if turn:
                times[name].append(spent)
    lines = ["| imported | median, s | least | most |", "|---|---|---|---|"]
    lines += [f"| {name} | {median(row):.2f} | {min(row):.2f} | {max(row):.2f} |" for name, row in times.items()]
    report = {
        "command": f"python examples/studies/benchmark_import.py --repeats {args.repeats}",
        "environment": environment(repeats=args.repeats),
        "seconds": times,
    }
    write_report(args.output, report, "\n".join(lines))


if __name__ == "__main__":
    main()
