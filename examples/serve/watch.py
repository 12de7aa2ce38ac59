"""What a step wrote, and who stops: a logits processor that sees where, a stopping criterion that sees what.

A processor is shown the text right of the slot, then left of it (docs/writing.md), so BOS, which stands nowhere else,
tells the place. From left to right the place is the end.

Shape suffixes: R rows, T tokens, V vocabulary.
"""

import time

import torch
from transformers import LogitsProcessor, StoppingCriteria

from .job import Event, Insertion, Row
from .texts import decoded


class Watch:
    """Follows the rows of one batch.

    Args:
        rows: The rows, in the order of the batch.
        settings: How they are written.
        tokenizer: Tokenizer of the model.
        ends: Ids that end a text which is written from left to right.
    """

    def __init__(self, rows: list[Row], settings, tokenizer, ends: set[int]):
        self.rows, self.settings, self.tokenizer, self.ends = rows, settings, tokenizer, ends
        self.bos = tokenizer.bos_token_id
        self.step = 0
        self.scores_RV: torch.Tensor | None = None
        self.places: list[int] = []
        self.before, self.after = Before(self), After(self)

    def see(self, seen_RT: torch.Tensor, scores_RV: torch.Tensor) -> None:
        """Keep the scores of this step, and where its tokens go."""
        self.step += 1
        self.scores_RV = scores_RV
        if self.settings.insert:
            from_right_R = (seen_RT == self.bos).flip(1).int().argmax(1)
            self.places = (from_right_R + 1).tolist()
        else:
            self.places = [len(row.tokens) for row in self.rows]

    def take(self, texts_RT: torch.Tensor, scores_RV: torch.Tensor) -> torch.Tensor:
        """Take in the tokens of this step; return which rows end, bool `[R]`."""
        # a row that chose STOP has no scores
        wrote = (~scores_RV.isneginf().all(1)).tolist() if self.settings.insert else [True] * len(self.rows)
        width = texts_RT.shape[1]
        # a row that rests may have its slot at the end of the longest text
        places = (
            [min(place, width - 1) for place in self.places] if self.settings.insert else [width - 1] * len(self.rows)
        )
        tokens = texts_RT.gather(1, torch.tensor(places, device=texts_RT.device)[:, None])[:, 0].tolist()
        for index, row in enumerate(self.rows):
            if row.finish is None:
                if not wrote[index] or (not self.settings.insert and tokens[index] in self.ends):
                    row.finish = "stop"
                else:
                    row.insert(self._insertion(index, tokens[index]))
                self._tell(row)
        return torch.tensor([row.finish is not None for row in self.rows], device=texts_RT.device)

    def _insertion(self, index: int, token: int) -> Insertion:
        tops, log_p, top = self.rows[index].job.tops, 0.0, ()
        if tops is not None:
            log_p_V = self.scores_RV[index].float().log_softmax(-1)
            log_p = float(log_p_V[token])
            best = log_p_V.topk(min(tops, len(log_p_V)))
            top = tuple(
                (index, value)
                for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                if value > -torch.inf
            )
        return Insertion(self.step, self.places[index], token, log_p, top)

    def _tell(self, row: Row) -> None:
        """Decide whether the row ends, and tell its job what it wants to know."""
        job, grows_right = row.job, self.settings.grows_right
        wrote = bool(row.written) and row.written[-1].step == self.step
        if row.finish is None and (job.cancelled.is_set() or len(row.written) >= self.settings.max_tokens
                                   or time.monotonic() > job.deadline or self._is_late(row)):  # fmt: skip
            row.finish = "length"
        if job.pieces == "insertions" and wrote:
            job.tell(Event("inserted", row, insertion=row.written[-1]))
        # a text that grows in any place has no end to look at before it is finished
        if row.finish is not None or (grows_right and (job.pieces == "text" or any(job.cuts[:2]))):
            row.text = row.settle(self.tokenizer)
            if job.pieces == "text" and (row.text[row.shown :] or wrote):
                job.tell(Event("piece", row, row.text[row.shown :], row.written[-1] if wrote else None))
                row.shown = len(row.text)
        if row.finish is not None:
            job.end(row)

    def _is_late(self, row: Row) -> bool:
        """Whether a row that has a line may write no longer."""
        seconds = row.job.cuts.line_seconds
        if seconds is None or time.monotonic() - row.started <= seconds:
            return False
        return "\n" in decoded(self.tokenizer, row.prepared, row.tokens, len(row.written))


class Before(LogitsProcessor):
    """Shows the scores to a watch and leaves them as they are."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.watch.see(input_ids, scores)
        return scores


class After(StoppingCriteria):
    """Shows the texts to a watch, which says what ends."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return self.watch.take(input_ids, scores)
