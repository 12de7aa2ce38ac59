"""What sampling and beam search share: limits, token scores, the compiled step and the output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList
from transformers.utils import ModelOutput

from .draft import Draft
from .trace import InsertionTrace


@dataclass
class InsertionGenerateOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns when text is inserted.

    Attributes:
        sequences: The texts, int64 `[B, T']`, left to right, padded on the right.
        insertion_steps: The step, from 1, at which each token was written; -1 for given tokens, -2 for padding.
        encoded_tokens: Tokens that went through the network for each text, int64 `[B]`: given, written and re-encoded
            ones.
        reencoded_at: For each text the steps after which EBR encoded it anew.
        sequences_scores: With beams, the length-penalised log-probability of each text, float `[B]`; `-inf` for a text
            that is there again because there are no more.
    """

    sequences: torch.LongTensor
    insertion_steps: torch.LongTensor | None = None
    encoded_tokens: torch.LongTensor | None = None
    reencoded_at: list[list[int]] | None = None
    sequences_scores: torch.FloatTensor | None = None

    def trace(self, tokenizer, row: int = 0) -> InsertionTrace:
        """Return how the text of a row grew, to be shown in a terminal or saved as a page."""
        return InsertionTrace.from_output(self, tokenizer, row)


class TokenRules(NamedTuple):
    """What has a say in the choice of a token beside the model.

    Attributes:
        continuation_mask: bool `[V]`, pieces that glue to the word on their left; barred right of a given word.
        processors: Processors of the token scores.
        allowed_tokens: `prefix_allowed_tokens_fn`, or None.
    """

    continuation_mask: torch.Tensor
    processors: LogitsProcessorList
    allowed_tokens: Callable[[int, torch.Tensor], list[int]] | None = None


def step_encoder(model, config, static: bool):
    """Return what encodes: with a static cache, on GPUs or if a `compile_config` asks, single tokens run compiled."""
    asked = config.compile_config is not None
    if not static or config.disable_compile or not (asked or model.device.type == "cuda"):
        return model.model
    if not hasattr(model, "_compiled_encoder"):
        options = config.compile_config.to_dict() if asked else {}
        # set past nn.Module, which would take it for a submodule and save it
        object.__setattr__(model, "_compiled_encoder", torch.compile(model.model, **options))

    def encode(input_ids, **kwargs):
        # blocks have a length of their own each time, which would be compiled anew
        encoder = model._compiled_encoder if input_ids.shape[1] == 1 else model.model
        return encoder(input_ids=input_ids, **kwargs)

    return encode


def token_limits(model, canvas, config) -> torch.Tensor:
    """Return how many tokens each row may write: `max_new_tokens` or up to `max_length`, and what the model holds."""
    given = canvas["attention_mask"].sum(1)
    limits = model.config.max_position_embeddings - given
    limits = (
        limits.clamp_max(config.max_new_tokens)
        if config.max_length is None
        else limits.minimum(config.max_length - given)
    )
    maxima = canvas["max_gap_tokens"]
    open_gaps = torch.zeros_like(maxima, dtype=torch.bool)
    gap_ids = torch.where(canvas["slot_mask"], canvas["gap_ids"], -1)
    for gap in range(maxima.shape[1]):
        open_gaps[:, gap] = (gap_ids == gap).any(1)
    takes = torch.where(open_gaps, torch.where(maxima < 0, limits[:, None], maxima), 0).sum(1)
    shortest = int(takes.minimum(limits).min())
    if (config.min_new_tokens or 0) > shortest:
        raise ValueError(
            f"min_new_tokens must not exceed what the gaps can take, {shortest}, got {config.min_new_tokens}"
        )
    return limits


def token_scores(model, draft: Draft, rows, slots, rules: TokenRules) -> torch.Tensor:
    """Return processed scores `[r, V]` of the token that goes into one slot of each of the given rows."""
    states = model.slot_head.token_state(draft.slots[rows, slots], draft.state[rows])
    scores = model.token_logits(states)
    scores = scores.masked_fill(draft.words_end[rows, slots][:, None] & rules.continuation_mask, -torch.inf)
    if not rules.processors and rules.allowed_tokens is None:
        return scores
    seen = draft.around(rows, slots, model.config.pad_token_id or 0)
    barred = scores.isneginf()
    if rules.allowed_tokens is not None:
        barred = barred | ~_allowed(rules.allowed_tokens, draft, rows, seen, scores)
        scores = scores.masked_fill(barred, -torch.inf)
    # no processor brings back what is barred
    return rules.processors(seen, scores).masked_fill(barred, -torch.inf)


def _allowed(allowed_tokens, draft: Draft, rows, seen, scores) -> torch.Tensor:
    allowed = torch.zeros_like(scores, dtype=torch.bool)
    lengths, origins = draft.lengths[rows].tolist(), draft.origins[rows].tolist()
    for index, (length, origin) in enumerate(zip(lengths, origins, strict=True)):
        allowed[index, allowed_tokens(origin, seen[index, -length:])] = True
    return allowed


def padding_token(model, config) -> int:
    """Return what stands behind the shorter texts of an output."""
    return next((token for token in (config.pad_token_id, model.config.pad_token_id) if token is not None), 0)


def nothing_to_write(row: int) -> ValueError:
    """Return the error for a slot in which every token is barred."""
    return ValueError(
        f"no token may be written into the chosen slot of row {row}: logits processors, prefix_allowed_tokens_fn, "
        "suppressed and continuing pieces leave none"
    )


def finished_row(draft: Draft, row: int) -> dict:
    """Return a row as it goes into the output."""
    length = int(draft.lengths[row])
    order = draft.ranks[row, :length].argsort()
    return {
        "ids": draft.ids[row, :length][order],
        "steps": draft.steps[row, :length][order],
        "encoded": int(draft.encoded_tokens[row]),
        "reencoded_at": draft.reencoded_at[row],
    }


def collect(results: list[dict], pad: int, device) -> InsertionGenerateOutput:
    """Return finished texts as one padded output."""
    width = max(len(result["ids"]) for result in results)
    sequences = torch.full((len(results), width), pad, device=device)
    steps = torch.full_like(sequences, -2)
    for row, result in enumerate(results):
        sequences[row, : len(result["ids"])] = result["ids"]
        steps[row, : len(result["ids"])] = result["steps"]
    scores = [result["score"] for result in results if "score" in result]
    return InsertionGenerateOutput(
        sequences=sequences,
        insertion_steps=steps,
        encoded_tokens=torch.tensor([result["encoded"] for result in results], device=device),
        reencoded_at=[result["reencoded_at"] for result in results],
        sequences_scores=torch.tensor(scores, device=device) if scores else None,
    )


def keep_left_padding(output: InsertionGenerateOutput, attention_mask: torch.Tensor | None, pad: int) -> None:
    """Put each text behind the padding that stood left of its given tokens.

    What follows a prompt then begins at the width of the prompts, as pipelines and `sequences[:, width:]` expect.
    """
    if attention_mask is None or attention_mask[:, 0].all():
        return
    left_B = attention_mask.to(output.sequences.device).long().argmax(1)
    left_B1 = left_B.repeat_interleave(len(output.sequences) // len(left_B))[:, None]
    length_B1 = (output.insertion_steps != -2).sum(1, keepdim=True)
    index_BT = torch.arange(int((left_B1 + length_B1).max()), device=left_B.device) - left_B1
    inside_BT = (index_BT >= 0) & (index_BT < length_B1)
    index_BT = index_BT.clamp(0, output.sequences.shape[1] - 1)
    output.sequences = torch.where(inside_BT, output.sequences.gather(1, index_BT), pad)
    output.insertion_steps = torch.where(inside_BT, output.insertion_steps.gather(1, index_BT), -2)
