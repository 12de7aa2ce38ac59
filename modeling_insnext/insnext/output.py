"""What `generate` returns when text is inserted."""

from dataclasses import dataclass

import torch
from transformers.generation import StopStringCriteria
from transformers.utils import ModelOutput

from .canvas import Canvas
from .draft import Draft
from .trace import InsertionTrace


@dataclass
class InsertionGenerateOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns when text is inserted.

    Attributes:
        sequences: The texts, int64 `[B, T']`, left to right, each behind the left padding that it was given with,
            padded on the right.
        insertion_steps: The step, from 1, at which each token was written; -1 for given tokens, -2 for padding.
        keyword_ids: With pending keywords, the keyword of its row that each token was written for, -1 for all others.
        encoded_tokens: Tokens that went through the network for each text, int64 `[B]`: given, written and re-encoded
            ones.
        reencoded_at: For each text the steps after which EBR encoded it anew.
        reencoded_tokens: For each text how many tokens EBR encoded anew each time.
        sequences_scores: With beams, the length-penalised log-probability of each text, float `[B]`; `-inf` for a text
            that is there again because there are no more.
    """

    sequences: torch.LongTensor
    insertion_steps: torch.LongTensor | None = None
    keyword_ids: torch.LongTensor | None = None
    encoded_tokens: torch.LongTensor | None = None
    reencoded_at: list[list[int]] | None = None
    reencoded_tokens: list[list[int]] | None = None
    sequences_scores: torch.FloatTensor | None = None

    def cut(self, stops: StopStringCriteria, given: torch.Tensor, pad: int) -> None:
        """Drop of every text what stands right of the first stop string, read from the left behind the given tokens.

        Args:
            stops: Says whether a text ends with a stop string.
            given: int64, given tokens of each canvas, which stand first.
            pad: What stands in the place of the dropped tokens.
        """
        copies = len(self.sequences) // len(given)
        for row, ids in enumerate(self.sequences):
            places = (self.insertion_steps[row] != -2).nonzero().squeeze(1)
            for place in places[int(given[row // copies]) :].tolist():
                if bool(stops(ids[None, : place + 1], None)[0]):
                    self.sequences[row, place + 1 :], self.insertion_steps[row, place + 1 :] = pad, -2
                    break
        width = int((self.insertion_steps != -2).any(0).nonzero().max()) + 1
        self.sequences, self.insertion_steps = self.sequences[:, :width], self.insertion_steps[:, :width]

    def trace(self, tokenizer, row: int = 0) -> InsertionTrace:
        """Return how the text of a row grew, to be shown in a terminal or saved as a page."""
        return InsertionTrace.from_output(self, tokenizer, row)


def stop_strings(config, tokenizer, canvas: Canvas) -> StopStringCriteria | None:
    """Return what finds the stop strings of a `generate` call in a finished text, None if there are none.

    Raises:
        ValueError: If there is no tokenizer, or more than the end of a prompt is open, or there are beams.
    """
    if config.stop_strings is None:
        if tokenizer is not None:
            raise ValueError("tokenizer is read with stop_strings only, got it alone")
        return None
    if tokenizer is None:
        raise ValueError("stop_strings needs tokenizer=..., which reads them")
    if canvas.pending_ids is not None:
        raise ValueError(
            "stop_strings cut what stands right of them, which may be a pending keyword; use ordered=True"
        )
    if config.num_beams > 1:
        raise ValueError(f"stop_strings cut a text once it is finished and ranked, got num_beams={config.num_beams}")
    last_BT = torch.arange(canvas.slot_mask.shape[1], device=canvas.slot_mask.device) == canvas.lengths[:, None] - 1
    inside_BT = canvas.slot_mask & ~last_BT
    if bool(inside_BT.any()):
        raise ValueError(
            "stop_strings cut what stands right of them, so nothing given may: only the last slot may be open, row "
            f"{int(inside_BT.nonzero()[0, 0])} has others; use stopping_criteria"
        )
    return StopStringCriteria(tokenizer, config.stop_strings)


def finished_row(draft: Draft, row: int) -> dict:
    """Return a row as it goes into the output."""
    length = int(draft.lengths[row])
    order = draft.ranks[row, :length].argsort()
    return {
        "margin": int(draft.margins[row]),
        "ids": draft.ids[row, :length][order],
        "steps": draft.steps[row, :length][order],
        "keywords": draft.keywords[row, :length][order],
        "encoded": int(draft.encoded_tokens[row]),
        "reencoded_at": list(draft.reencoded_at[row]),
        "reencoded_tokens": list(draft.reencoded_tokens[row]),
    }


def collect(results: list[dict], draft: Draft) -> InsertionGenerateOutput:
    """Return finished texts of a draft as one output, each behind its margin.

    What follows a prompt then begins at the width of the prompts, as pipelines and `sequences[:, width:]` expect.
    """
    width = max(result["margin"] + len(result["ids"]) for result in results)
    device = draft.ids.device
    sequences = torch.full((len(results), width), draft.pad, device=device)
    steps, keywords = torch.full_like(sequences, -2), torch.full_like(sequences, -1)
    for row, result in enumerate(results):
        place = slice(result["margin"], result["margin"] + len(result["ids"]))
        sequences[row, place], steps[row, place] = result["ids"], result["steps"]
        keywords[row, place] = result["keywords"]
    scores = [result["score"] for result in results if "score" in result]
    return InsertionGenerateOutput(
        sequences=sequences,
        insertion_steps=steps,
        keyword_ids=None if draft.pending is None else keywords,
        encoded_tokens=torch.tensor([result["encoded"] for result in results], device=device),
        reencoded_at=[result["reencoded_at"] for result in results],
        reencoded_tokens=[result["reencoded_tokens"] for result in results],
        sequences_scores=torch.tensor(scores, device=device) if scores else None,
    )
