"""One step of writing, shared by sampling and beams.

    draft.choices(config)      logits of the slots and of STOP
    token_scores(draft, ...)   scores of the token in a chosen slot
    draft.write(...)           the token stands in the text
    draft.encode(config)       the network has read it; EBR

Shape suffixes: R rows, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList, generation

from .bans import Bans
from .draft import Draft
from .pending import TokenSets


# what reads the end of a text only -> what to use where a text grows in any place
USE_INSTEAD = {
    generation.NoBadWordsLogitsProcessor: "bad_words_ids",
    generation.SequenceBiasLogitsProcessor: "sequence_bias",
    generation.NoRepeatNGramLogitsProcessor: "no_repeat_ngram_size",
    generation.MinLengthLogitsProcessor: "min_new_tokens",
    generation.MinNewTokensLengthLogitsProcessor: "min_new_tokens",
    generation.PrefixConstrainedLogitsProcessor: "prefix_allowed_tokens_fn",
    generation.ForcedBOSTokenLogitsProcessor: "a canvas with the token as given text",
    generation.ForcedEOSTokenLogitsProcessor: "a canvas with the token as given text",
    generation.SuppressTokensAtBeginLogitsProcessor: "suppress_tokens",
    generation.ExponentialDecayLengthPenalty: "max_new_tokens",
    generation.EncoderNoRepeatNGramLogitsProcessor: "no_repeat_ngram_size",
    generation.WatermarkLogitsProcessor: "left_to_right=True",
    generation.SynthIDTextWatermarkLogitsProcessor: "left_to_right=True",
    generation.StopStringCriteria: "stop_strings",
    generation.EosTokenCriteria: "max_new_tokens or bounds of the gaps",
}


def check_stock(objects: Iterable) -> None:
    """Refuse processors and criteria of Transformers that read the end of a text only.

    Raises:
        ValueError: If there is one; the message says what to use.
    """
    for each in objects:
        if type(each) in USE_INSTEAD:
            raise ValueError(
                f"{type(each).__name__} reads the end of a text, and text is inserted in any place: use "
                f"{USE_INSTEAD[type(each)]}"
            )


class TokenRules(NamedTuple):
    """What has a say in the choice of a token beside the model.

    Attributes:
        continuation_mask: bool `[V]`, pieces that glue to the word on their left; barred right of a given word.
        processors: Processors of the token scores.
        bans: Sequences that are barred or biased, or None.
        allowed_tokens: `prefix_allowed_tokens_fn`, or None.
        keyword_bias: What is added to the scores of tokens that begin a pending keyword.
    """

    continuation_mask: torch.Tensor
    processors: LogitsProcessorList
    bans: Bans | None
    allowed_tokens: Callable[[int, torch.Tensor], list[int]] | None = None
    keyword_bias: float = 0.0


def token_scores(
    draft: Draft, slots: torch.Tensor, rows: torch.Tensor, rules: TokenRules, sets: TokenSets | None
) -> torch.Tensor:
    """Return processed scores `[R, V]` of the token that goes into one slot of each row; `-inf` in rows that rest.

    Processors are given all rows: of one that rests its text from left to right and scores of 0. Where a row must
    write a token of a pending keyword, no one but the model has a say: it is given text.

    Args:
        draft: The texts.
        slots: int64 `[R]`.
        rows: int64, those that write.
        rules: Who has a say.
        sets: `draft.token_sets(slots)`.
    """
    model = draft.model
    states = model.slot_head.token_state(draft.slots[rows, slots[rows]], draft.state[rows])
    scores = model.token_logits(states)
    plain, barred = scores, draft.words_end[rows, slots[rows]][:, None] & rules.continuation_mask
    if sets is not None:
        barred = (barred | sets.out_of_place[rows]) & ~sets.go_on[rows]
    scores = scores.masked_fill(barred, -torch.inf)
    if rules.bans is not None and rules.bans.acts and len(rows):
        texts = zip(scores, draft.texts_as_lists(rows), draft.ranks[rows, slots[rows]].tolist(), strict=True)
        scores = torch.stack([rules.bans.add_to(scores_V, text, rank + 1) for scores_V, text, rank in texts])
    all_act = len(rows) == len(draft)
    acts = torch.zeros_like(draft.running).index_fill(0, rows, True)
    scores_RV = scores if all_act else scores.new_zeros(len(draft), scores.shape[1]).index_copy(0, rows, scores)
    if rules.processors or rules.allowed_tokens is not None:
        seen = draft.around(slots if all_act else torch.where(acts, slots, draft.last_slots()))
        if rules.allowed_tokens is not None:
            scores_RV = scores_RV.masked_fill(_forbidden(draft, rows.tolist(), seen, scores_RV, rules), -torch.inf)
        barred = scores_RV.isneginf()
        # no processor brings back what is barred
        scores_RV = rules.processors(seen, scores_RV).masked_fill(barred, -torch.inf)
    if sets is not None:
        scores_RV = scores_RV + rules.keyword_bias * sets.begin
        plain_RV = torch.zeros_like(scores_RV).index_copy(0, rows, plain)
        scores_RV = torch.where(sets.is_forced, plain_RV.masked_fill(~sets.forced, -torch.inf), scores_RV)
    return scores_RV if all_act else scores_RV.masked_fill(~acts[:, None], -torch.inf)


def _forbidden(draft, rows, seen, scores, rules: TokenRules) -> torch.Tensor:
    forbidden = torch.zeros_like(scores, dtype=torch.bool)
    lengths, origins = draft.lengths.tolist(), draft.origins.tolist()
    for row in rows:
        forbidden[row] = True
        forbidden[row, rules.allowed_tokens(origins[row], seen[row, -lengths[row] :])] = False
    return forbidden
