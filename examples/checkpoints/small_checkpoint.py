"""How the small checkpoints of this folder are trained and written."""

import json
from pathlib import Path

import torch

from modeling_insnext.runs import last_checkpoint, load_end, write_atomically


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
