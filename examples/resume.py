"""Training that goes on where it was interrupted, and what the small checkpoints of this repository are made of."""

import json
import logging
from pathlib import Path

import torch
from report import write_atomically
from transformers.trainer import TRAINER_STATE_NAME


logger = logging.getLogger(__name__)


def last_checkpoint(output_dir: str) -> str | None:
    """Return the newest complete checkpoint: `Trainer` writes its state last, so one without was interrupted."""
    complete = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            logger.warning("left out, as its writing was interrupted: %s", path)
        else:
            complete[int(path.name.removeprefix("checkpoint-"))] = str(path)
    return complete[max(complete)] if complete else None


def train_small_checkpoint(trainer) -> Path:
    """Train from the last checkpoint on; return the folder `final/`: bfloat16 weights, tokenizer, history.json."""
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
    final = Path(trainer.args.output_dir) / "final"
    trainer.model.to(torch.bfloat16).save_pretrained(final)
    trainer.processing_class.save_pretrained(final)
    write_atomically(final / "history.json", json.dumps(trainer.state.log_history))
    return final
