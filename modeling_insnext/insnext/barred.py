"""A slot into which no token may be written: who barred them, and why its row does not simply stop.

A chosen slot without a token counts as STOP: chosen first it ends the row, later it ends what the row writes in that
step. Where a row must go on, the call ends with an error that names the row.
"""

import torch
from transformers import LogitsProcessorList

from .draft import Draft
from .step import TokenRules, token_scores


def must_go_on(draft: Draft) -> torch.Tensor:
    """Return which rows may not stop: they lack tokens of a minimum, or of a keyword; bool `[R]`."""
    lacks_R = draft.budget.must_go_on()
    return lacks_R if draft.pending is None else lacks_R | draft.pending.owes


def nothing_to_write(draft: Draft, row: int, slot: int, rules: TokenRules) -> ValueError:
    """Return the error for a row that may not stop and has no token for the slot it chose.

    Args:
        draft: The texts.
        row: Row of the draft.
        slot: The slot, by the entry left of it.
        rules: Who has a say. Processors and `prefix_allowed_tokens_fn` are asked anew.
    """
    barred = ", ".join(f"{who} {count}" for who, count in _barred_by(draft, row, slot, rules) if count)
    return ValueError(
        f"no token may be written into the chosen slot of row {int(draft.origins[row])}, and the row may not stop "
        f"since it {_why_it_goes_on(draft, row)}; tokens barred, each by the first who bars it: {barred}"
    )


def _barred_by(draft: Draft, row: int, slot: int, rules: TokenRules) -> list[tuple[str, int]]:
    """Return how many tokens each of the voices bars of those that the ones before it left."""
    acts_R = torch.arange(len(draft), device=draft.ids.device) == row
    slots_R, rows = torch.where(acts_R, slot, draft.last_slots()), torch.tensor([row], device=acts_R.device)
    sets = draft.token_sets(slots_R)
    heard = TokenRules(torch.zeros_like(rules.continuation_mask), LogitsProcessorList(), None)
    voices = [("pieces that continue a given word", {"continuation_mask": rules.continuation_mask})]
    voices.append(("bad_words_ids, sequence_bias and no_repeat_ngram_size", {"bans": rules.bans}))
    voices.append(("prefix_allowed_tokens_fn", {"allowed_tokens": rules.allowed_tokens}))
    for count, processor in enumerate(rules.processors, 1):
        voices.append((type(processor).__name__, {"processors": LogitsProcessorList(rules.processors[:count])}))
    who, counts, left = ["the vocabulary and the place of keywords"], [], len(rules.continuation_mask)
    for name, says in [*voices, (None, {})]:
        now = int((~token_scores(draft, slots_R, rows, heard, sets)[row].isneginf()).sum())
        counts.append(left - now)
        who, left, heard = [*who, name], now, heard._replace(**says)
    return list(zip(who, counts, strict=False))


def _why_it_goes_on(draft: Draft, row: int) -> str:
    budget = draft.budget
    written, deficit_G = int(budget.written[row].sum()), budget.deficit[row]
    lacks = []
    if written < budget.least:
        lacks.append(f"has {written} of min_new_tokens={budget.least}")
    for gap in deficit_G.nonzero().squeeze(1).tolist():
        lacks.append(
            f"lacks {int(deficit_G[gap])} of the {int(budget.minima[row, gap])} tokens that gap {gap} must get"
        )
    if draft.pending is not None and bool(draft.pending.owes[row]):
        lacks.append(f"has {int(draft.pending.left[row].sum())} pending keywords left")
    return " and ".join(lacks)
