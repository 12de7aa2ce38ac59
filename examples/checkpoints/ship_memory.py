r"""Write what train_memory.py learned without its source: bfloat16 weights, history and curve.

    python examples/checkpoints/ship_memory.py runs/memory --source runs/source \
        --options '{"memory": "copy", "retrieval_groups": [13], "cross_attention_layers": 4}' \
        --output_dir runs/shipped

`--source` is the converted folder it was trained on, `--options` how conversion.from_llama made it;
conversion.smol_memory puts both together. A card that is there stays.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file, save_file

from modeling_insnext.runs import write_atomically


# conversion is a tool of the clone and not installed
sys.path.append(str(Path(__file__).parents[2]))
from conversion.smol_memory import FIELDS, WEIGHTS, source_digest  # isort: skip


def plot(history: list[dict], path: Path) -> None:
    """Draw the losses of training and the share of right chunks found, by step."""
    rows = [row for row in history if "hint" in row]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for key, label in (("needle", "answers, nats a token"), ("hint", "right chunk, nats")):
        axes[0].plot([row["step"] for row in rows], [row[key] for row in rows], label=label)
    axes[0].legend()
    axes[1].plot([row["step"] for row in rows], [100 * row["recall"] for row in rows])
    axes[0].set(xlabel="step", title="loss of training")
    axes[1].set(xlabel="step", ylabel="%", ylim=(0, 103), title="right chunks among those retrieved")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ship(run: Path, source: Path, options: dict, folder: Path) -> None:
    """Write a run's memory into a folder.

    Raises:
        ValueError: If the run lacks a file, before anything is written.
    """
    if missing := [name for name in (WEIGHTS, "history.json") if not (run / name).is_file()]:
        raise ValueError(f"a run must have its files, missing in {run}: {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.to(torch.bfloat16) for name, x in load_file(run / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    fields = {"options": options, "source_sha256": source_digest(source)}
    write_atomically(folder / FIELDS, json.dumps(fields, indent=2, sort_keys=True) + "\n")
    history = json.loads((run / "history.json").read_text(encoding="utf-8"))
    write_atomically(folder / "history.json", json.dumps(history))
    plot(history, folder / "loss.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of train_memory.py")
    parser.add_argument("--source", required=True, type=Path, help="converted folder that it was trained on")
    parser.add_argument("--options", required=True, help="of the conversion, JSON")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the small checkpoint")
    args = parser.parse_args(argv)
    try:
        ship(args.run, args.source, json.loads(args.options), args.output_dir)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
