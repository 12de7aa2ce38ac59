"""Rotary steps behind a cache: keys are turned once and met by what has moved since; the same function as one pass."""

import pytest
import torch

from modeling_insnext import InsertionCache
from modeling_insnext.insnext import modeling_insnext
from modeling_insnext.insnext import rotary_step as steps
from modeling_insnext.insnext.attention import Interval
from tests.insnext.test_rotary import rotary_model
from tests.support.equality import difference


CONTEXT = 5
PLACES = {
    "one place": lambda step, held: 3 + step,
    "the end": lambda step, held: held,
    "two places in turn": lambda step, held: 2 + step // 2 if step % 2 else held,
    "anywhere": lambda step, held: 1 + (7 * step * step + 3 * step) % held,
}


class Writer:
    """Rows that grow behind one cache, `ranks` as a draft keeps them."""

    def __init__(self, model, rows: int, longest: int):
        generator = torch.Generator().manual_seed(0)
        self.model, self.cache = model, InsertionCache(rows)
        self.ids = torch.randint(3, 23, (rows, longest), generator=generator)
        self.ranks = torch.arange(longest).repeat(rows, 1)
        self.states = [[] for _ in range(rows)]
        self.encode([CONTEXT] * rows)

    def encode(self, counts: list[int], ranked: bool = True) -> None:
        counts = torch.tensor(counts)
        first, Q = self.cache.lengths[:, None], int(counts.max())
        entries = first + torch.arange(Q)
        real = torch.arange(Q) < counts[:, None]
        start, last = torch.where(real, 0, entries), first + counts[:, None] - 1
        interval = Interval(
            self.ranks[:, : self.cache.key_length(Q)], start, torch.where(real, last, entries), entries, ranked
        )
        ids = self.ids.gather(1, entries.clamp_max(self.ids.shape[1] - 1))
        out = self.model.model(ids, interval=interval, past_key_values=self.cache, advance_cache=False)
        self.cache.advance(Q, counts)
        for row, count in enumerate(counts.tolist()):
            self.states[row].extend(out.last_hidden_state[row, :count])

    def write(self, row: int, rank: int, at: int) -> None:
        """Put entry `at` of a row at a rank of its text."""
        self.ranks[row, :at] += self.ranks[row, :at] >= rank
        self.ranks[row, at] = rank

    def error(self) -> float:
        """Return how far the states are from one pass over each row, by the definition."""
        attn = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        found = []
        for row, states in enumerate(self.states):
            n = len(states)
            positions = self.ranks[row : row + 1, :n]
            whole = self.model.model(self.ids[row : row + 1, :n], positions=positions, context_length=CONTEXT)
            found.append(difference(torch.stack(states), whole.last_hidden_state[0]))
        self.model.set_attn_implementation(attn)
        return max(found)


def written(places, steps_of: list[int], model=None) -> Writer:
    """Return rows of which row r writes a token in `steps_of[r]` steps and then rests."""
    writer = Writer(model or rotary_model("llama3", attn="sdpa"), len(steps_of), CONTEXT + max(steps_of))
    for step in range(max(steps_of)):
        acts = [int(step < mine) for mine in steps_of]
        for row, act in enumerate(acts):
            if act:
                writer.write(row, places(step + row, CONTEXT + step), CONTEXT + step)
        writer.encode(acts)
    return writer


@pytest.fixture
def prepared(monkeypatch):
    """What every step attended by."""
    seen, prepare = [], steps.rotary_step
    monkeypatch.setattr(modeling_insnext, "rotary_step", lambda *args: seen.append(prepare(*args)) or seen[-1])
    return seen


@pytest.mark.parametrize("places", PLACES)
def test_steps_of_rows_of_any_length_are_one_pass(places, prepared):
    writer = written(PLACES[places], [14, 9, 14])
    assert len(prepared) == 14 and writer.error() < 1e-9


def test_control_keys_that_did_not_move_are_another_function(monkeypatch):
    moves = steps._moves

    def still(*args):
        found = moves(*args)
        return found._replace(moved_BK=torch.zeros_like(found.moved_BK))

    monkeypatch.setattr(steps, "_moves", still)
    assert written(PLACES["one place"], [6]).error() > 1e-3


def test_what_is_written_in_few_places_turns_all_keys_once(prepared):
    for places, most in (("the end", 1), ("one place", 2), ("two places in turn", 3)):
        del prepared[:]
        written(PLACES[places], [20, 20])
        assert [step.index_B1Q1 is None for step in prepared] == [True] + 19 * [False]
        assert max(step.query_turns[0].shape[2] for step in prepared) <= most


def test_many_places_turn_all_keys_anew_once_in_several_steps(prepared):
    assert written(PLACES["anywhere"], [40]).error() < 1e-9
    anew = [step.index_B1Q1 is None for step in prepared]
    assert 1 < sum(anew) <= 1 + 39 // (steps.MOST_MOVES - 1)
    assert max(step.query_turns[0].shape[2] for step in prepared) <= steps.MOST_MOVES


def test_several_tokens_a_step_are_one_block():
    writer = Writer(rotary_model(attn="sdpa"), 2, CONTEXT + 6)
    twin = Writer(rotary_model(), 2, CONTEXT + 6)
    for each in (writer, twin):
        for at in (CONTEXT, CONTEXT + 3):
            for entry, rank in ((at, 2), (at + 1, 4), (at + 2, 3)):
                each.write(0, rank, entry)
                if entry < at + 2:
                    each.write(1, rank + 1, entry if at == CONTEXT else entry - 1)
            each.encode([3, 2])
    states = [torch.cat([torch.stack(rows) for rows in each.states]) for each in (writer, twin)]
    assert writer.cache.turned is not None and twin.cache.turned is None and difference(*states) < 1e-9


@pytest.mark.parametrize("change", ["rows", "counted", "crop"])
def test_turned_keys_do_not_outlive_what_they_were_made_of(change, prepared):
    model = rotary_model(attn="sdpa")
    writer = written(PLACES["anywhere"], [6, 6], model)
    if change == "rows":
        writer.cache.select_rows(torch.tensor([1, 0]))
        writer.ids, writer.ranks, writer.states = writer.ids.flip(0), writer.ranks.flip(0), writer.states[::-1]
    elif change == "crop":
        # the text as it stood before its last token was written
        writer.cache.crop(torch.tensor([10, 10]))
        writer.ranks[:, :10] -= (writer.ranks[:, :10] > writer.ranks[:, 10:11]).long()
        writer.states = [states[:10] for states in writer.states]
    assert (writer.cache.turned is None) == (change == "crop")
    for at in range(len(writer.states[0]), 14):
        writer.ids = torch.nn.functional.pad(writer.ids, (0, max(0, at + 1 - writer.ids.shape[1])), value=7)
        writer.ranks = torch.nn.functional.pad(writer.ranks, (0, max(0, at + 1 - writer.ranks.shape[1])))
        for row in (0, 1):
            writer.write(row, 2 + row + at % 3, at)
        # a step that is not told that positions are ranks goes another way, and keeps no turned key
        writer.encode([1, 1], ranked=not (change == "counted" and at == 12))
    assert prepared[-1].index_B1Q1 is None or change != "counted"
    assert writer.error() < 1e-9
