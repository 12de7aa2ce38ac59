"""What is given survives every way of writing: random canvases, every decode mode, every rule checked on the text.

The checker knows the canvas and the output only: it finds each written token's gap by the given tokens around it.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_insnext.insnext import write_sample
from modeling_insnext.insnext.budget import Budget
from modeling_insnext.insnext.canvas import Canvas
from modeling_insnext.insnext.draft import Draft
from tests.support.generation_twins import VOCAB, writing_model
from tests.support.insnext import BOS, EOS, PAD


MODEL = writing_model(seed=5, dtype=torch.float32, num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
# tokens that continue a word
CONTINUING = (3, 5, 8, 11)
TOKENS = st.integers(3, VOCAB - 1)


@st.composite
def canvases(draw):
    """Draw rows of (token, is open, ends a word, bounds of its gap), padded to one canvas."""
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        row = []
        for index in range(draw(st.integers(1, 5))):
            low = draw(st.sampled_from([0, 0, 1, 2]))
            high = draw(st.sampled_from([-1, -1, low, low + 1]))
            token = BOS if index == 0 else draw(TOKENS)
            row.append((token, draw(st.booleans()), index > 0 and draw(st.booleans()), low, high))
        rows.append(row)
    width = max(map(len, rows))
    padded = [row + [(PAD, False, False, 0, -1)] * (width - len(row)) for row in rows]
    ids, is_open, ends, low, high = (torch.tensor([[token[i] for token in row] for row in padded]) for i in range(5))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    # gap g is the slot right of token g
    gap_ids = torch.where(is_open, torch.arange(width), -1)
    continuing = torch.zeros(VOCAB, dtype=torch.bool)
    continuing[list(CONTINUING)] = True
    return Canvas.from_ids(
        ids, mask, is_open, gap_ids, torch.where(is_open, low, 0)[:, : int(gap_ids.max()) + 1 or 1],
        high[:, : int(gap_ids.max()) + 1 or 1], ends, continuing,
    )  # fmt: skip


@st.composite
def modes(draw):
    """Draw options of `generate`: a way of choosing, EBR, windows, processors."""
    kind = draw(st.sampled_from(["greedy", "sampling", "sampling", "beams", "parallel", "parallel_sampling"]))
    options = {"cache_implementation": draw(st.sampled_from(["dynamic", "static"]))}
    if "sampling" in kind:
        options |= {
            "do_sample": True,
            "seed": draw(st.integers(0, 99)),
            "num_return_sequences": draw(st.integers(1, 2)),
        }
        options |= {
            "slot_temperature": draw(st.sampled_from([0.5, 2.0])),
            "slot_top_p": draw(st.sampled_from([0.8, 1.0])),
        }
    if "parallel" in kind:
        options["parallel_slots"] = draw(st.integers(2, 4))
    if kind == "beams":
        beams = draw(st.integers(2, 3))
        options |= {"num_beams": beams, "num_return_sequences": draw(st.integers(1, beams))}
    options |= draw(
        st.sampled_from([{}, {}, {"ebr": True}, {"ebr": True, "ebr_ratio": 0}, {"ebr": True, "ebr_window": 2}])
    )
    options |= draw(
        st.sampled_from(
            [{}, {}, {"slot_window": 1}, {"slot_window": 3}, {"reading_order": True}, {"repetition_penalty": 2.0}]
        )
    )
    return options


def gap_of_written(given, ids, steps):
    """Return for each given token the written ones right of it, up to the next given token; check the given ones."""
    runs = []
    for token, step in zip(ids, steps, strict=True):
        if step == -1:
            runs.append((token, []))
        else:
            runs[-1][1].append((token, step))
    assert [token for token, _ in runs] == given, "given tokens survive in order"
    return [run for _, run in runs]


def check(canvas, out, limit, least, options):
    repeats = options.get("num_return_sequences", 1)
    assert len(out.sequences) == len(canvas["input_ids"]) * repeats
    for index, (ids, steps) in enumerate(zip(out.sequences.tolist(), out.insertion_steps.tolist(), strict=True)):
        row = index // repeats
        length = sum(step != -2 for step in steps)
        assert all(step != -2 for step in steps[:length]) and set(ids[length:]) <= {PAD}, "pads stand at the right"
        ids, steps = ids[:length], steps[:length]
        given = canvas["input_ids"][row, canvas["attention_mask"][row].bool()].tolist()
        runs = gap_of_written(given, ids, steps)
        for place, run in enumerate(runs):
            gap = int(canvas["gap_ids"][row, place])
            assert gap >= 0 or not run, "closed gaps receive nothing"
            if gap >= 0:
                low, high = (int(canvas[f"{name}_gap_tokens"][row, gap]) for name in ("min", "max"))
                assert low <= len(run) and (high < 0 or len(run) <= high), "bounds of the gaps hold"
            if run and canvas["word_end_mask"][row, place]:
                assert run[0][0] not in CONTINUING, "nothing glues to a given word"
        written = [write for run in runs for write in run]
        assert not {token for token, _ in written} & {PAD, BOS, EOS}, "structure is never written"
        assert least <= len(written) <= limit, "min_new_tokens and max_new_tokens hold"
        steps = sorted(step for _, step in written)
        if options.get("parallel_slots", 1) == 1:
            assert steps == list(range(1, len(steps) + 1)), "one token a step"
        else:
            assert sorted(set(steps)) == list(range(1, max(steps, default=0) + 1)), "no step is empty"
            assert all(steps.count(step) <= options["parallel_slots"] for step in steps), "parallel_slots a step"


def budget(data, canvas):
    """Draw limits that the canvas can keep."""
    need = int(canvas["min_gap_tokens"].sum(1).max())
    limit = need + data.draw(st.integers(0 if need else 1, 4))
    can_take = []
    for row in range(len(canvas["input_ids"])):
        gaps = canvas["gap_ids"][row]
        highs = [int(canvas["max_gap_tokens"][row, gap]) for gap in gaps[gaps >= 0]]
        can_take.append(min(limit, sum(limit if high < 0 else high for high in highs)))
    return limit, data.draw(st.integers(0, min(can_take)))


def survives(data):
    canvas, options = data.draw(canvases()), data.draw(modes())
    limit, least = budget(data, canvas)
    out = MODEL.generate(**canvas, max_new_tokens=limit, min_new_tokens=least, return_dict_in_generate=True, **options)
    check(canvas, out, limit, least, options)


def of_random_canvases(count):
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@of_random_canvases(150)
@given(data=st.data())
def test_every_given_token_closed_gap_word_and_bound_survives_every_decode_mode(data):
    survives(data)


@pytest.mark.slow
@of_random_canvases(2000)
@given(data=st.data())
def test_two_thousand_canvases_survive_every_decode_mode(data):
    survives(data)


PARALLEL = {"parallel_slots": 3, "do_sample": True, "seed": 3, "slot_temperature": 9.0}


def open_everywhere(monkeypatch):
    monkeypatch.setattr(Draft, "room", lambda self, slots: torch.ones_like(slots))


def without_maxima(monkeypatch):
    room = Budget.room

    def wide(self):
        self.maxima = self.maxima.clamp_max(-1)
        return room(self)

    monkeypatch.setattr(Budget, "room", wide)


def without_minima(monkeypatch):
    # nothing is asked for and there is no room, so the text stops at once
    monkeypatch.setattr(Budget, "deficit", property(lambda self: torch.zeros_like(self.minima)))
    monkeypatch.setattr(Budget, "room", lambda self: torch.zeros_like(self.minima))


BREAKS = {"closed_gap": open_everywhere, "maximum": without_maxima, "minimum": without_minima}


CANVAS = dict(
    input_ids=torch.tensor([[BOS, 4, 5, 6]]),
    slot_mask=torch.tensor([[True, False, True, False]]),
    min_gap_tokens=torch.tensor([[1, 1]]),
    max_gap_tokens=torch.tensor([[2, 1]]),
)


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("options", [{"do_sample": True, "seed": 1}, {"num_beams": 3}, PARALLEL])
def test_control_the_checker_notices_a_draft_that_breaks_a_rule(broken, options, monkeypatch):
    canvas = Canvas.from_ids(**CANVAS)

    def run():
        out = MODEL.generate(**canvas, max_new_tokens=8, return_dict_in_generate=True, **options)
        check(canvas, out, 8, 0, options)

    run()
    BREAKS[broken](monkeypatch)
    with pytest.raises(AssertionError):
        run()


def test_control_the_checker_notices_glued_words_and_written_structure(monkeypatch):
    canvas = Canvas.from_ids(torch.tensor([[BOS, 4]]), word_end_mask=torch.tensor([[False, True]]))
    canvas["continuation_mask"] = torch.zeros(VOCAB, dtype=torch.bool)
    glued = MODEL.generate(**canvas, max_new_tokens=1, suppress_tokens=[6, 7, 9, 10, 12, 4], min_new_tokens=1,
                           return_dict_in_generate=True)  # fmt: skip
    with pytest.raises(AssertionError, match="glues"):
        check(canvas, glued, 1, 1, {})
    monkeypatch.setattr(write_sample, "token_scores", lambda *args: torch.eye(VOCAB)[[EOS]])
    ended = MODEL.generate(**canvas, max_new_tokens=1, min_new_tokens=1, return_dict_in_generate=True)
    with pytest.raises(AssertionError, match="structure"):
        check(canvas, ended, 1, 1, {})


def test_a_minimum_for_all_gaps_counts_in_rows_with_fewer_gaps_too():
    # the second row has one gap: it may stop once that gap is full
    slots = torch.tensor([[True, True, True], [False, False, True]])
    ids = torch.tensor([[BOS, 4, 5], [BOS, 4, 5]])
    both = MODEL.generate(ids, slot_mask=slots, min_gap_tokens=2, max_new_tokens=12, return_dict_in_generate=True)
    single = MODEL.generate(
        ids[1:], slot_mask=slots[1:], min_gap_tokens=2, max_new_tokens=12, return_dict_in_generate=True
    )
    length = single.sequences.shape[1]
    assert both.sequences[1, :length].tolist() == single.sequences[0].tolist()
    assert (both.insertion_steps[1, length:] == -2).all()


def test_a_minimum_of_a_gap_that_is_not_open_is_refused():
    with pytest.raises(ValueError, match="gap 1 of row 1 has the minimum 2 but no open slot"):
        MODEL.generate(
            torch.tensor([[BOS, 4], [BOS, 4]]),
            slot_mask=torch.tensor([[True, True], [False, True]]),
            min_gap_tokens=torch.tensor([[2, 2], [2, 2]]),
        )
