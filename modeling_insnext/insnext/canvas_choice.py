"""What the model chooses before it writes: the order of keywords and, of keywords with alternatives, the form.

Shape suffixes: R rows, S places, V vocabulary.
"""

from itertools import chain
from typing import NamedTuple

import torch

from .budget import Budget
from .canvas import Canvas
from .draft import Draft


class Chosen(NamedTuple):
    """Which of the keywords of a row, and which of its forms."""

    keyword: int
    form: int


@torch.no_grad()
def choose_keywords(
    model, bos: int, keywords: list[list[list[int]]], ordered: bool, continuation_mask: torch.Tensor
) -> list[Chosen]:
    """Return the keywords of a text from left to right, each in one of its forms.

    Args:
        model: An `InsNextForInsertionLM`.
        bos: Id of the token in front.
        keywords: Of each keyword the token ids of its forms.
        ordered: Whether they keep their order. If not, each in turn goes to where p(slot) p(first token | slot) is
            largest over places and forms.
        continuation_mask: bool `[V]`, pieces that glue to the word on their left.
    """
    if ordered:
        order = [Chosen(index, 0) for index in range(len(keywords))]
    else:
        order = _likeliest_order(model, bos, keywords)
    return _likeliest_forms(model, bos, keywords, order, continuation_mask)


def _likeliest_order(model, bos, keywords) -> list[Chosen]:
    order = []
    for new, forms in enumerate(keywords):
        placed = [keywords[index][form] for index, form in order]
        ids = [bos, *chain.from_iterable(placed)]
        places = torch.tensor([0] + [len(phrase) for phrase in placed], device=model.device).cumsum(0)
        draft = _draft_of(model, [ids])
        allowed = torch.zeros(1, len(ids), dtype=torch.bool, device=model.device)
        allowed[0, places] = True
        slot_S = draft.slot_scores(allowed, may_stop=torch.zeros_like(allowed[:, 0])).log_softmax(1)[0, places]
        token_SV = _token_log_p(draft, torch.zeros_like(places), places)
        scores = slot_S[:, None] + token_SV[:, [form[0] for form in forms]]
        place, form = divmod(int(scores.argmax()), len(forms))
        order.insert(place, Chosen(new, form))
    return order


def _likeliest_forms(model, bos, keywords, order: list[Chosen], continuation_mask) -> list[Chosen]:
    """Go through the places once, left to right; at each the form is chosen that is likeliest between the others."""
    order = list(order)
    for place, (index, _) in enumerate(order):
        forms = keywords[index]
        if len(forms) > 1:
            left = [bos, *chain.from_iterable(keywords[k][form] for k, form in order[:place])]
            right = list(chain.from_iterable(keywords[k][form] for k, form in order[place + 1 :]))
            scores = _form_log_p(model, left, forms, right, continuation_mask.to(model.device))
            order[place] = Chosen(index, max(range(len(forms)), key=scores.__getitem__))
    return order


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


__all__ = ["Chosen", "choose_keywords"]
