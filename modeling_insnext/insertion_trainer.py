"""A `Trainer` that logs position and token loss apart and has the collator draw other orders every epoch."""

import copy

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
    over the logging interval; evaluation gains `eval_position_loss` and `eval_token_loss`, means over the tokens of
    the evaluation set (`eval_loss` is `Trainer`'s: a mean over batches).

    A collator with `set_epoch` is told the epoch; evaluation and prediction draw what that collator drew for epoch 0,
    so that their losses can be compared from epoch to epoch. Such a collator reads columns that are no argument of the
    model (`given`, `complete`, `keywords`) and passes over the rest, so `remove_unused_columns` is switched off.

    Args:
        *args: Of `Trainer`.
        eval_data_collator: Collator of evaluation and prediction in the place of `data_collator`; that of the training
            texts may know their rarities, which an evaluation should not depend on.
        **kwargs: Of `Trainer`.

    Raises:
        ValueError: If `label_smoothing_factor` is set: the loss has no dense target to smooth.
    """

    def __init__(self, *args, eval_data_collator=None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {self.args.label_smoothing_factor}: there is no dense target"
            )
        self._sums = {True: torch.zeros(3), False: torch.zeros(3)}
        self._fixed_collator = self.data_collator if eval_data_collator is None else eval_data_collator
        if hasattr(self._fixed_collator, "set_epoch"):
            self._fixed_collator = copy.deepcopy(self._fixed_collator)
            self._fixed_collator.set_epoch(0)
        if hasattr(self.data_collator, "set_epoch"):
            self.add_callback(_RedrawEveryEpoch(self.data_collator))
            self.args.remove_unused_columns = False

    def get_eval_dataloader(self, *args, **kwargs):
        return self._with_fixed_draws(super().get_eval_dataloader, *args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        return self._with_fixed_draws(super().get_test_dataloader, *args, **kwargs)

    def _with_fixed_draws(self, make_dataloader, *args, **kwargs):
        training_collator = self.data_collator
        self.data_collator = self._fixed_collator
        try:
            return make_dataloader(*args, **kwargs)
        finally:
            self.data_collator = training_collator

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.get("position_loss") is not None:
            count = (inputs["labels"] != -100).sum()
            parts = torch.stack([outputs["position_loss"] * count, outputs["token_loss"] * count, count.float()])
            self._sums[model.training] = self._sums[model.training].to(parts.device) + parts.detach()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs.update(self._taken_means(training=True))
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._sums[False].zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._taken_means(training=False, prefix=metric_key_prefix + "_"))
        return output

    def _taken_means(self, training, prefix=""):
        """Return the means of what was summed since the last call, over all processes."""
        position, token, count = self.accelerator.reduce(self._sums[training].to(self.args.device)).tolist()
        self._sums[training].zero_()
        return {prefix + "position_loss": position / count, prefix + "token_loss": token / count} if count else {}


__all__ = ["InsertionTrainer"]
