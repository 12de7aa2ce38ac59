"""Likelihood of a text: left to right, over given orders of insertion, or bounded by sampling orders.

A text of m tokens is written by m! orders, each with a probability of its own, and p(text) is their sum. With orders
o_1..o_K drawn uniformly, log (m! / K) sum_k p(text, o_k) is an unbiased estimate of p(text) inside the logarithm, so
by Jensen's inequality a lower bound of log p(text) in expectation, which tightens as K grows (Burda et al.,
arXiv:1509.00519).
"""

import math

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

        By default left to right, as a causal language model with STOP for EOS. With `num_orders` the importance bound
        over that many uniformly drawn orders; with `orders` log sum_k p(text, o_k), which is exact if all m! orders
        are given.

        Args:
            input_ids: Texts `[B, T]`, left to right, beginning with BOS, padded on either side. EOS at the end is
                dropped: STOP says it.
            attention_mask: 1 on tokens, 0 on padding.
            context_mask: True on tokens that are given, `[B, T]`; the first token always is. Left to right they must
                lead.
            num_orders: Number K of orders to draw.
            orders: Orders `[K, m]` of the m written tokens, each a permutation of 0..m-1 from left to right; all texts
                must have m of them.
            stop: Whether ending there is part of the event.
            generator: Source of the drawn orders.
            batch_size: Sequences a forward pass.

        Raises:
            ValueError: If both `num_orders` and `orders` are given, an order is no permutation, the context does not
                lead left to right, there is no EOS to stop left to right, or the texts break a rule of the model.
        """
        if num_orders is not None and orders is not None:
            raise ValueError("num_orders and orders exclude each other, got both")
        if num_orders is not None and num_orders < 1:
            raise ValueError(f"num_orders must be at least 1, got {num_orders}")
        texts = self._texts_to_score(input_ids, attention_mask, context_mask)
        if num_orders is None and orders is None:
            if stop and self.config.eos_token_id is None:
                raise ValueError("stop=True left to right needs an eos_token_id, whose column says STOP, got None")
            return torch.stack([self._left_to_right_score(ids, given, stop) for ids, given in texts])
        scores = []
        for ids, given in texts:
            m = int((~given).sum())
            if orders is None:
                drawn = torch.stack([torch.randperm(m, generator=generator) for _ in range(num_orders)])
                weight = math.lgamma(m + 1) - math.log(num_orders)
            else:
                drawn, weight = self._checked_orders(orders, m), 0.0
            paths = [self._path_scores(ids, given, part, stop) for part in drawn.split(batch_size)]
            scores.append(torch.cat(paths).logsumexp(0) + weight)
        return torch.stack(scores)

    def _texts_to_score(self, input_ids, attention_mask, context_mask):
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
            texts.append((ids, given))
        return texts

    @staticmethod
    def _checked_orders(orders, m):
        if (
            orders.ndim != 2
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


__all__ = ["InsertionScoringMixin"]
