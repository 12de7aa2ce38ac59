"""Adapting a pretrained model without forgetting: hidden states stay beside those of the frozen source."""

from collections.abc import Mapping

import torch
from torch.nn.functional import cosine_similarity

from .insertion_trainer import InsertionTrainer
from .trainers import add_sums


FIELDS = ("input_ids", "positions", "start", "horizon")


def read_left_to_right(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return which tokens `[B, N]` of insertion sequences saw what a causal model sees, each on its own.

    These are the tokens of a text written so far from left to right, none of them encoded together with a later one.
    Their states in a model that was converted from a causal one are the source's. Texts of one token, and with them
    padding, are left out.

    Args:
        inputs: `positions`, `start` and `horizon`, `[B, N]` integers, as `InsertionCollator` makes them.
    """
    positions, start, horizon = (inputs[name] for name in ("positions", "start", "horizon"))
    entries = torch.arange(start.shape[1], device=start.device).expand_as(start)
    first = start == entries
    follows = first | (positions > positions.roll(1, 1))
    broken = (~follows | (horizon != entries)).long()
    before = broken.cumsum(1) - broken
    since_start = broken.cumsum(1) - before.gather(1, start)
    alone = first & torch.cat([first[:, 1:], torch.ones_like(first[:, :1])], 1)
    return (since_start == 0) & ~alone


def cosine_distance(states, source) -> torch.Tensor:
    """Return 1 - cosine, a mean over layers, of each token, `[M]` in [0, 2], float32 or wider.

    Args:
        states: Hidden states `[M, D]` of every layer.
        source: Those to stay beside, without gradient.
    """
    wide = [torch.promote_types(layer.dtype, torch.float32) for layer in states]
    pairs = [(one.to(dtype), other.to(dtype)) for one, other, dtype in zip(states, source, wide, strict=True)]
    return torch.stack([1 - cosine_similarity(one, other, dim=-1) for one, other in pairs]).mean(0)


class AlignedTrainer(InsertionTrainer):
    """`InsertionTrainer` of an adapter that keeps what its base reads left to right.

    The training loss gains `alignment_weight * sum_i d_i / n`: d_i is the mean over layers of 1 - cosine between the
    states of token i with and without the adapter, the sum is over the tokens of `read_left_to_right`, and n is the
    number of inserted tokens of the step. It costs one forward pass of the rows that hold such tokens. The mean of d_i
    over its tokens is logged as `alignment_loss`. Evaluation is as without.

    Args:
        model: A PEFT model; its base without the adapter is the source.
        *args: Of `InsertionTrainer`.
        alignment_weight: At least 0; 0 logs the distance only.
        **kwargs: Of `InsertionTrainer`.

    Raises:
        ValueError: If the model has no adapter to switch off, or the weight is below 0.
    """

    def __init__(self, model, *args, alignment_weight: float, **kwargs):
        if not hasattr(model, "disable_adapter"):
            raise ValueError(f"alignment needs a model with a PEFT adapter, got {type(model).__name__}")
        if not 0 <= alignment_weight < float("inf"):
            raise ValueError(f"alignment_weight must be finite and at least 0, got {alignment_weight}")
        super().__init__(model, *args, **kwargs)
        self.alignment_weight = alignment_weight
        self._alignment = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, {**inputs, "output_hidden_states": True}, True, num_items_in_batch)
        read = read_left_to_right(inputs)
        distance = self._distances(model, inputs, outputs.hidden_states, read).sum()
        add_sums(self._alignment, {"alignment_loss": distance, "tokens": read.sum()})
        tokens = (inputs["labels"] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        # as `Trainer` scales a loss that is divided by the tokens of all processes
        averaged = num_items_in_batch is not None and self.args.average_tokens_across_devices
        scale = self.alignment_weight * (self.accelerator.num_processes if averaged else 1)
        loss = loss + scale * distance / torch.as_tensor(tokens).clamp_min(1)
        return (loss, outputs) if return_outputs else loss

    def _distances(self, model, inputs, states, read) -> torch.Tensor:
        """Return the distance of every token that was read left to right, `[M]`."""
        rows = read.any(1)
        if not rows.any():
            return states[-1].new_zeros(0)
        adapted = self.accelerator.unwrap_model(model)
        adapted.eval()
        with torch.no_grad(), adapted.disable_adapter():
            source = adapted(**{name: inputs[name][rows] for name in FIELDS}, output_hidden_states=True).hidden_states
        adapted.train()
        # the embeddings are the same
        return cosine_distance([layer[read] for layer in states[1:]], [layer[read[rows]] for layer in source[1:]])

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs.update(self.means(self._alignment))
        super().log(logs, *args, **kwargs)


__all__ = ["AlignedTrainer", "cosine_distance", "read_left_to_right"]
