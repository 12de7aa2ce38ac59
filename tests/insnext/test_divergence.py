"""A training that diverged stops in its step and leaves what was saved before as it was."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from modeling_insnext import InsNextForInsertionLM
from modeling_insnext.data import InsertionCollator
from modeling_insnext.insertion_trainer import InsertionTrainer
from tests.support.insnext import shipped_model
from tests.support.quiet_training import arguments


TEXTS = [{"input_ids": [1, 5, 6, 7 + i % 3, 9]} for i in range(16)]


class NoNumber(InsNextForInsertionLM):
    """Its loss, or the gradient of its last weights, is NaN in one call of training."""

    where, call, calls = "loss", 3, 0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if self.training:
            self.calls += 1
            if self.calls == self.call:
                factor = torch.tensor(float("nan"))
                out.loss = out.loss * factor if self.where == "loss" else broken(out.loss)
        return out


def broken(loss):
    """Return the loss; its gradient is NaN."""
    loss = loss.clone()
    loss.register_hook(lambda gradient: gradient * float("nan"))
    return loss


def saved(folder) -> dict[str, dict]:
    return {path.parent.name: load_file(path) for path in Path(folder).rglob("model.safetensors")}


def train(folder, trainer_class, where):
    torch.manual_seed(0)
    model = NoNumber(shipped_model(InsNextForInsertionLM).config)
    model.where = where
    collate = InsertionCollator(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    args = arguments(folder, remove_unused_columns=False, **options)
    trainer = trainer_class(model, args, train_dataset=TEXTS, data_collator=collate)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("where", "message"),
    [("loss", "the loss must be finite, got nan in step 3"), ("gradient", "weights must be finite .* after step 3")],
)
def test_nothing_is_saved_over_what_was_good(tmp_path, where, message):
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path / "own", InsertionTrainer, where)
    assert list(saved(tmp_path / "own")) == ["checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path / "own")["checkpoint-2"].values())
    # control: a plain `Trainer` goes on and keeps the last weights only, which are no numbers
    trainer = train(tmp_path / "plain", Trainer, where)
    assert trainer.state.global_step == 5
    (kept,) = saved(tmp_path / "plain").values()
    assert not all(tensor.isfinite().all() for tensor in kept.values())
