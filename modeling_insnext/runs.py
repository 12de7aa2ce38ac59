"""Training that goes on where it was interrupted, with any `Trainer`; files that appear at once or not at all."""

import gzip
import json
import logging
import math
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME, TrainerState


logger = logging.getLogger(__name__)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end: `Trainer` writes its state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def last_checkpoint(output_dir: str) -> str | None:
    """Return the newest complete checkpoint; one whose writing was interrupted is left out."""
    complete = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        numbered = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if numbered and is_complete(path):
            complete[int(numbered[1])] = str(path)
        elif numbered:
            logger.warning("left out, as its writing was interrupted: %s", path)
    return complete[max(complete)] if complete else None


def checkpoint_to_resume(training) -> str | None:
    """Return the checkpoint to train on from: what is asked for, by default the last one in the folder, if any.

    Raises:
        ValueError: If `resume_from_checkpoint` is neither a complete checkpoint nor False, nor True with one there.
    """
    if not training.do_train:
        return None
    given = training.resume_from_checkpoint
    word = "" if given is None else str(given).lower()
    if word == "false":
        return None
    if word not in ("", "true"):
        if not is_complete(Path(given)):
            raise ValueError(f"resume_from_checkpoint must be True, False or a complete checkpoint, got {given!r}")
        return given
    last = last_checkpoint(training.output_dir)
    if word == "true" and last is None:
        raise ValueError(
            f"resume_from_checkpoint {given} needs a checkpoint in output_dir, got {training.output_dir!r}"
        )
    return last


def load_end(trainer, checkpoint: str | None) -> bool:
    """Load weights and state of a checkpoint, with a warning, if it is the end of the training; return whether it is.

    `Trainer` itself takes a step more where that end is within an epoch. Sharded weights are left to it.
    """
    if checkpoint is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    args, state = trainer.args, TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    ended = state.global_step >= args.max_steps if args.max_steps > 0 else state.epoch >= args.num_train_epochs
    if ended:
        step, ask = state.global_step, "give more steps or another output_dir to train"
        logger.warning("nothing is trained: %s is the end, step %s of %s; %s", checkpoint, step, state.max_steps, ask)
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        trainer.state = state
        trainer._load_from_checkpoint(best or checkpoint)
    return ended


def train_on(trainer) -> None:
    """Train from the checkpoint on that `start` found; save the model, the state and the metrics."""
    checkpoint = trainer.args.resume_from_checkpoint
    if not load_end(trainer, checkpoint):
        if checkpoint is not None:
            logger.info("going on from %s", checkpoint)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", finite(metrics))
    trainer.save_model()
    trainer.save_state()


def plot_losses(history: list[dict], parts: Sequence[str], path: str | Path) -> None:
    """Draw losses by step, a panel each: training as a line, evaluation as points. Needs matplotlib.

    Args:
        history: `trainer.state.log_history`.
        parts: Names of losses; those that were never logged are left out.
        path: File of the picture.
    """
    import matplotlib.pyplot as plt

    curves = {}
    for part in parts:
        train, heldout = ([(row["step"], row[key]) for row in history if key in row] for key in (part, f"eval_{part}"))
        if train or heldout:
            curves[part] = train, heldout
    if not curves:
        return
    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.2), layout="constrained", squeeze=False)
    for axis, (part, (train, heldout)) in zip(axes[0], curves.items(), strict=True):
        if train:
            axis.plot(*zip(*train, strict=True), lw=1, color="tab:blue", label="training")
        if heldout:
            axis.plot(*zip(*heldout, strict=True), "o", color="tab:red", ms=4, label="held out")
        axis.set(xlabel="step", ylabel="nats per inserted token", title=part.replace("_", " "))
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_rows(path: str | Path, count: int | None = None) -> list[dict]:
    """Read a JSON-lines file, gzipped or not, or its first `count` rows; a line ends at a newline and nowhere else."""
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in islice((line for line in lines if line.strip()), count)]


def write_atomically(path: str | Path, text: str) -> None:
    """Write a file, UTF-8; it appears at once or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def finite(value):
    """Return a value in which None stands for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
