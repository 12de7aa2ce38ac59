"""What the model chooses before it writes: of keywords with alternatives whose order is given, the form.

Shape suffixes: R rows, V vocabulary.
"""

from itertools import chain

import torch

from .budget import Budget
from .canvas import Canvas
from .draft import Draft


@torch.no_grad()
def choose_forms(model, bos: int, keywords: list[list[list[int]]], continuation_mask: torch.Tensor) -> list[int]:
    """Return which of its forms each keyword of a text has, by its number.

    The first forms stand first; then, from left to right, each keyword gets the form that is likeliest between the
    others as they are by then.

    Args:
        model: An `InsNextForInsertionLM`.
        bos: Id of the token in front.
        keywords: Of each keyword, in the order of the text, the token ids of its forms.
        continuation_mask: bool `[V]`, pieces that glue to the word on their left.
    """
    chosen = [0] * len(keywords)
    for place, forms in enumerate(keywords):
        if len(forms) > 1:
            standing = [keyword[form] for keyword, form in zip(keywords, chosen, strict=True)]
            left = [bos, *chain.from_iterable(standing[:place])]
            right = list(chain.from_iterable(standing[place + 1 :]))
            scores = _form_log_p(model, left, forms, right, continuation_mask.to(model.device))
            chosen[place] = max(range(len(forms)), key=scores.__getitem__)
    return chosen


def _form_log_p(model, left, forms, right, continuation_mask) -> list[float]:
    """Return of each form log p that it is written into the slot between two texts, piece by piece, and ends there.

    A form ends where no piece follows that would glue to it; without that a form that begins like a longer one would
    always be the likelier of the two.
    """
    beginnings = list(dict.fromkeys(tuple(form[:cut]) for form in forms for cut in range(len(form) + 1)))
    draft = _draft_of(model, [[*left, *beginning, *right] for beginning in beginnings])
    slots = torch.tensor([len(left) + len(beginning) - 1 for beginning in beginnings], device=model.device)
    token_RV = _token_log_p(draft, torch.arange(len(beginnings), device=model.device), slots)
    ends_R = token_RV.masked_fill(continuation_mask, -torch.inf).logsumexp(1)
    row_of = {beginning: row for row, beginning in enumerate(beginnings)}
    return [
        float(sum(token_RV[row_of[tuple(form[:cut])], piece] for cut, piece in enumerate(form)))
        + float(ends_R[row_of[tuple(form)]])
        for form in forms
    ]


def _draft_of(model, texts: list[list[int]]) -> Draft:
    """Return these texts, encoded as given tokens."""
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=model.device)
    canvas = Canvas.from_ids(ids, mask)
    return Draft(model, canvas, Budget(canvas, torch.zeros_like(canvas.lengths)))


def _token_log_p(draft: Draft, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Return log p(token | slot), `[R, V]`, of one slot in each of the rows."""
    states = draft.model.slot_head.token_state(draft.slots[rows, slots], draft.state[rows])
    return draft.model.token_logits(states).log_softmax(-1)


__all__ = ["choose_forms"]
