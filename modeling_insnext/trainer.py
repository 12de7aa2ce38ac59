"""A `Trainer` that logs position and token loss apart and has the collator draw other orders every epoch."""

import torch
from transformers import Trainer, TrainerCallback


class _RedrawEveryEpoch(TrainerCallback):
    """Tell the collator the epoch, so that each epoch draws other orders and contexts, also after a resume."""

    def __init__(self, collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))


class InsertionTrainer(Trainer):
    """`Trainer` for :class:`InsNextForInsertionLM` and batches of :class:`InsertionCollator`.

    Everything else is `Trainer`'s. Its logs gain `position_loss` and `token_loss`, in nats per inserted token, means
    over the logging interval; evaluation gains `eval_position_loss` and `eval_token_loss`. A collator with `set_epoch`
    is told the epoch.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sums = {True: torch.zeros(3), False: torch.zeros(3)}
        if hasattr(self.data_collator, "set_epoch"):
            self.add_callback(_RedrawEveryEpoch(self.data_collator))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.get("position_loss") is not None:
            count = (inputs["labels"] != -100).sum()
            parts = torch.stack([outputs["position_loss"] * count, outputs["token_loss"] * count, count.float()])
            self._sums[model.training] = self._sums[model.training].to(parts.device) + parts.detach()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        for training, key, prefix in ((True, "loss", ""), (False, "eval_loss", "eval_")):
            position, token, count = self._sums[training].tolist()
            if key in logs and count:
                logs[prefix + "position_loss"] = round(position / count, 4)
                logs[prefix + "token_loss"] = round(token / count, 4)
                self._sums[training].zero_()
        super().log(logs, *args, **kwargs)


__all__ = ["InsertionTrainer"]
