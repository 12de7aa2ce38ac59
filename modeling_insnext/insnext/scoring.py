"""Likelihood of a text: left to right, over given orders of insertion, or over drawn ones.

A text of m tokens is written by m! orders, each with a probability of its own, and p(text) is their sum over all of
them. Of K distinct orders o_1..o_K, drawn uniformly without replacement, (m! / K) sum_k p(text, o_k) has the mean
p(text), and its logarithm at most the mean log p(text) by Jensen's inequality: a lower bound in expectation, which one
draw may exceed, which tightens as K grows (Burda et al., arXiv:1509.00519) and is exact at K = m!.
"""

import math
from itertools import permutations

import torch

from .attention import build_interval, check_contiguous
from .slot_losses import insertion_losses
from .supervision import Supervision


class InsertionScoringMixin:
    """Adds `score` to a model."""

    @torch.no_grad()
    def score(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        num_orders: int | None = None,
        orders: torch.LongTensor | None = None,
        stop: bool = True,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
    ) -> torch.Tensor:
        """Return log-likelihoods of texts in nats, float64 `[B]`.

        By default left to right, as a causal language model with STOP for EOS: exact for that order of writing. By
        `orders` log sum_k p(text, o_k): a lower bound of log p(text), exact if all m! orders are given. By
        `num_orders` log (m! / K) sum_k p(text, o_k) over K distinct orders drawn uniformly: an estimate whose mean is
        a lower bound, while a single one may lie above; where m! <= K all orders are taken, and it is log p(text).

        Args:
            input_ids: Texts `[B, T]`, left to right, beginning with BOS, padded on either side. EOS at the end is
                dropped: STOP says it.
            attention_mask: 1 on tokens, 0 on padding.
            context_mask: True on tokens that are given, `[B, T]`; the first token always is. Left to right they must
                lead.
            num_orders: Number K of orders to draw.
            orders: Orders `[K, m]` of the m written tokens, each a permutation of 0..m-1 from left to right; all texts
                must have m of them. An order given twice counts twice.
            stop: Whether ending there is part of the event.
            generator: Source of the drawn orders.
            batch_size: Sequences a forward pass.

        Raises:
            ValueError: If ids are no integers, a text does not begin with BOS, PAD, BOS or EOS is to be written inside
                it, both `num_orders` and `orders` are given, `generator` is given without `num_orders`, an order is no
                permutation, the context does not lead left to right, there is no EOS to stop left to right, or the
                texts break a rule of the model.
        """
        if num_orders is not None and orders is not None:
            raise ValueError("num_orders and orders exclude each other, got both")
        if generator is not None and num_orders is None:
            raise ValueError("generator draws orders, which num_orders asks for, got num_orders=None")
        for name, value in {"num_orders": num_orders, "batch_size": batch_size}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        texts = self._texts_to_score(input_ids, attention_mask, context_mask)
        if num_orders is None and orders is None:
            if stop and self.config.eos_token_id is None:
                raise ValueError("stop=True left to right needs an eos_token_id, whose column says STOP, got None")
            return torch.stack([self._left_to_right_score(ids, given, stop) for ids, given in texts])
        scores = []
        for ids, given in texts:
            m = int((~given).sum())
            if orders is None:
                drawn = _draw_orders(m, num_orders, generator)
                weight = math.log(math.factorial(m)) - math.log(len(drawn))
            else:
                drawn, weight = self._checked_orders(orders, m), 0.0
            paths = [self._path_scores(ids, given, part, stop) for part in drawn.split(batch_size)]
            scores.append(torch.cat(paths).logsumexp(0) + weight)
        return torch.stack(scores)

    def _texts_to_score(self, input_ids, attention_mask, context_mask):
        if not torch.is_tensor(input_ids) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            kind = input_ids.dtype if torch.is_tensor(input_ids) else type(input_ids).__name__
            raise ValueError(f"input_ids must be a tensor of integers, got {kind}")
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [B, T], got {list(input_ids.shape)}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_contiguous(attention_mask)
        if context_mask is not None and context_mask.shape != input_ids.shape:
            raise ValueError(f"context_mask must be {list(input_ids.shape)}, got {list(context_mask.shape)}")
        texts = []
        for row in range(len(input_ids)):
            real = attention_mask[row].bool()
            ids = input_ids[row, real]
            given = torch.zeros_like(ids, dtype=torch.bool) if context_mask is None else context_mask[row, real].bool()
            given[0] = True
            if len(ids) > 1 and ids[-1] == self.config.eos_token_id:
                ids, given = ids[:-1], given[:-1]
            self._check_text(ids, given, row)
            texts.append((ids, given))
        return texts

    def _check_text(self, ids, given, row):
        config = self.config
        outside = ids[(ids < 0) | (ids >= config.vocab_size)].tolist()
        if outside:
            raise ValueError(f"ids must be in 0..{config.vocab_size - 1}, got {outside[0]} in row {row}")
        if config.bos_token_id is not None and ids[0] != config.bos_token_id:
            raise ValueError(f"a text begins with BOS, id {config.bos_token_id}, got {int(ids[0])} in row {row}")
        structure = torch.isin(ids, ids.new_tensor(config.never_inserted)) & ~given
        if structure.any():
            place = int(structure.nonzero()[0])
            raise ValueError(
                f"ids {config.never_inserted} are structure and never written inside a text, "
                f"got {int(ids[place])} at token {place} of row {row}"
            )

    @staticmethod
    def _checked_orders(orders, m):
        if (
            orders.is_floating_point()
            or orders.ndim != 2
            or orders.shape[1] != m
            or not torch.equal(orders.sort(1).values, torch.arange(m, device=orders.device).expand_as(orders))
        ):
            raise ValueError(f"orders must be permutations of 0..{m - 1}, [K, {m}], got {orders.tolist()}")
        return orders

    def _left_to_right_score(self, ids, given, stop):
        context = int(given.sum())
        if not bool(given[:context].all()):
            raise ValueError(f"left to right the context must lead, got context_mask {given.tolist()}")
        log_p = self(ids[None]).logits[0].double()
        rows = torch.arange(context - 1, len(ids) - 1, device=ids.device)
        score = log_p[rows, ids[context:]].sum()
        return score + log_p[-1, self.config.eos_token_id] if stop else score

    def _path_scores(self, ids, given, orders, stop):
        """Return log p(text, order) of one text for orders `[K, m]` of its written tokens."""
        context, missing = given.nonzero().squeeze(1), (~given).nonzero().squeeze(1)
        written = missing[orders.to(ids.device)]
        positions = torch.cat([context.expand(len(orders), -1), written], 1)
        sequence = ids[positions]
        interval = build_interval(sequence.shape, ids.device, positions=positions, context_length=len(context))
        hidden = self.model(sequence, positions=positions, context_length=len(context)).last_hidden_state
        ends = torch.zeros_like(sequence, dtype=torch.bool)
        ends[:, -1] = stop
        supervision = Supervision(labels=sequence, stop_targets=ends)
        position, token, _ = insertion_losses(self, hidden, sequence, interval, supervision)
        return -(position.double() + token.double()).sum(1)


def _draw_orders(m: int, count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Return `count` distinct orders of m tokens, drawn uniformly, or all m! if these are no more, int64 `[K, m]`."""
    total = math.factorial(m)
    if total <= 2 * count:
        every = torch.tensor(list(permutations(range(m))), dtype=torch.long).reshape(total, m)
        return every if total <= count else every[torch.randperm(total, generator=generator)[:count]]
    drawn = {}
    while len(drawn) < count:
        drawn[tuple(torch.randperm(m, generator=generator).tolist())] = True
    return torch.tensor(list(drawn))


__all__ = ["InsertionScoringMixin"]
