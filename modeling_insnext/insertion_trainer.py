"""A `Trainer` that logs position and token loss apart and has the collator draw other orders every epoch."""

import copy

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from .data import Passes
from .trainers import TokenMeanTrainer, add_sums


class _RedrawEveryEpoch(TrainerCallback):
    """Tell the collator the epoch, so that each epoch draws other orders and contexts, also after a resume."""

    def __init__(self, collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))


class InsertionTrainer(TokenMeanTrainer):
    """`Trainer` for :class:`InsNextForInsertionLM` and batches of :class:`InsertionCollator`.

    Its logs gain `position_loss` and `token_loss`, in nats per inserted token, means over the logging interval;
    evaluation gains `eval_position_loss` and `eval_token_loss`, means over the tokens of the evaluation set, and
    `eval_loss` is their sum: whatever the batches, and each step weighing 1. The training loss weighs steps as the
    collator says. Training stops where the loss is no number, see :class:`FiniteTrainer`.

    A collator with `set_epoch` is told the epoch; evaluation and prediction draw what that collator drew for epoch 0,
    so that their losses can be compared from epoch to epoch. Such a collator reads columns that are no argument of the
    model (`given`, `complete`, `keywords`) and passes over the rest, so `remove_unused_columns` is switched off.

    Training data without a length is read as one stream without end, see :class:`Passes`: it has no epochs, but other
    orders are drawn in each of its passes.

    Args:
        *args: Of `Trainer`.
        eval_data_collator: Collator of evaluation and prediction in the place of `data_collator`; that of the training
            texts may know their rarities, which an evaluation should not depend on.
        **kwargs: Of `Trainer`.

    Raises:
        ValueError: If `label_smoothing_factor` is set: the loss has no dense target to smooth. If something is to be
            done every epoch and the training data has no length.
    """

    def __init__(self, *args, eval_data_collator=None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {self.args.label_smoothing_factor}: there is no dense target"
            )
        self._training_sums = {}
        self._fixed_collator = self.data_collator if eval_data_collator is None else eval_data_collator
        if hasattr(self._fixed_collator, "set_epoch"):
            self._fixed_collator = copy.deepcopy(self._fixed_collator)
            self._fixed_collator.set_epoch(0)
        if hasattr(self.data_collator, "set_epoch"):
            self.add_callback(_RedrawEveryEpoch(self.data_collator))
            self.args.remove_unused_columns = False
            if self.train_dataset is not None and not has_length(self.train_dataset):
                self._refuse_epochs()
                if not isinstance(self.train_dataset, Passes):
                    self.train_dataset = Passes(self.train_dataset)

    def _refuse_epochs(self) -> None:
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self.args, name) == "epoch":
                raise ValueError(f"{name} must be no or steps where the data has no length, got epoch")

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

    def token_sums(self, loss, outputs, inputs):
        if outputs.get("position_loss") is None:
            return super().token_sums(loss, outputs, inputs)
        tokens = (inputs["labels"] != -100).sum()
        # a batch that writes nothing, and only stops, has its sum as its mean
        parts = {name: outputs[name].mean() * tokens.clamp_min(1) for name in ("position_loss", "token_loss")}
        # whatever its steps weigh in training
        return {"loss": sum(parts.values()), **parts, "tokens": tokens}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and outputs.get("position_loss") is not None:
            sums = self.token_sums(loss, outputs, inputs)
            add_sums(self._training_sums, {name: sums[name] for name in sums if name != "loss"})
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs.update(self.means(self._training_sums))
        super().log(logs, *args, **kwargs)


__all__ = ["InsertionTrainer"]
