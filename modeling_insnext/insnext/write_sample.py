"""Greedy and sampled insertion: a slot or several a step, then a token in each.

Shape suffixes: R rows, k slots a step, V vocabulary.
"""

import hashlib

import torch
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from .barred import must_go_on, nothing_to_write
from .draft import Draft
from .output import InsertionGenerateOutput, collect, finished_row
from .pending import Move
from .step import TokenRules, token_scores


def write_sample(draft: Draft, config, rules: TokenRules, criteria, streamer) -> InsertionGenerateOutput:
    """Fill canvases greedily or by sampling, `parallel_slots` tokens a step; rows end one by one.

    Raises:
        ValueError: If every token of a chosen slot is barred in a row that may not stop.
    """
    sampler = RowSampler(len(draft), config.do_sample, config.seed, draft.ids.device)
    while bool(draft.running.any()):
        slots, takes = choose_slots(draft, sampler, config)
        if draft.pending is not None:
            slots, takes = begin_keywords(draft, sampler, slots, takes)
        wrote, scores = write_tokens(draft, sampler, slots, takes, rules)
        draft.encode(config)
        draft.running &= wrote & (draft.budget.remaining > 0)
        if criteria:
            draft.running &= ~criteria(draft.texts(), scores)
        if hasattr(streamer, "put_draft"):
            streamer.put_draft(draft.texts().cpu())
    return collect([finished_row(draft, row) for row in range(len(draft))], draft)


class RowSampler:
    """Choose the largest of logits or, sampling, of logits plus Gumbel noise: k best are k draws without replacement.

    With seeds every row has a generator of its own, so that what is drawn for a row depends on nobody else.

    Args:
        rows: Number of texts.
        do_sample: Whether to draw at all.
        seed: One for all, from which each row's is made, or a list with one a row; None: the global generator.
        device: Where to draw.
    """

    def __init__(self, rows: int, do_sample: bool, seed: int | list[int] | None, device):
        self.do_sample = do_sample
        self.generators = None
        if seed is not None and do_sample:
            seeds = seed if isinstance(seed, (list, tuple)) else [row_seed(seed, row) for row in range(rows)]
            self.generators = [torch.Generator(device).manual_seed(int(s)) for s in seeds]

    def add_noise(self, scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return what is to be compared: scores `[R, S]`, sampling with Gumbel noise.

        Of the noise row r draws its first `lengths[r]`.
        """
        if not self.do_sample:
            return scores
        if self.generators is None:
            return scores - torch.empty_like(scores).exponential_().log()
        noise = torch.zeros_like(scores)
        for row, length in enumerate(lengths.tolist()):
            noise[row, :length].exponential_(generator=self.generators[row]).log_().neg_()
        return scores + noise


def row_seed(seed: int, row: int) -> int:
    """Return the seed of one row of a batch, a hash of both numbers: no two batches share the draws of a row."""
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def choose_slots(draft: Draft, sampler: RowSampler, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slots `[R, k]` to write into, best first, and whether each comes before STOP; `[R, k]` bool."""
    scores = draft.choices(config, at_stop=True)
    if config.do_sample:
        if config.slot_temperature != 1.0:
            scores = TemperatureLogitsWarper(config.slot_temperature)(None, scores)
        if config.slot_top_p < 1.0:
            scores = TopPLogitsWarper(config.slot_top_p)(None, scores)
    # STOP draws first: its place in the row must not depend on how wide the batch is
    scores = scores.roll(1, 1)
    scores = sampler.add_noise(scores, draft.lengths + 1)
    ranked = scores.topk(min(config.parallel_slots, scores.shape[1]), dim=1)
    slots = ranked.indices - 1
    takes = ranked.values.isfinite() & (slots >= 0)
    if takes.shape[1] > 1:
        takes = takes.long().cumprod(1).bool()
    return slots.clamp_min(0), takes


def begin_keywords(draft, sampler, slots, takes) -> tuple[torch.Tensor, torch.Tensor]:
    """Let rows that chose STOP begin a pending keyword instead, where p(slot) p(first token | slot) says so.

    Rows with pending keywords write into one slot a step.
    """
    pending = draft.pending
    takes = torch.cat([takes[:, :1], takes[:, 1:] & ~(pending.owes | pending.is_open)[:, None]], 1)
    stopped = draft.running & pending.owes & ~takes[:, 0]
    if not bool(stopped.any()):
        return slots, takes
    moves = [mine if stops else [] for mine, stops in zip(pending.moves(draft), stopped.tolist(), strict=True)]
    moves = [[move for move in mine if move.begins] for mine in moves]
    scores, counts = move_scores(draft, moves)
    best = sampler.add_noise(scores, counts).argmax(1).tolist()
    for row in stopped.nonzero().squeeze(1).tolist():
        move = moves[row][best[row]]
        slots[row, 0], takes[row, 0], pending.wanted[row] = move.slot, True, move.token
    return slots, takes


def move_scores(draft: Draft, moves: list[list[Move]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p(slot) + log p(token | slot) of the moves of each row, `[R, M]`, and how many they are, `[R]`.

    The slots are those of the moves; what follows the last move of a row is `-inf`.
    """
    allowed = torch.zeros(len(draft), draft.width, dtype=torch.bool, device=draft.ids.device)
    for row, mine in enumerate(moves):
        allowed[row, [move.slot for move in mine]] = True
    places = draft.slot_scores(allowed, may_stop=~allowed.any(1)).log_softmax(1)
    scores = places.new_full((len(moves), max(map(len, moves))), -torch.inf)
    for row, mine in enumerate(moves):
        log_p = places.new_tensor([move.log_p for move in mine])
        scores[row, : len(mine)] = places[row, [move.slot for move in mine]] + log_p
    return scores, torch.tensor([len(mine) for mine in moves], device=scores.device)


def write_tokens(draft, sampler, slots, takes, rules: TokenRules) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose and write a token for every slot that is taken and has room, all from one state.

    A slot in which every token is barred counts as STOP: the row takes neither it nor those that come after it.

    Returns:
        Which rows wrote, bool `[R]`, and the scores `[R, V]` of each first slot, `-inf` in rows that stop.

    Raises:
        ValueError: If every token of a first slot is barred in a row that may not stop.
    """
    first_scores = None
    for q in range(slots.shape[1]):
        # the first slot was chosen among those with room; what the step has written may have taken that of others
        acts = takes[:, q] if q == 0 else takes[:, q] & (draft.room(slots[:, q : q + 1])[:, 0] > 0)
        rows = acts.nonzero().squeeze(1)
        scores = token_scores(draft, slots[:, q], rows, rules, draft.token_sets(slots[:, q]))
        first_scores = scores if first_scores is None else first_scores
        if len(rows) > 0:
            # only rows that fill a slot draw for it, so that no row's draws depend on its neighbours
            best = sampler.add_noise(scores, acts * scores.shape[1]).max(1)
            barred = acts & best.values.isneginf()
            if bool(barred.any()):
                stuck = barred & must_go_on(draft)
                if q == 0 and bool(stuck.any()):
                    row = int(stuck.nonzero()[0, 0])
                    raise nothing_to_write(draft, row, int(slots[row, q]), rules)
                acts, takes = acts & ~barred, torch.cat([takes[:, :q], takes[:, q:] & ~barred[:, None]], 1)
            draft.write(slots[:, q], best.indices, acts)
    return takes[:, 0], first_scores
