"""Training that goes on where it was interrupted, and what the small checkpoints of this repository are made of."""

import json
import logging
import re
from pathlib import Path

import torch
from report import write_atomically
from transformers.trainer import TRAINER_STATE_NAME, TrainerState


STAMP = "script_arguments.json"
# neither training data nor weights depend on these
FREE = (
    "cache_dir",
    "preprocessing_num_workers",
    "overwrite_cache",
    "validation_file",
    "test_file",
    "max_eval_samples",
    "trust_remote_code",
    "attn_implementation",
)

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


def note_arguments(training, *arguments) -> None:
    """Write down what data and weights depend on; warn if the checkpoint to go on from was made with other values."""
    now = {name: value for one in arguments for name, value in vars(one).items() if name not in FREE}
    now |= {"seed": training.seed, "data_seed": training.data_seed}
    path = Path(training.output_dir) / STAMP
    if training.resume_from_checkpoint is not None and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
        if changed:
            checkpoint = training.resume_from_checkpoint
            logger.warning("%s was trained with other arguments: %s", checkpoint, "; ".join(changed))
    if training.do_train and training.should_save:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(now))


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
        trainer.save_metrics("train", metrics)
    trainer.save_model()
    trainer.save_state()


def train_small_checkpoint(trainer) -> Path:
    """Train from the last checkpoint on; return the folder `final/`: bfloat16 weights, tokenizer, history.json."""
    checkpoint = last_checkpoint(trainer.args.output_dir)
    if not load_end(trainer, checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
    final = Path(trainer.args.output_dir) / "final"
    trainer.model.to(torch.bfloat16).save_pretrained(final)
    trainer.processing_class.save_pretrained(final)
    write_atomically(final / "history.json", json.dumps(trainer.state.log_history))
    return final
