"""Greedy and sampled insertion: a slot or several a step, then a token in each."""

import torch
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from .decoding import (
    InsertionGenerateOutput,
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


class RowSampler:
    """Choose the largest of logits or, sampling, of logits plus Gumbel noise: k best are k draws without replacement.

    With seeds every row has a generator of its own, so that what is drawn for a row depends on nobody else.
    """

    def __init__(self, rows: int, do_sample: bool, seed: int | list[int] | None, device):
        self.do_sample = do_sample
        self.generators = None
        if seed is not None and do_sample:
            seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else seed
            if len(seeds) != rows:
                raise ValueError(f"seed must be an integer or one for each of the {rows} texts, got {len(seeds)}")
            self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]

    def keep(self, rows: list[int]) -> None:
        if self.generators is not None:
            self.generators = [self.generators[row] for row in rows]

    def noise(self, scores: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Return Gumbel noise `[R, S]` of which row r draws its first `lengths[r]`, or zeros without sampling."""
        if not self.do_sample:
            return torch.zeros_like(scores)
        if self.generators is None:
            return -torch.empty_like(scores).exponential_().log()
        noise = torch.zeros_like(scores)
        for row, length in enumerate(lengths):
            noise[row, :length].exponential_(generator=self.generators[row]).log_().neg_()
        return noise


def insert(model, canvas, config, rules, criteria, streamer) -> InsertionGenerateOutput:
    """Fill canvases greedily or by sampling, `parallel_slots` tokens a step; rows go their own ways."""
    rows, pad = len(canvas["input_ids"]), padding_token(model, config)
    limits = token_limits(model, canvas, config)
    capacity = int((canvas["attention_mask"].sum(1) + limits).max()) + config.parallel_slots
    static = config.cache_implementation == "static"
    draft = Draft(model, canvas, capacity, static, step_encoder(model, config, static))
    sampler = RowSampler(rows, config.do_sample, config.seed, canvas["input_ids"].device)
    results: list[dict | None] = [None] * rows
    alive = list(range(rows))
    while alive:
        slots, counts = choose_slots(draft, sampler, limits, config)
        scores = write_tokens(model, draft, sampler, slots, counts, rules)
        draft.encode_new(counts, config.ebr_ratio if config.ebr else None, config.ebr_window)
        done = (counts == 0) | (draft.written.sum(1) >= limits)
        if criteria:
            done |= criteria(draft.texts(pad), scores)
        for row in done.nonzero().squeeze(1).tolist():
            results[alive[row]] = finished_row(draft, row)
        if streamer is not None and hasattr(streamer, "put_draft") and rows == 1:
            streamer.put_draft(draft.texts(pad).cpu())
        if bool(done.any()):
            kept = (~done).nonzero().squeeze(1)
            alive = [alive[row] for row in kept.tolist()]
            limits = limits[kept]
            sampler.keep(kept.tolist())
            draft.select_rows(kept)
    return collect(results, pad, canvas["input_ids"].device)


def choose_slots(draft: Draft, sampler: RowSampler, limits, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slots `[R, k]` to write into, best first, and how many of them count; a row that stops has none."""
    remaining = limits - draft.written.sum(1)
    allowed, room = draft.open_slots(remaining, config.slot_window)
    allowed &= (remaining > 0)[:, None]
    may_stop = ~draft.must_go_on(config.min_new_tokens or 0) | ~allowed.any(1)
    scores = draft.slot_scores(allowed, may_stop)
    if config.do_sample:
        if config.slot_temperature != 1.0:
            scores = TemperatureLogitsWarper(config.slot_temperature)(None, scores)
        if config.slot_top_p < 1.0:
            scores = TopPLogitsWarper(config.slot_top_p)(None, scores)
    # STOP draws first: its place in the row must not depend on how wide the batch is
    scores = scores.roll(1, 1)
    scores = scores + sampler.noise(scores, (draft.lengths + 1).tolist())
    ranked = scores.topk(min(config.parallel_slots, scores.shape[1]), dim=1)
    slots = ranked.indices - 1
    counts = (ranked.values.isfinite() & (slots >= 0)).long().cumprod(1)
    if counts.shape[1] > 1:
        slots, counts = _within_budget(draft, slots.clamp_min(0), counts, remaining, room)
    return slots.clamp_min(0), counts.sum(1)


def _within_budget(draft, slots, takes, remaining, room):
    """Drop the worst of a step's slots where a row's or a gap's budget would be overrun; the rest moves up."""
    deficit = (draft.minima - draft.written).clamp_min(0).sum(1)
    budget = torch.where(remaining <= deficit, remaining, remaining - deficit).clone()
    room = room.clone()
    row = torch.arange(len(draft), device=slots.device)
    for q in range(slots.shape[1]):
        gap = draft.gaps[row, slots[:, q]].clamp_min(0)
        takes[:, q] *= (budget > 0) & (room[row, gap] > 0)
        budget -= takes[:, q]
        room[row, gap] -= takes[:, q]
    order = (1 - takes).argsort(dim=1, stable=True)
    return slots.gather(1, order), takes.gather(1, order)


def write_tokens(model, draft, sampler, slots, counts, rules: TokenRules) -> torch.Tensor:
    """Choose a token for every slot, all from one state, and write them; return the scores of each first slot.

    Rows that stop have scores of `-inf`.

    Raises:
        ValueError: If every token of a slot is barred.
    """
    count_of_row = counts.tolist()
    R, k, V = len(draft), max(count_of_row), model.config.vocab_size
    tokens = torch.zeros(R, k, dtype=torch.long, device=slots.device)
    all_scores = torch.full((R, max(k, 1), V), -torch.inf, dtype=torch.float32, device=slots.device)
    for q in range(k):
        # only rows that fill a slot draw for it, so that no row's draws depend on its neighbours
        lengths = [V if q < count else 0 for count in count_of_row]
        acting = torch.tensor([row for row, length in enumerate(lengths) if length], device=slots.device)
        scores = token_scores(model, draft, acting, slots[acting, q], rules)
        all_scores = all_scores.to(scores.dtype)
        all_scores[acting, q] = scores
        best = (all_scores[:, q] + sampler.noise(all_scores[:, q], lengths))[acting].max(1)
        barred = best.values.isneginf().tolist()
        if any(barred):
            raise nothing_to_write(int(draft.origins[acting[barred.index(True)]]))
        tokens[acting, q] = best.indices
    if k:
        draft.insert(slots, tokens, counts)
    return all_scores[:, 0]
