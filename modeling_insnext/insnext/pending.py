"""Keywords that are still to be written: where a form may begin, how one that was begun goes on, when it is whole.

A keyword has forms, a form has tokens. While a keyword waits, its forms may begin wherever there is room for a whole
one and the word on the right does not glue to it; the token that a form begins with means the keyword there, never
another word. What was begun goes on in its place, token by token, and at the end of a form the keyword stands, closed
inside and protected at its right edge. Where a longer form begins like a shorter one ("look", "looks"), the next step
decides: the next token of the longer one in that place goes on with it, anything else leaves the shorter one. A text
of BOS alone says nothing of its subject yet, so it begins with a keyword.

Shape suffixes: R rows, G gaps, K keywords, F forms, L tokens of a form, S slots, V vocabulary.
"""

from typing import NamedTuple

import torch

from .canvas import Canvas


PER_ROW = ("forms", "lengths", "left", "matches", "written", "entry", "ended", "wanted")


class Move(NamedTuple):
    """A token of a keyword that may be written, and log p(token | slot)."""

    row: int
    slot: int
    token: int
    begins: bool
    log_p: float


class TokenSets(NamedTuple):
    """What tokens mean in one slot of each row; bool `[R, V]`.

    Attributes:
        begin: They begin a form that may stand there.
        go_on: They go on with the form that is being written there.
        out_of_place: They begin a form of a keyword that is left, and none may stand there.
        forced: Those of a keyword that the row has to write now.
        is_forced: `[R, 1]`, rows that have to.
    """

    begin: torch.Tensor
    go_on: torch.Tensor
    out_of_place: torch.Tensor
    forced: torch.Tensor
    is_forced: torch.Tensor

    @property
    def of_keywords(self) -> torch.Tensor:
        """Tokens of keywords that may be written."""
        return self.begin | self.go_on


class Pending:
    """The keywords of each row that are left to be written, and the form that is being written.

    Args:
        canvas: The canvas, one row a text, with `pending_ids` and `continuation_mask`.

    Attributes:
        forms: int64 `[R, K, F, L]`, tokens of the forms, -1 behind their ends.
        lengths: int64 `[R, K, F]`, tokens of each form, 0 where there is none.
        left: bool `[R, K]`, keywords of which no form is whole yet.
        matches: bool `[R, K, F]`, longer forms that begin with what is being written.
        written: int64 `[R]`, tokens of the form that is being written, 0 where there is none.
        entry: int64 `[R]`, the last of them.
        ended: int64 `[R]`, the keyword that is whole with them, -1 if none is.
        wanted: int64 `[R]`, the token that is to be written next, -1 if that is open.
    """

    def __init__(self, canvas: Canvas):
        self.forms, self.glues = canvas.pending_ids, canvas.continuation_mask
        self.lengths = (self.forms >= 0).sum(3)
        self.left = (self.lengths > 0).any(2)
        self.matches = torch.zeros_like(self.lengths, dtype=torch.bool)
        self.written = torch.zeros_like(canvas.lengths)
        self.entry, self.ended, self.wanted = (torch.full_like(self.written, -1) for _ in range(3))

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the given rows, in that order; a row may be named several times."""
        for name in PER_ROW:
            setattr(self, name, getattr(self, name)[rows])

    @property
    def owes(self) -> torch.Tensor:
        """Rows that must not stop: a keyword is left; bool `[R]`."""
        return self.left.any(1)

    @property
    def is_open(self) -> torch.Tensor:
        """Rows in which a form may go on; bool `[R]`."""
        return self.written > 0

    @property
    def is_busy(self) -> torch.Tensor:
        """Rows in which a form must go on; bool `[R]`."""
        return self.is_open & (self.ended < 0)

    def must_begin(self, draft) -> torch.Tensor:
        """Return which rows begin with a keyword now, since nothing but BOS stands there; bool `[R]`."""
        return self.owes & (draft.lengths == 1)

    def unbegun(self) -> torch.Tensor:
        """Return how many keywords of each row have not begun, int64 `[R]`."""
        return self.left.sum(1) - self.is_busy.long()

    def owed(self) -> torch.Tensor:
        """Return how many tokens the keywords of each row take at least, int64 `[R]`."""
        waiting_R = owed_tokens(self.lengths, self.left)[0]
        rest_RKF = self.lengths - self.written[:, None, None] + self._owed_by_others()[..., None]
        longest = torch.iinfo(rest_RKF.dtype).max
        rest_R = rest_RKF.masked_fill(~self.matches, longest).flatten(1).amin(1)
        return torch.where(self.is_busy, rest_R, waiting_R)

    def _owed_by_others(self) -> torch.Tensor:
        waiting_R, shortest_RK = owed_tokens(self.lengths, self.left)
        return waiting_R[:, None] - torch.where(self.left, shortest_RK, 0)

    def begins_at(self, draft, slots: torch.Tensor, begun: int = 0) -> torch.Tensor:
        """Return which forms may stand in the given slots `[R, S]`, whole; bool `[R, S, K, F]`.

        Args:
            begun: Tokens of them that the budget knows of already.
        """
        R, K, F = self.lengths.shape
        owed_RN = self._owed_by_others()[..., None].expand(R, K, F).flatten(1)
        fits_RGN = draft.budget.fits((self.lengths - begun).clamp_min(0).flatten(1), owed_RN)
        gaps_RS = draft.gaps.gather(1, slots)
        fits_RSN = fits_RGN.gather(1, gaps_RS.clamp_min(0)[..., None].expand(-1, -1, K * F))
        right_RS = draft.following.gather(1, slots)
        glued_RS = self.glues[draft.ids.gather(1, right_RS)] & (right_RS < draft.capacity)
        may_RKF = self.left[..., None] & (self.lengths > 0)
        return (fits_RSN & ((gaps_RS >= 0) & ~glued_RS)[..., None]).unflatten(2, (K, F)) & may_RKF[:, None]

    def _places(self, draft) -> torch.Tensor:
        """Return which forms may begin right of which entry; bool `[R, S, K, F]`."""
        entry_RS = torch.arange(draft.width, device=self.left.device).expand(len(self.left), -1)
        present_RS = (entry_RS < draft.lengths[:, None]) & (draft.running & ~self.is_busy)[:, None]
        return self.begins_at(draft, entry_RS) & present_RS[..., None, None]

    def choices(self, draft, ordinary: torch.Tensor, may_stop: torch.Tensor, at_stop: bool):
        """Return which slots `[R, S]` and which rows `[R]` may be chosen to write into and to stop, both bool.

        Args:
            draft: The texts.
            ordinary: Slots that have room for any word.
            may_stop: Rows that may stop if nothing is left.
            at_stop: Whether rows in which something is left may choose STOP nevertheless, to have it written then, and
                a form that must go on has no other slots beside it.
        """
        entry_RS = torch.arange(ordinary.shape[1], device=ordinary.device)
        goes_on_RS = (entry_RS == self.entry[:, None]) & (self.is_open & draft.running)[:, None]
        allowed = ordinary | goes_on_RS
        if at_stop:
            allowed = torch.where(self.is_busy[:, None], goes_on_RS, allowed) & ~self.must_begin(draft)[:, None]
            return allowed, torch.where(self.owes, ~self.is_busy, may_stop)
        stuck_R = self.owes & ~allowed.any(1)
        if bool(stuck_R.any()):
            allowed = allowed | (stuck_R[:, None] & self._places(draft).flatten(2).any(2))
        return allowed, may_stop & ~self.owes

    def takes_any_word(self, draft) -> torch.Tensor:
        """Return the slots right of each entry in which any word may be written, bool `[R, S]`."""
        entry_RS = torch.arange(draft.width, device=self.left.device).expand(len(self.left), -1)
        return (draft.room(entry_RS) > 0) & ~(self.is_busy | self.must_begin(draft))[:, None]

    def token_sets(self, draft, slots: torch.Tensor) -> TokenSets:
        """Return what tokens mean in one slot of each row, `slots` int64 `[R]`."""
        vocab_size, first_RKF = len(self.glues), self.forms[..., 0]
        begin_RKF = self.begins_at(draft, slots[:, None])[:, 0] & ~self.is_busy[:, None, None]
        begin_RV = _marked(first_RKF, begin_RKF, vocab_size)
        wait_RV = _marked(first_RKF, self.left[..., None] & (self.lengths > 0), vocab_size)
        at_entry_R = self.is_open & (slots == self.entry)
        go_on_RV = _marked(self._next(), self.matches & at_entry_R[:, None, None], vocab_size)
        is_wanted_R1 = self.wanted[:, None] >= 0
        wanted_RV = self.wanted[:, None] == torch.arange(vocab_size, device=slots.device)
        forced_RV = torch.where(is_wanted_R1, wanted_RV, begin_RV | go_on_RV)
        is_forced_R1 = is_wanted_R1 | self.is_busy[:, None] | (draft.room(slots[:, None]) == 0)
        return TokenSets(begin_RV, go_on_RV, wait_RV & ~begin_RV, forced_RV, is_forced_R1)

    def _next(self) -> torch.Tensor:
        """Return the next token of each form after what is being written, int64 `[R, K, F]`."""
        index = self.written.clamp_max(self.forms.shape[3] - 1)[:, None, None, None]
        return self.forms.gather(3, index.expand(*self.lengths.shape, 1))[..., 0]

    def moves(self, draft) -> list[list[Move]]:
        """Return for each row the tokens of keywords that may be written, by slot and token, with log p(token | slot).

        The probability is the model's own, over its whole vocabulary.
        """
        found = [{} for _ in range(len(self.left))]
        for row, slot, keyword, form in self._places(draft).nonzero().tolist():
            found[row][slot, int(self.forms[row, keyword, form, 0])] = True
        for row in (self.is_open & draft.running).nonzero().squeeze(1).tolist():
            for token in self._next()[row][self.matches[row]].tolist():
                found[row][int(self.entry[row]), token] = False
        state_RD = draft.state
        return [_scored(draft, state_RD[row], row, mine) if mine else [] for row, mine in enumerate(found)]

    def advance(self, draft, slots: torch.Tensor, entry: torch.Tensor, acts: torch.Tensor) -> None:
        """Take in a token that was written into a slot of each row that acts; all int64 `[R]`, `acts` bool.

        Args:
            draft: The texts, with that token.
            slots: The slots, by the entry left of them.
            entry: The new entry.
            acts: Rows that wrote.
        """
        row_R = torch.arange(len(slots), device=slots.device)
        token_R11 = draft.ids[row_R, entry][:, None, None]
        at_entry_R = acts & self.is_open & (slots == self.entry)
        longer_RKF = self.matches & (self._next() == token_R11) & at_entry_R[:, None, None]
        goes_on_R = longer_RKF.flatten(1).any(1)
        # what was whole is the beginning of something longer
        self._set_left(goes_on_R & (self.ended >= 0), True)
        inner = torch.where(goes_on_R, self.entry, draft.capacity)
        draft.gaps[row_R, inner] = torch.where(goes_on_R, -1, draft.gaps[row_R, inner])
        begins_RKF = self.begins_at(draft, entry[:, None], begun=1)[:, 0] & (self.forms[..., 0] == token_R11)
        begins_RKF = begins_RKF & acts[:, None, None]
        now_RKF = torch.where(goes_on_R[:, None, None], longer_RKF, begins_RKF)
        self.matches = torch.where(acts[:, None, None], now_RKF, self.matches)
        count_R = torch.where(goes_on_R, self.written + 1, begins_RKF.flatten(1).any(1).long())
        self.written = torch.where(acts, count_R, self.written)
        self.wanted = torch.where(acts, -1, self.wanted)
        self._settle(draft, entry, acts)
        draft.budget.owed = self.owed()

    def _settle(self, draft, entry: torch.Tensor, acts: torch.Tensor) -> None:
        """Note which keyword is whole with the new entry, and whether anything goes on behind it."""
        row_R = torch.arange(len(entry), device=entry.device)
        whole_RK = (self.matches & (self.lengths == self.written[:, None, None])).any(2) & acts[:, None]
        is_whole_R = whole_RK.any(1)
        ended_R = torch.where(is_whole_R, whole_RK.int().argmax(1), -1)
        self.ended = torch.where(acts, ended_R, self.ended)
        self._set_left(is_whole_R, False)
        draft.words_end[row_R, entry] |= is_whole_R
        entry_RW = torch.arange(draft.capacity + 1, device=entry.device)
        inside_RW = (entry_RW <= entry[:, None]) & (entry_RW > (entry - self.written)[:, None]) & is_whole_R[:, None]
        draft.keywords = torch.where(inside_RW, ended_R[:, None], draft.keywords)
        self.matches = self.matches & ((self.lengths > self.written[:, None, None]) | ~acts[:, None, None])
        stays_R = self.matches.flatten(1).any(1)
        self.written = torch.where(stays_R, self.written, 0)
        self.entry = torch.where(acts, torch.where(stays_R, entry, -1), self.entry)
        self.ended = torch.where(stays_R, self.ended, -1)

    def _set_left(self, rows: torch.Tensor, value: bool) -> None:
        row = rows.nonzero().squeeze(1)
        self.left[row, self.ended[row]] = value


def owed_tokens(lengths: torch.Tensor, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many tokens the keywords that are left take at least, in all `[R]` and by keyword `[R, K]`.

    Args:
        lengths: int64 `[R, K, F]`, tokens of the forms, 0 where there is none.
        left: bool `[R, K]`.
    """
    longest = torch.iinfo(lengths.dtype).max
    shortest_RK = lengths.masked_fill(lengths == 0, longest).amin(2)
    return torch.where(left, shortest_RK, 0).sum(1), shortest_RK


def check_pending(canvas: Canvas, bans, never_inserted: list[int], has_bias: bool) -> None:
    """Refuse what pending keywords cannot keep, and `keyword_bias` without any.

    Raises:
        ValueError: If a form holds a token that is structure or begins with one that glues, or sequences are banned,
            or there is a bias and nothing pending.
    """
    if canvas.pending_ids is None:
        if has_bias:
            raise ValueError(
                "keyword_bias has no effect without pending keywords: canvas(keywords=..., ordered=False)"
            )
        return
    structure = canvas.pending_ids[torch.isin(canvas.pending_ids, canvas.pending_ids.new_tensor(never_inserted))]
    if len(structure):
        raise ValueError(f"pending_ids must hold words, and {int(structure[0])} is structure, which is never written")
    first = canvas.pending_ids[..., 0]
    gluing = first[(first >= 0) & canvas.continuation_mask[first]]
    if len(gluing):
        raise ValueError(f"a pending keyword begins a word, and token {int(gluing[0])} glues to the word on its left")
    if bans.banned or bans.ngram:
        raise ValueError(
            "bad_words_ids, biases of -inf and no_repeat_ngram_size bar tokens one by one, and a pending keyword is "
            "written whole: use ordered=True, or repetition_penalty and suppress_tokens"
        )


def _scored(draft, state: torch.Tensor, row: int, begins: dict[tuple[int, int], bool]) -> list[Move]:
    """Return the moves of one row from (slot, token) pairs that begin a form, or go on with one."""
    pairs = sorted(begins)
    slots = sorted({slot for slot, _ in pairs})
    states = draft.head.token_state(draft.slots[row, slots], state)
    log_p = draft.model.token_logits(states).log_softmax(-1)
    values = log_p[[slots.index(slot) for slot, _ in pairs], [token for _, token in pairs]].tolist()
    return [Move(row, *pair, begins[pair], value) for pair, value in zip(pairs, values, strict=True)]


def _marked(tokens: torch.Tensor, counts: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the tokens `[R, K, F]` that count as a mask, bool `[R, V]`."""
    place = torch.where(counts, tokens, vocab_size).flatten(1)
    marked = torch.zeros(len(tokens), vocab_size + 1, dtype=torch.bool, device=tokens.device)
    return marked.scatter_(1, place, True)[:, :vocab_size]
