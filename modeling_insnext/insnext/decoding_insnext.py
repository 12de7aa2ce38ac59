"""What sampling and beam search share: limits, token scores, the compiled step and the output."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .draft_insnext import Draft
from .slots_insnext import token_logits


@dataclass
class InsertionGenerateOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns when text is inserted.

    Attributes:
        sequences: The texts, int64 `[B, T']`, left to right, padded on the right.
        insertion_steps: The step, from 1, at which each token was written; -1 for given tokens, -2 for padding.
        encoded_tokens: Tokens that went through the network for each text, int64 `[B]`: given, written and re-encoded
            ones.
        reencoded_at: For each text the steps after which EBR encoded it anew.
        sequences_scores: With beams, the length-penalised log-probability of each text, float `[B]`.
    """

    sequences: torch.LongTensor
    insertion_steps: torch.LongTensor | None = None
    encoded_tokens: torch.LongTensor | None = None
    reencoded_at: list[list[int]] | None = None
    sequences_scores: torch.FloatTensor | None = None


def step_encoder(model, config, static: bool):
    """Return what encodes a step: compiled on GPUs with a static cache, as Transformers does, else the base model."""
    if not static or model.device.type != "cuda" or config.disable_compile:
        return model.model
    if not hasattr(model, "_compiled_encoder"):
        options = {} if config.compile_config is None else config.compile_config.to_dict()
        model._compiled_encoder = torch.compile(model.model, **options)
    return model._compiled_encoder


def token_limits(model, canvas, config) -> torch.Tensor:
    """Return how many tokens each row may write: `max_new_tokens`, or what room the model has."""
    given = canvas["attention_mask"].sum(1)
    limits = torch.full_like(given, config.max_new_tokens).minimum(model.config.max_position_embeddings - given)
    maxima = canvas["max_gap_tokens"]
    open_gaps = torch.zeros_like(maxima, dtype=torch.bool)
    gap_ids = torch.where(canvas["slot_mask"], canvas["gap_ids"], -1)
    for gap in range(maxima.shape[1]):
        open_gaps[:, gap] = (gap_ids == gap).any(1)
    takes = torch.where(open_gaps, torch.where(maxima < 0, config.max_new_tokens, maxima), 0).sum(1)
    shortest = int(takes.minimum(limits).min())
    if (config.min_new_tokens or 0) > shortest:
        raise ValueError(
            f"min_new_tokens must not exceed what the gaps can take, {shortest}, got {config.min_new_tokens}"
        )
    return limits


def token_scores(model, draft: Draft, rows, slots, processors, continuation_mask) -> torch.Tensor:
    """Return processed scores `[r, V]` of the token that goes into one slot of each of the given rows."""
    states = model.slot_head.token_state(draft.slots[rows, slots], draft.state[rows])
    scores = token_logits(states, model.lm_head, model.config.never_inserted)
    scores = scores.masked_fill(draft.words_end[rows, slots][:, None] & continuation_mask, -torch.inf)
    if len(processors):
        scores = processors(draft.around(rows, slots, model.config.pad_token_id or 0), scores)
    return scores


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
