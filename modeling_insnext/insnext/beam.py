"""Beam search over (slot, token): hypotheses of the same text are merged, their probabilities added.

The likeliest of them goes on for all. The others' states, which depend on the order of writing, are dropped with them,
so that what follows a merge has the probability that it has after the likeliest order.

A candidate's probability is that of its hypothesis times p(slot) p(token | slot). Slots are looked into in the order
of p(hypothesis) p(slot), which bounds their candidates, until none can enter the beam any more.
"""

import math
from dataclasses import dataclass, field

import torch

from .decoding import (
    TokenRules,
    collect,
    finished_row,
    nothing_to_write,
    padding_token,
    step_encoder,
    token_limits,
    token_scores,
)
from .draft import Draft


PAIRS_PER_CHUNK = 64


@dataclass
class Candidate:
    """A text one step further: the hypothesis `row`, what is written where, and the text's probability so far."""

    log_p: float
    best: float
    row: int
    slot: int
    token: int


@dataclass
class Finished:
    """The best texts of one canvas that have ended."""

    size: int
    texts: dict = field(default_factory=dict)

    def add(self, key: tuple, log_p: float, norm: float, result: dict) -> None:
        """Take in a finished text; one that ends twice (by different orders) has the sum of both probabilities."""
        if key in self.texts:
            log_p = _logaddexp(log_p, self.texts[key][0])
            result = self.texts[key][2]
        self.texts[key] = (log_p, log_p / norm, result)
        while len(self.texts) > self.size:
            self.texts.pop(min(self.texts, key=lambda k: self.texts[k][1]))

    def is_closed(self, attainable: float) -> bool:
        """Whether `size` texts are there and nothing that is still running can be better than the worst of them."""
        return len(self.texts) >= self.size and min(score for _, score, _ in self.texts.values()) >= attainable

    def best(self, count: int) -> list[dict]:
        """Return the `count` best texts; where there are fewer, the last one again with the score `-inf`."""
        ranked = sorted(self.texts.values(), key=lambda text: -text[1])[:count]
        ranked += [(-math.inf, -math.inf, ranked[-1][2])] * (count - len(ranked))
        return [{**result, "score": score} for _, score, result in ranked]


def beam_search(model, canvas, config, rules: TokenRules, criteria, streamer):
    """Return the likeliest `num_return_sequences` texts of each canvas as an `InsertionGenerateOutput`.

    Raises:
        ValueError: If beams are combined with sampling or a streamer; or if a text may not stop and every token is
            barred.
    """
    if config.do_sample:
        raise ValueError(
            "beams look for the likeliest text, do_sample=True for another one: num_beams > 1 needs do_sample=False"
        )
    if streamer is not None:
        raise ValueError(f"a streamer shows one text as it grows, num_beams={config.num_beams} grow at once")
    canvases = len(canvas["input_ids"])
    limits = token_limits(model, canvas, config)
    capacity = int((canvas["attention_mask"].sum(1) + limits).max()) + 1
    static = config.cache_implementation == "static"
    draft = Draft(model, canvas, capacity, static, step_encoder(model, config, static))
    owner, log_p = list(range(canvases)), [0.0] * canvases
    finished = [Finished(config.num_beams) for _ in range(canvases)]
    pad = padding_token(model, config)

    def norm(row: int, more: int = 0) -> float:
        return max(int(draft.written[row].sum()) + more, 1) ** config.length_penalty

    while owner:
        texts = [tuple(text[: int(n)].tolist()) for text, n in zip(draft.texts(pad), draft.lengths, strict=True)]
        scores, stops = _scores(draft, limits[owner], config)
        for row, stop in enumerate(stops):
            if stop > -math.inf:
                finished[owner[row]].add(texts[row], log_p[row] + stop, norm(row), finished_row(draft, row))
        pool = _candidates(model, draft, scores, owner, log_p, texts, config.num_beams, rules)
        chosen = []
        for item, candidates in pool.items():
            kept = candidates[: config.num_beams]
            # several hypotheses may grow into one text, which then has the probability of all of them
            attainable = math.log(math.fsum(math.exp(c.log_p - kept[0].log_p) for c in kept)) + kept[0].log_p
            if config.early_stopping == "never" and config.length_penalty > 0:
                attainable /= max(int(limits[item]), 1) ** config.length_penalty
            else:
                attainable /= norm(kept[0].row, 1)
            early = config.early_stopping is True and len(finished[item].texts) >= config.num_beams
            if not early and not finished[item].is_closed(attainable):
                chosen += [(item, candidate) for candidate in kept]
        if not chosen:
            break
        draft.select_rows(torch.tensor([candidate.row for _, candidate in chosen], device=draft.ids.device))
        owner, log_p = [item for item, _ in chosen], [candidate.log_p for _, candidate in chosen]
        slots, tokens = (
            torch.tensor([[getattr(candidate, name)] for _, candidate in chosen], device=draft.ids.device)
            for name in ("slot", "token")
        )
        counts = torch.ones_like(draft.lengths)
        draft.insert(slots, tokens, counts)
        draft.encode_new(counts, config.ebr_ratio if config.ebr else None, config.ebr_window)
        ends = draft.written.sum(1) >= limits[owner]
        if criteria:
            ends |= criteria(draft.texts(pad), torch.tensor(log_p, device=ends.device)[:, None])
        for row in ends.nonzero().squeeze(1).tolist():
            length = int(draft.lengths[row])
            key = tuple(draft.texts(pad)[row, :length].tolist())
            finished[owner[row]].add(key, log_p[row], norm(row), finished_row(draft, row))
        kept = (~ends).nonzero().squeeze(1)
        draft.select_rows(kept)
        owner, log_p = ([values[row] for row in kept.tolist()] for values in (owner, log_p))
    for item, texts in enumerate(finished):
        if not texts.texts:
            raise nothing_to_write(item)
    results = [text for texts in finished for text in texts.best(config.num_return_sequences)]
    return collect(results, pad, canvas["input_ids"].device)


def _scores(draft: Draft, limits: torch.Tensor, config) -> tuple[torch.Tensor, list[float]]:
    """Return log p of the slots `[R, W]` and of STOP for each hypothesis."""
    remaining = limits - draft.written.sum(1)
    allowed, _ = draft.open_slots(remaining, config.slot_window)
    may_stop = ~draft.must_go_on(config.min_new_tokens or 0) | ~allowed.any(1)
    log_p = draft.slot_scores(allowed, may_stop).log_softmax(1)
    return log_p[:, :-1], log_p[:, -1].tolist()


def _candidates(
    model, draft, slot_scores, owner, log_p, texts, beams, rules: TokenRules
) -> dict[int, list[Candidate]]:
    """Return for each canvas its candidates, best text first, one a text."""
    total = slot_scores.double() + torch.tensor(log_p, device=slot_scores.device)[:, None]
    pools: dict[int, list[Candidate]] = {}
    for item in dict.fromkeys(owner):
        rows = [row for row, mine in enumerate(owner) if mine == item]
        row_P, slot_P = total[rows].isfinite().nonzero(as_tuple=True)
        row_P = torch.tensor(rows, device=total.device)[row_P]
        bound_P, order = total[row_P, slot_P].sort(descending=True, stable=True)
        pool: list[Candidate] = []
        for first in range(0, len(order), PAIRS_PER_CHUNK):
            if (
                len(pool) >= 2 * beams
                and float(bound_P[first]) <= sorted((c.best for c in pool), reverse=True)[2 * beams - 1]
            ):
                break
            pairs = order[first : first + PAIRS_PER_CHUNK]
            pair_rows, pair_slots = row_P[pairs], slot_P[pairs]
            raw = token_scores(model, draft, pair_rows, pair_slots, rules)
            scores = raw.log_softmax(1).double() + bound_P[first : first + PAIRS_PER_CHUNK, None]
            top = scores.topk(min(2 * beams, scores.shape[1]), dim=1)
            for row, slot, values, tokens in zip(
                pair_rows.tolist(), pair_slots.tolist(), top.values.tolist(), top.indices.tolist(), strict=True
            ):
                pool += [
                    Candidate(value, value, row, slot, token)
                    for value, token in zip(values, tokens, strict=True)
                    if value > -math.inf
                ]
        if pool:
            pools[item] = _merged(draft, pool, texts)
    return pools


def _merged(draft: Draft, pool: list[Candidate], texts: list[tuple]) -> list[Candidate]:
    """Return one candidate a text, its likeliest, with the probabilities of all of them added; best text first."""
    merged: dict[tuple, Candidate] = {}
    ranks = draft.ranks.tolist()
    for candidate in sorted(pool, key=lambda c: -c.best):
        rank = ranks[candidate.row][candidate.slot] + 1
        text = texts[candidate.row]
        key = text[:rank] + (candidate.token,) + text[rank:]
        if key in merged:
            merged[key].log_p = _logaddexp(merged[key].log_p, candidate.log_p)
        else:
            merged[key] = candidate
    return sorted(merged.values(), key=lambda c: -c.log_p)


def _logaddexp(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))
