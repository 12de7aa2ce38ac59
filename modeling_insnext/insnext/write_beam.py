"""Beam search over (slot, token): every hypothesis is a text and the order in which it was written.

Every order keeps its own states and its own log-probability, since what follows depends on them. Orders of the same
text are ranked together and reported together, by the sum of their probabilities. So a score is a lower bound of the
text's log-probability, which is the sum over all its orders, and exact once no order was dropped.

A candidate's probability is that of its hypothesis times p(slot) p(token | slot). Slots are looked into in the order
of p(hypothesis) p(slot), which bounds their candidates, until none can enter the beam any more.

Pending keywords belong to the hypothesis. Their tokens count with the model's own p(token | slot), forced or not. A
text that holds a rare word early has paid for what another still has to pay, so texts are compared with those that
have as many keywords left, and the rows of a beam are dealt out in turn, fewest left first.

Shape suffixes: R rows, `num_beams` of them a canvas, W slots of the longest row.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch

from .barred import nothing_to_write
from .draft import Draft
from .output import InsertionGenerateOutput, collect, finished_row
from .step import TokenRules, token_scores


class Candidate(NamedTuple):
    """A hypothesis one step further: what is written where in `row`, and the log-probability of that order."""

    log_p: float
    row: int
    slot: int
    token: int


class Grown(NamedTuple):
    """A text of the pool, behind the number of its canvas, and how many keywords have not begun in it."""

    unbegun: int
    text: tuple


class Kept(NamedTuple):
    """A candidate that goes on, its text, and the log-probability of that: the sum over all its orders in the pool."""

    candidate: Candidate
    text: Grown
    log_mass: float


@dataclass
class Finished:
    """The best texts of one canvas that have ended, with their scores."""

    size: int
    texts: dict = field(default_factory=dict)

    def wants(self, score: float) -> bool:
        """Whether a text of this score would be among the best."""
        return len(self.texts) < self.size or score > min(known for known, _ in self.texts.values())

    def add(self, text: tuple, score: float, result: dict) -> None:
        """Take in a finished text and, if there are too many, drop the worst."""
        if text not in self.texts or self.texts[text][0] < score:
            self.texts[text] = (score, result)
        if len(self.texts) > self.size:
            del self.texts[min(self.texts, key=lambda known: self.texts[known][0])]

    def is_closed(self, attainable: float) -> bool:
        """Whether `size` texts are there and nothing that is still running can be better than the worst of them."""
        return len(self.texts) >= self.size and min(score for score, _ in self.texts.values()) >= attainable

    def best(self, count: int) -> list[dict]:
        """Return the `count` best texts; where there are fewer, the last one again with the score `-inf`."""
        ranked = sorted(self.texts.values(), key=lambda text: -text[0])[:count]
        ranked += [(-math.inf, ranked[-1][1])] * (count - len(ranked))
        return [{**result, "score": score} for score, result in ranked]


def write_beams(draft: Draft, config, rules: TokenRules, criteria) -> InsertionGenerateOutput:
    """Return the likeliest `num_return_sequences` texts of each canvas.

    Raises:
        ValueError: If of a canvas no text may stop and in all its slots every token is barred.
    """
    beams, device = config.num_beams, draft.ids.device
    log_p = torch.full((len(draft),), -torch.inf, dtype=torch.float64, device=device)
    log_p[::beams] = 0.0
    draft.running = log_p > -torch.inf
    finished = [Finished(beams) for _ in range(len(draft) // beams)]
    while bool(draft.running.any()):
        places = draft.choices(config).log_softmax(1) + log_p[:, None]
        texts = _texts(draft)
        _end(draft, _summed(texts, places[:, -1].tolist()), finished, config)
        pools = _pools(draft, places[:, :-1], texts, beams, rules)
        for item, ended in enumerate(finished):
            if not pools[item] and not ended.texts:
                row = int(log_p.view(-1, beams)[item].argmax()) + item * beams
                raise nothing_to_write(draft, row, int(places[row, :-1].argmax()), rules)
        kept = [_kept(pool, beams) for pool in pools]
        kept = [[] if _is_over(draft, *pair, config) else pair[1] for pair in zip(finished, kept, strict=True)]
        parents, slots, tokens, log_p, log_mass = _columns(kept, beams, device)
        draft.select_rows(parents)
        draft.running = log_p > -torch.inf
        draft.write(slots, tokens, draft.running)
        draft.encode(config)
        ends = draft.running & (draft.budget.remaining <= 0)
        if criteria:
            ends |= draft.running & criteria(draft.texts(), log_p[:, None])
        if bool(ends.any()):
            # a text that ends here needs no state, so orders that got no row count too
            ended, texts = {}, _texts(draft)
            for row in ends.nonzero().squeeze(1).tolist():
                ended.setdefault(texts[row], (row, float(log_mass[row])))
            _end(draft, ended, finished, config)
            log_p = log_p.masked_fill(ends, -torch.inf)
            draft.running = draft.running & ~ends
    results = [text for ended in finished for text in ended.best(config.num_return_sequences)]
    return collect(results, draft)


def _texts(draft: Draft) -> list[tuple[int, ...]]:
    """Return of each row the canvas it belongs to and its text, in one tuple."""
    texts = draft.texts_as_lists(torch.arange(len(draft), device=draft.ids.device))
    return [(item, *text) for item, text in zip(draft.origins.tolist(), texts, strict=True)]


def _summed(texts: list[tuple], log_p: list[float]) -> dict[tuple, tuple[int, float]]:
    """Return for each text the row of its likeliest order and the log-probability of all its orders."""
    orders = defaultdict(list)
    for row, (text, value) in enumerate(zip(texts, log_p, strict=True)):
        orders[text].append((value, row))
    return {text: (max(mine)[1], log_sum(value for value, _ in mine)) for text, mine in orders.items()}


def _end(draft: Draft, ended: dict[tuple, tuple[int, float]], finished: list[Finished], config) -> None:
    """Take in texts with a row each and their log-probabilities; those of `-inf` did not end."""
    written = draft.budget.written.sum(1).tolist()
    for text, (row, log_p) in ended.items():
        score = log_p / _norm(written[row], config)
        if log_p > -math.inf and finished[text[0]].wants(score):
            finished[text[0]].add(text, score, finished_row(draft, row))


def _norm(written: int, config) -> float:
    return max(written, 1) ** config.length_penalty


def _pools(draft: Draft, bounds, texts, beams: int, rules: TokenRules) -> list[dict[Grown, list[Candidate]]]:
    """Return for each canvas its candidates by the text they make, each order once.

    Args:
        bounds: `[R, W]`, log-probability of each hypothesis times that of its slots.
    """
    ranks, pending = draft.ranks.tolist(), draft.pending
    unbegun = [0] * len(draft) if pending is None else pending.unbegun().tolist()
    pools = [defaultdict(list) for _ in range(len(draft) // beams)]

    def add(value: float, row: int, slot: int, token: int, begins: bool = False) -> None:
        if value > -math.inf:
            cut = ranks[row][slot] + 2
            grown = Grown(unbegun[row] - begins, (*texts[row][:cut], token, *texts[row][cut:]))
            pools[row // beams][grown].append(Candidate(value, row, slot, token))

    if pending is not None:
        for row, slot, token, begins, log_p in chain.from_iterable(pending.moves(draft)):
            add(float(bounds[row, slot]) + log_p, row, slot, token, begins)
        bounds = bounds.masked_fill(~pending.takes_any_word(draft), -torch.inf)
    bounds, order = bounds.sort(descending=True, stable=True)
    for turn in range(bounds.shape[1]):
        rows = (bounds[:, turn] > _thresholds(pools, unbegun, beams, bounds)).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        sets = draft.token_sets(order[:, turn])
        scores = token_scores(draft, order[:, turn], rows, rules, sets).log_softmax(1) + bounds[:, turn, None]
        if sets is not None:
            scores = scores.masked_fill(sets.of_keywords, -torch.inf)
        top = scores.topk(min(2 * beams, scores.shape[1]), dim=1)
        values, tokens, slots = top.values.tolist(), top.indices.tolist(), order[:, turn].tolist()
        for row in rows.tolist():
            for value, token in zip(values[row], tokens[row], strict=True):
                add(value, row, slots[row], token)
    return pools


def _thresholds(pools: list[dict[Grown, list[Candidate]]], unbegun: list[int], beams: int, bounds) -> torch.Tensor:
    """Return for each row what a text of its canvas, with as many keywords left, must exceed, `[R]`."""
    kinds = [(row // beams, count) for row, count in enumerate(unbegun)]
    best = {kind: [] for kind in kinds}
    for item, pool in enumerate(pools):
        for text, orders in pool.items():
            best.setdefault((item, text.unbegun), []).append(max(orders).log_p)
    enough = 2 * beams
    limit = {
        kind: sorted(mine, reverse=True)[enough - 1] if len(mine) >= enough else -math.inf
        for kind, mine in best.items()
    }
    return bounds.new_tensor([limit[kind] for kind in kinds])


def _kept(pool: dict[Grown, list[Candidate]], beams: int) -> list[Kept]:
    """Return what gets a row: of the best texts the likeliest order each, then the likeliest other orders."""
    masses = {text: log_sum(candidate.log_p for candidate in orders) for text, orders in pool.items()}
    place, turns = {}, Counter()
    for text in sorted(masses, key=lambda text: -masses[text]):
        place[text] = turns[text.unbegun]
        turns[text.unbegun] += 1
    best = sorted(place, key=lambda text: (place[text], text.unbegun))[:beams]
    orders = [sorted(pool[text], reverse=True) for text in best]
    others = sorted((candidate for mine in orders for candidate in mine[1:]), reverse=True)
    text_of = {candidate: text for text, mine in zip(best, orders, strict=True) for candidate in mine}
    chosen = [mine[0] for mine in orders] + others[: beams - len(best)]
    return [Kept(candidate, text_of[candidate], masses[text_of[candidate]]) for candidate in chosen]


def _is_over(draft: Draft, finished: Finished, kept: list[Kept], config) -> bool:
    """Whether nothing that could still come of these candidates is wanted."""
    if not kept or (config.early_stopping is True and len(finished.texts) >= finished.size):
        return True
    # all of them might grow into one text, which then has the probability of all
    attainable = log_sum({text: mass for _, text, mass in kept}.values())
    row = kept[0].candidate.row
    longest = config.early_stopping == "never" and config.length_penalty > 0
    written = int(draft.budget.limit[row]) if longest else int(draft.budget.written[row].sum()) + 1
    return finished.is_closed(attainable / _norm(written, config))


def _columns(kept: list[list[Kept]], beams: int, device) -> tuple[torch.Tensor, ...]:
    """Return row, slot, token, log-probability and that of the text of every row's next hypothesis.

    A row without one stays as it is, with the log-probability `-inf`.
    """
    table = []
    for item, mine in enumerate(kept):
        rests = [(item * beams + j, 0, 0, -math.inf, -math.inf) for j in range(len(mine), beams)]
        table += [(row, slot, token, log_p, mass) for (log_p, row, slot, token), _, mass in mine] + rests
    row, slot, token, log_p, mass = zip(*table, strict=True)
    whole = [torch.tensor(column, device=device) for column in (row, slot, token)]
    return (*whole, *(torch.tensor(column, dtype=torch.float64, device=device) for column in (log_p, mass)))


def log_sum(values: Iterable[float]) -> float:
    """Return the logarithm of the sum of probabilities given by their logarithms."""
    values = list(values)
    highest = max(values)
    if highest == -math.inf:
        return highest
    return highest + math.log(math.fsum(math.exp(value - highest) for value in values))
