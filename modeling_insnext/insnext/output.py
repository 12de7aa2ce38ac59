"""What `generate` returns when text is inserted."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .draft import Draft
from .trace import InsertionTrace


@dataclass
class InsertionGenerateOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns when text is inserted.

    Attributes:
        sequences: The texts, int64 `[B, T']`, left to right, each behind the left padding that it was given with,
            padded on the right.
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


def finished_row(draft: Draft, row: int) -> dict:
    """Return a row as it goes into the output."""
    length = int(draft.lengths[row])
    order = draft.ranks[row, :length].argsort()
    return {
        "margin": int(draft.margins[row]),
        "ids": draft.ids[row, :length][order],
        "steps": draft.steps[row, :length][order],
        "encoded": int(draft.encoded_tokens[row]),
        "reencoded_at": list(draft.reencoded_at[row]),
    }


def collect(results: list[dict], pad: int, device) -> InsertionGenerateOutput:
    """Return finished texts as one output, each behind its margin.

    What follows a prompt then begins at the width of the prompts, as pipelines and `sequences[:, width:]` expect.
    """
    width = max(result["margin"] + len(result["ids"]) for result in results)
    sequences = torch.full((len(results), width), pad, device=device)
    steps = torch.full_like(sequences, -2)
    for row, result in enumerate(results):
        place = slice(result["margin"], result["margin"] + len(result["ids"]))
        sequences[row, place], steps[row, place] = result["ids"], result["steps"]
    scores = [result["score"] for result in results if "score" in result]
    return InsertionGenerateOutput(
        sequences=sequences,
        insertion_steps=steps,
        encoded_tokens=torch.tensor([result["encoded"] for result in results], device=device),
        reencoded_at=[result["reencoded_at"] for result in results],
        sequences_scores=torch.tensor(scores, device=device) if scores else None,
    )
