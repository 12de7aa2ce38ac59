r"""Write an adapter as a small checkpoint of this folder: bfloat16 weights, options of writing, history and curve.

    python examples/checkpoints/ship_adapter.py runs/first/checkpoint-30 runs/second/checkpoint-165 \
        --output_dir examples/checkpoints/insnext-smol --base_model HuggingFaceTB/SmolLM2-135M-Instruct

The folders are checkpoints of runs that went on from one another, the last one's weights are taken; steps are counted
on from run to run. A card that is there stays.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME

from modeling_insnext import InsertionGenerationConfig
from modeling_insnext.runs import plot_losses, write_atomically


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def joined_history(checkpoints: list[Path]) -> list[dict]:
    """Return what the runs logged, each step counted from the first run's beginning."""
    history, done = [], 0
    for checkpoint in checkpoints:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        history += [{**row, "step": row["step"] + done} for row in state["log_history"]]
        done += state["global_step"]
    return history


def ship(checkpoints: list[Path], folder: Path, base_model: str, generation: dict) -> None:
    """Write the last checkpoint's adapter into a folder.

    Raises:
        ValueError: If a checkpoint lacks a file, before anything is written.
    """
    wanted = {checkpoint / TRAINER_STATE_NAME for checkpoint in checkpoints}
    wanted |= {checkpoints[-1] / name for name in (WEIGHTS, CONFIG)}
    if missing := sorted(str(path) for path in wanted if not path.is_file()):
        raise ValueError(f"a checkpoint of an adapter must have its files, missing: {', '.join(missing)}")
    options = InsertionGenerationConfig(**generation)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(checkpoints[-1] / WEIGHTS)
    save_file({name: x.to(torch.bfloat16) for name, x in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    fields = json.loads((checkpoints[-1] / CONFIG).read_text(encoding="utf-8"))
    # the folder it was trained on is on that machine only
    fields |= {"base_model_name_or_path": base_model, "inference_mode": True}
    write_atomically(folder / CONFIG, json.dumps(fields, indent=2, sort_keys=True) + "\n")
    options.save_pretrained(folder)
    history = joined_history(checkpoints)
    write_atomically(folder / "history.json", json.dumps(history))
    plot_losses(history, ["position_loss", "token_loss"], folder / "loss.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", type=Path, help="folders of Trainer, in order")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the small checkpoint")
    parser.add_argument("--base_model", required=True, help="name of the source on the Hub")
    parser.add_argument("--generation", default="{}", help="options of writing that differ from the defaults, JSON")
    args = parser.parse_args(argv)
    try:
        ship(args.checkpoints, args.output_dir, args.base_model, json.loads(args.generation))
    except (TypeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
