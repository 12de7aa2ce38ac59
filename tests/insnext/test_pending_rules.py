"""1,000 random sets of pending keywords, every way of writing: each keyword stands whole, in one of its forms.

The checker knows the canvas and the output only.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_insnext.insnext.budget import Budget
from modeling_insnext.insnext.canvas import Canvas, padded_forms
from modeling_insnext.insnext.pending import Pending
from tests.support.generation_twins import VOCAB, writing_model
from tests.support.insnext import BOS, EOS, PAD


MODEL = writing_model(seed=5, dtype=torch.float32, num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
# tokens that continue a word, and those that begin one
CONTINUING = (3, 5, 8, 11)
STARTING = (4, 6, 7, 9, 10, 12)
WORDS = st.lists(st.sampled_from(CONTINUING), max_size=1).flatmap(
    lambda rest: st.sampled_from(STARTING).map(lambda first: [first, *rest])
)
FORMS = st.lists(WORDS, min_size=1, max_size=2).map(lambda words: [token for word in words for token in word])
ROWS = 5


@st.composite
def keyword_sets(draw):
    """Draw keywords of one to three forms; a form is one or two words, and may begin like another."""
    keywords = []
    for _ in range(draw(st.integers(0, 3))):
        forms = [draw(FORMS) for _ in range(draw(st.integers(1, 3)))]
        if draw(st.booleans()):
            forms.append([*forms[0], draw(st.sampled_from(CONTINUING))])
        keywords.append(forms)
    return keywords


@st.composite
def canvases(draw):
    """Draw rows of given tokens and gaps, the last slot open and without a bound, and sets of pending keywords."""
    given_rows = [[BOS, *draw(st.lists(st.integers(3, VOCAB - 1), max_size=3))] for _ in range(ROWS)]
    sets = [draw(keyword_sets()) for _ in range(ROWS)]
    if not any(sets):
        sets[0] = [[[4]]]
    T, G = max(map(len, given_rows)), 4
    ids, mask = torch.full((ROWS, T), PAD), torch.zeros(ROWS, T, dtype=torch.long)
    gaps = torch.full((ROWS, T), -1)
    minima, maxima = torch.zeros(ROWS, G, dtype=torch.long), torch.full((ROWS, G), -1)
    for row, tokens in enumerate(given_rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        for slot in range(len(tokens)):
            last = slot == len(tokens) - 1
            if last or draw(st.booleans()):
                gaps[row, slot] = slot
                minima[row, slot] = draw(st.integers(0, 2))
                maxima[row, slot] = -1 if last else draw(st.sampled_from([-1, 2, 4]))
    word_end = (mask.cumsum(1) > 1) & mask.bool() & draw(st.booleans())
    continuing = torch.zeros(VOCAB, dtype=torch.bool)
    continuing[list(CONTINUING)] = True
    return Canvas.from_ids(ids, mask, gaps >= 0, gaps, minima[:, : int(gaps.max()) + 1],
                           maxima[:, : int(gaps.max()) + 1], word_end, continuing, padded_forms(sets))  # fmt: skip


MODES = st.sampled_from([
    {},
    {"repetition_penalty": 2.0, "slot_window": 1},
    {"reading_order": True, "parallel_slots": 2, "do_sample": True, "seed": 4},
    {"reading_order": True, "num_beams": 3},
    {"ebr": True},
    {"ebr": True, "ebr_ratio": 0, "do_sample": True, "seed": 1, "slot_temperature": 3.0, "top_k": 2},
    {"do_sample": True, "seed": 2, "num_return_sequences": 2, "keyword_bias": 0.0, "slot_top_p": 0.7},
    {"parallel_slots": 3, "do_sample": True, "seed": 3, "suppress_tokens": [4, 6, 7]},
    {"num_beams": 4, "num_return_sequences": 2},
    {"num_beams": 4, "ebr": True, "cache_implementation": "static"},
])  # fmt: skip


def forms_of(canvas, row):
    """Return of each pending keyword its forms."""
    table = canvas.pending_ids[row].tolist()
    return [forms for forms in ([[t for t in form if t >= 0] for form in forms] for forms in table) if any(forms)]


def least(canvas, row):
    return sum(min(len(form) for form in forms if form) for forms in forms_of(canvas, row))


def check(canvas, out, limit, copies=1):
    for index, (ids, steps, owners) in enumerate(
        zip(out.sequences.tolist(), out.insertion_steps.tolist(), out.keyword_ids.tolist(), strict=True)
    ):
        row, length = index // copies, sum(step != -2 for step in steps)
        ids, steps, owners = ids[:length], steps[:length], owners[:length]
        given_ids = canvas.input_ids[row, : int(canvas.lengths[row])].tolist()
        assert [token for token, step in zip(ids, steps, strict=True) if step == -1] == given_ids, (
            "given text survives"
        )
        assert sum(step > 0 for step in steps) <= limit, "max_new_tokens holds"
        keywords = forms_of(canvas, row)
        assert set(owners) - {-1} == set(range(len(keywords))), "every keyword stands there"
        for keyword, forms in enumerate(keywords):
            places = [place for place, owner in enumerate(owners) if owner == keyword]
            assert [ids[place] for place in places] in forms, "in one of its forms"
            assert places == list(range(places[0], places[-1] + 1)), "in one piece"
            assert places[-1] + 1 == length or ids[places[-1] + 1] not in CONTINUING, "whole"
        check_gaps(canvas, row, steps)
        assert not {token for token, step in zip(ids, steps, strict=True) if step > 0} & {PAD, BOS, EOS}


def check_gaps(canvas, row, steps):
    runs = "".join("g" if step == -1 else "w" for step in steps).split("g")[1:]
    for place, run in enumerate(runs):
        gap = int(canvas.gap_ids[row, place])
        low, high = (0, 0) if gap < 0 else (int(canvas[f"{name}_gap_tokens"][row, gap]) for name in ("min", "max"))
        assert low <= len(run) and (high < 0 or len(run) <= high), "bounds of the gaps hold"


def write_and_check(data):
    canvas, options = data.draw(canvases()), data.draw(MODES)
    needs = max(least(canvas, row) + int(canvas.min_gap_tokens[row].sum()) for row in range(ROWS))
    limit = max(needs + data.draw(st.integers(0, 6)), 1)
    out = MODEL.generate(**canvas, max_new_tokens=limit, return_dict_in_generate=True, **options)
    check(canvas, out, limit, options.get("num_return_sequences", 1))


EXAMPLES = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=24, **EXAMPLES)
@given(data=st.data())
def test_every_pending_keyword_stands_whole_in_one_of_its_forms(data):
    write_and_check(data)


@pytest.mark.slow
@settings(max_examples=200, **EXAMPLES)
@given(data=st.data())
def test_so_do_those_of_a_thousand_random_sets(data):
    write_and_check(data)


CANVAS = Canvas.from_ids(
    torch.tensor([[BOS, 4]]), slot_mask=torch.tensor([[True, True]]),
    continuation_mask=torch.isin(torch.arange(VOCAB), torch.tensor(CONTINUING)),
    pending_ids=padded_forms([[[[6, 3], [7, 9, 10]], [[9]]]]),
)  # fmt: skip


def without_reserve(monkeypatch):
    def fits(self, lengths, owed):
        return torch.ones(*self.minima.shape, lengths.shape[1], dtype=torch.bool)

    monkeypatch.setattr(Budget, "fits", fits)


def without_going_on(monkeypatch):
    monkeypatch.setattr(Pending, "is_busy", property(lambda self: torch.zeros_like(self.is_open)))


def without_protection(monkeypatch):
    settle = Pending._settle

    def unprotected(self, draft, entry, acts):
        settle(self, draft, entry, acts)
        draft.words_end[:] = False

    monkeypatch.setattr(Pending, "_settle", unprotected)


SAMPLING, BEAMS = {"do_sample": True, "seed": 1, "keyword_bias": 0.0}, {"num_beams": 4}


@pytest.mark.parametrize(
    ("broken", "options"),
    [
        (without_reserve, SAMPLING),
        (without_reserve, BEAMS),
        (without_going_on, SAMPLING),
        (without_protection, SAMPLING),
    ],
)
def test_control_a_broken_rule_is_noticed(broken, options, monkeypatch):
    many = CANVAS.repeat(40 if options is SAMPLING else 1)

    def run():
        out = MODEL.generate(**many, max_new_tokens=6, return_dict_in_generate=True, **options)
        check(many, out, 6)

    run()
    broken(monkeypatch)
    # a text is wrong, or nothing is left that could make it right
    with pytest.raises((AssertionError, IndexError)):
        run()


def changed(**fields):
    return Canvas(**{**CANVAS, **fields})


def one_keyword(*form):
    return padded_forms([[[list(form)]]])


REFUSED = {
    "the tokens": (CANVAS, {"max_new_tokens": 2}, "those of row 0 take at least 3 tokens, the widest gap .* takes 2"),
    "the length": (CANVAS, {"max_length": 4}, "take at least 3 tokens, the widest gap .* takes 2"),
    "the gaps": (changed(max_gap_tokens=torch.tensor([[2, 2]])), {}, "gap whole words may stand in takes 2"),
    "minima": (changed(min_gap_tokens=torch.tensor([[2, 0]]), max_gap_tokens=torch.tensor([[2, -1]])),
               {"max_new_tokens": 4}, r"may write 4 tokens, its keywords take at least 3, its minima are \[2, 0\]"),
    "beams": (CANVAS, {"num_beams": 2, "keyword_bias": 2.0}, "keyword_bias=2.0 has no effect without num_beams=1"),
    "nothing": (changed(pending_ids=None), {"keyword_bias": 2.0}, "keyword_bias has no effect without pending"),
    "bans": (CANVAS, {"bad_words_ids": [[4, 6]]}, "bad_words_ids, biases of -inf and no_repeat_ngram_size"),
    "n-grams": (CANVAS, {"no_repeat_ngram_size": 2}, "written whole: use ordered=True"),
    "structure": (changed(pending_ids=one_keyword(4, EOS)), {}, f"must hold words, and {EOS} is structure"),
    "a part of a word": (changed(pending_ids=one_keyword(3)), {}, "token 3 glues to the word on its left"),
    "shape": (changed(pending_ids=one_keyword(4)[0]), {}, r"int64 \[B, K, F, L\] for 1 rows, got .*\[1, 1, 1\]"),
    "values": (changed(pending_ids=one_keyword(4, -2)), {}, "tokens and -1 where there is none, got -2"),
    "a hole": (changed(pending_ids=one_keyword(4, -1, 4)), {}, r"behind the end of a form only, got \[4, -1, 4\]"),
    "vocabulary": (changed(pending_ids=one_keyword(VOCAB)), {}, f"token id {VOCAB} in a vocabulary of {VOCAB}"),
    "left to right": (CANVAS, {"left_to_right": True}, "belongs to a canvas"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_before_any_work(case, monkeypatch):
    canvas, options, message = REFUSED[case]
    monkeypatch.setattr(MODEL.model, "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        MODEL.generate(**canvas, **{"max_new_tokens": 8 if "max_length" not in options else None, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "seed": [5, 6, 7], "top_k": 0}, {"num_beams": 3}, {"ebr": True, "slot_window": 2}],
)
def test_a_row_is_written_as_it_is_alone(options):
    sets = [[[[6, 3], [7, 9, 10]], [[9]]], [], [[[12]], [[4, 8]], [[7], [7, 5]]]]
    ids, forms = torch.tensor([[BOS, 4], [BOS, 6], [BOS, 9]]), padded_forms(sets)

    def texts(rows, seeds):
        canvas = Canvas.from_ids(
            ids[rows], slot_mask=ids[rows] > 0, continuation_mask=CANVAS.continuation_mask, pending_ids=forms[rows]
        )
        mine = {**options, "seed": seeds} if "seed" in options else options
        out = MODEL.generate(**canvas, max_new_tokens=9, return_dict_in_generate=True, **mine)
        return [row[steps != -2].tolist() for row, steps in zip(out.sequences, out.insertion_steps, strict=True)]

    alone = [texts([row], options["seed"][row : row + 1] if "seed" in options else None)[0] for row in range(3)]
    assert texts([0, 1, 2], options.get("seed")) == alone
    # control: other keywords make another text
    assert len({tuple(text) for text in alone}) == 3
