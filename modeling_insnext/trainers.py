"""Trainers that stop where the loss is no number, and that evaluate per token."""

import math
from collections.abc import Mapping

import torch
from transformers import Trainer


class FiniteTrainer(Trainer):
    """`Trainer` that stops at the first loss that is NaN or infinite, and never saves weights that are.

    `Trainer` itself logs such a loss as the mean of those before (`logging_nan_inf_filter`), goes on, and saves what
    has become of the weights over what was good.

    Args:
        *args: Of `Trainer`.
        learning_rates: Rates of the trained weights whose names hold a key, in the place of `learning_rate`; the
            schedule is the same for all. The first key that a name holds counts.
        **kwargs: Of `Trainer`.

    Raises:
        ValueError: If a rate is not finite and above 0, or no trained weight has a key in its name.
        FloatingPointError: In the step whose loss is no finite number, and where a trained weight that is to be saved
            is none. It names the step, counted from 1; nothing is written.
    """

    def __init__(self, *args, learning_rates: Mapping[str, float] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._rates = dict(learning_rates or {})
        trained = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
        for key, rate in self._rates.items():
            if not 0 < rate < math.inf:
                raise ValueError(f"learning_rates must be finite and above 0, got {rate} for {key!r}")
            if not any(key in name for name in trained):
                raise ValueError(f"learning_rates must name trained weights, got {key!r}")

    def create_optimizer(self, *args, **kwargs):
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self._rates:
            self._split_groups(optimizer)
        return optimizer

    def _split_groups(self, optimizer) -> None:
        """Give the weights with a rate of their own groups of their own, each like the one it comes from."""
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        for group in list(optimizer.param_groups):
            members: dict[float | None, list] = {}
            for weight in group["params"]:
                rate = next((self._rates[key] for key in self._rates if key in names[id(weight)]), None)
                members.setdefault(rate, []).append(weight)
            group["params"] = members.pop(None, [])
            for rate, weights in members.items():
                optimizer.add_param_group({**group, "params": weights, "lr": rate})

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite().all():
            raise FloatingPointError(
                f"the loss must be finite, got {loss.mean().item()} in step {self.state.global_step + 1}; "
                "checkpoints of earlier steps are as they were"
            )
        return loss

    def save_model(self, *args, **kwargs):
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and not weight.isfinite().all():
                raise FloatingPointError(
                    f"weights must be finite to be saved, got {name} after step {self.state.global_step}; "
                    "checkpoints of earlier steps are as they were"
                )
        super().save_model(*args, **kwargs)


class TokenMeanTrainer(FiniteTrainer):
    """`Trainer` whose `eval_loss` is a mean over the target tokens of the data, in nats, whatever the batches.

    `Trainer`'s own is a mean over rows of the means of their batches. The model's loss must be a mean over the labels
    that are not -100, behind the first one of a row, as that of a causal language model is. Where processes do not
    share the data evenly, `Trainer` repeats some rows to fill the last batch, and they count twice.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sums = {}

    def token_sums(self, loss: torch.Tensor, outputs, inputs) -> dict[str, torch.Tensor]:
        """Return the sums over a batch of what `eval_loss` is made of, by name, and the number `tokens`."""
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        return {"loss": loss * tokens, "tokens": tokens}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # the mean over this batch, which `token_sums` weighs
        loss, outputs = super().compute_loss(model, inputs, True)
        add_sums(self._sums, self.token_sums(loss.detach().mean(), outputs, inputs))
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._sums.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self.means(self._sums).items()})
        return output

    def means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return sums per token over all processes, and clear them; nothing where there were no tokens."""
        if not sums:
            return {}
        totals = self.accelerator.reduce(torch.stack(list(sums.values())).to(self.args.device)).tolist()
        named = dict(zip(sums, totals, strict=True))
        sums.clear()
        tokens = named.pop("tokens")
        return {name: total / tokens for name, total in named.items()} if tokens else {}


def add_sums(sums: dict[str, torch.Tensor], more: dict[str, torch.Tensor]) -> None:
    """Add scalars to running sums of the same names, in float64 where the device has it."""
    for name, value in more.items():
        value = value.detach()
        value = value.float() if value.device.type == "mps" else value.double()
        sums[name] = sums[name] + value if name in sums else value


__all__ = ["FiniteTrainer", "TokenMeanTrainer"]
