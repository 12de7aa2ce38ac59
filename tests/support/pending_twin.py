"""A text that grows around pending keywords, by the definition: its history replayed, its whole text encoded anew."""

from itertools import chain
from typing import NamedTuple

import torch

from tests.support.generation_twins import TextTwin


class Choice(NamedTuple):
    """What may be done next, and its log-probability; `slot` -1 stops."""

    slot: int
    token: int
    log_p: float


class PendingTwin:
    """One text with one gap that is all of it, and keywords of several forms.

    Args:
        model: A tiny model.
        ids: Given tokens, all slots open.
        keywords: Of each keyword its forms, tuples of tokens.
        limit: Most tokens that may be written.
        glues: Tokens that glue to the left.
        writes: (slot, token) pairs of the steps so far.
        bias: What draws add to the scores of tokens that begin a keyword.
    """

    def __init__(self, model, ids, keywords, limit, glues, writes=(), bias=0.0):
        self.twin = TextTwin(model, ids, range(len(ids)))
        self.keywords, self.limit, self.glues, self.bias = keywords, limit, glues, bias
        self.left = list(range(len(keywords)))
        self.closed, self.protected, self.written = set(), set(), 0
        # of the form that is being written: its tokens, where the next goes, which forms it may become, who is whole
        self.pieces, self.entry, self.ways, self.whole = (), None, [], None
        for slot, token in writes:
            self.write(slot, token)

    def shortest(self, without=None):
        return sum(min(map(len, self.keywords[k])) for k in self.left if k != without)

    def fits(self, keyword, form):
        return self.written + len(form) + self.shortest(without=keyword) <= self.limit

    def begins(self, slot):
        """Return the (keyword, form) pairs that may begin in a slot."""
        place = self.twin.text.index(slot) + 1
        right = self.twin.ids[self.twin.text[place]] if place < len(self.twin.text) else None
        if right in self.glues or slot in self.closed:
            return []
        return [(k, form) for k in self.left for form in self.keywords[k] if self.fits(k, form)]

    def goes_on(self, slot):
        return [way for way in self.ways if slot == self.entry]

    def write(self, slot, token):
        cut = len(self.pieces)
        longer = [way for way in self.goes_on(slot) if way[1][cut] == token]
        new = [way for way in self.begins(slot) if way[1][0] == token]
        entry = len(self.twin.ids)
        self.twin.insert([(slot, token)], entry)
        self.written += 1
        if longer:
            if self.whole is not None:
                self.left = sorted([*self.left, self.whole])
            self.closed.add(slot)
            self.pieces, ways = (*self.pieces, token), longer
        else:
            self.pieces, ways = (token,), new
        ended = [k for k, form in ways if form == self.pieces]
        self.whole = min(ended, default=None)
        if ended:
            self.left.remove(self.whole)
            self.protected.add(entry)
        self.ways = [way for way in ways if len(way[1]) > len(self.pieces)]
        self.entry = entry if self.ways else None

    @property
    def busy(self):
        return bool(self.ways) and self.whole is None

    def scores(self):
        """Return logits of the slots, of STOP, and log p(token | slot) over the whole vocabulary."""
        slots, stop, tokens = self.twin.scores()
        return slots, stop, tokens.log_softmax(1)

    def of_keywords(self, slot):
        """Return the tokens that go on with a form, or begin one, in a slot."""
        on = {form[len(self.pieces)] for _, form in self.goes_on(slot)}
        return on | (set() if self.busy else {form[0] for _, form in self.begins(slot)})

    def words(self, slot, vocabulary):
        """Return the tokens that may be written in a slot as any word, or as a part of one."""
        if self.busy or self.written + 1 + self.shortest() > self.limit or slot in self.closed:
            return set()
        if self.left and len(self.twin.ids) == 1:
            return set()
        first = {form[0] for k in self.left for form in self.keywords[k]}
        glued = self.glues if slot in self.protected else set()
        return set(vocabulary) - first - set(glued) - self.of_keywords(slot)

    def open_slots(self):
        roomy = self.written + 1 + self._rest() <= self.limit
        slots = [slot for slot in range(len(self.twin.ids)) if slot not in self.closed and roomy]
        if self.ways and self.entry not in slots:
            slots.append(self.entry)
        return slots or [slot for slot in range(len(self.twin.ids)) if self.begins(slot)]

    def _rest(self):
        if not self.busy:
            return self.shortest()
        return min(len(form) - len(self.pieces) + self.shortest(without=k) for k, form in self.ways)

    def counted(self, vocabulary):
        """Return all choices as scores count them: slots among the open, tokens of keywords by the model alone."""
        slots, stop, tokens = self.scores()
        places = {slot: float(slots[slot]) for slot in self.open_slots()}
        if not self.left:
            places[-1] = float(stop)
        total = torch.tensor(list(places.values()), dtype=torch.float64).logsumexp(0)
        choices = [Choice(-1, -1, places[-1] - float(total))] if not self.left else []
        for slot, logit in places.items():
            if slot < 0 or (self.busy and slot != self.entry):
                continue
            mine, words = self.of_keywords(slot), self.words(slot, vocabulary)
            may = tokens[slot, sorted(mine | words)].logsumexp(0)
            for token in sorted(mine | words):
                log_p = float(tokens[slot, token] - (0 if token in mine else may))
                choices.append(Choice(slot, token, logit - float(total) + log_p))
        return choices

    def roomy(self, vocabulary):
        """Return the slots in which any word may be written, or the form that is being written goes on."""
        return [slot for slot in self.open_slots() if self.words(slot, vocabulary) or self.goes_on(slot)]

    def drawn(self, vocabulary):
        """Return all choices as sampling draws them: STOP while something is left begins a keyword."""
        slots, stop, tokens = self.scores()
        if self.busy:
            return self._in_slot(self.entry, 0.0, tokens, vocabulary)
        roomy = self.roomy(vocabulary)
        places = torch.stack([*(slots[slot] for slot in roomy), stop]).log_softmax(0).tolist()
        choices = [self._in_slot(slot, place, tokens, vocabulary) for slot, place in zip(roomy, places, strict=False)]
        if not self.left:
            return [*chain(*choices), Choice(-1, -1, places[-1])]
        return [*chain(*choices), *self._instead_of_stop(places[-1], slots, tokens)]

    def greedy(self, vocabulary):
        """Return the largest slot or STOP, then the largest token; instead of STOP the likeliest pair of both."""
        slots, stop, tokens = self.scores()
        best = max([-1, *self.roomy(vocabulary)], key=lambda slot: float(stop if slot < 0 else slots[slot]))
        if self.busy or best >= 0:
            choices = self._in_slot(self.entry if self.busy else best, 0.0, tokens, vocabulary)
        else:
            choices = self._instead_of_stop(0.0, slots, tokens) if self.left else [Choice(-1, -1, 0.0)]
        return max(choices, key=lambda choice: choice.log_p)[:2]

    def _in_slot(self, slot, log_p, tokens, vocabulary):
        may = sorted(self.of_keywords(slot) | self.words(slot, vocabulary))
        scores = self.biased(slot, may, tokens).log_softmax(0)
        return [Choice(slot, token, log_p + float(p)) for token, p in zip(may, scores, strict=True)]

    def biased(self, slot, may, tokens):
        """Return the scores of the tokens of an ordinary step."""
        first = {form[0] for _, form in self.begins(slot)}
        lift = [self.bias if token in first and self.words(slot, may) else 0.0 for token in may]
        return tokens[slot, may] + torch.tensor(lift, dtype=tokens.dtype)

    def _instead_of_stop(self, log_p, slots, tokens):
        pairs = sorted({(slot, form[0]) for slot in range(len(self.twin.ids)) for _, form in self.begins(slot)})
        # p(slot) among these slots; what it is divided by is the same for all pairs
        joint = torch.stack([slots[slot] + tokens[slot, token] for slot, token in pairs]).log_softmax(0)
        return [Choice(*pair, log_p + float(p)) for pair, p in zip(pairs, joint, strict=True)]
