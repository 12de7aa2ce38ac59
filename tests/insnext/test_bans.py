"""What is banned never stands in a finished text, on whichever side of a slot it was completed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext.insnext.bans import Bans
from modeling_insnext.insnext.canvas import Canvas
from modeling_insnext.insnext.generation_configuration import InsertionGenerationConfig
from tests.support.generation_twins import VOCAB, canvas_of, writing_model
from tests.support.insnext import BOS


MODEL = writing_model(seed=7, dtype=torch.float32, max_position_embeddings=40, num_hidden_layers=1)
WRITTEN = range(3, VOCAB)
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 5, "slot_temperature": 4.0, "temperature": 3.0},
    "parallel": {"parallel_slots": 4},
    "parallel_sampling": {"parallel_slots": 4, "do_sample": True, "seed": 2, "slot_temperature": 9.0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "ebr": {"ebr": True, "ebr_ratio": 0.3, "cache_implementation": "static"},
}
every_mode = pytest.mark.parametrize("mode", MODES)


def config(**options):
    return InsertionGenerationConfig(**options)


def holds(text, words):
    return any(tuple(text[i : i + len(words)]) == tuple(words) for i in range(len(text)))


@st.composite
def texts_and_words(draw):
    """Draw a text over few tokens, a place in it, and sequences of up to three tokens."""
    tokens = st.integers(3, 5)
    text = [BOS, *draw(st.lists(tokens, max_size=7))]
    words = draw(st.lists(st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=4))
    return text, draw(st.integers(1, len(text))), words


@settings(max_examples=400, deadline=None, derandomize=True)
@given(drawn=texts_and_words())
def test_a_token_is_barred_exactly_where_it_completes_a_banned_sequence_on_either_side(drawn):
    text, place, words = drawn
    scores = Bans(config(bad_words_ids=words), VOCAB).add_to(torch.zeros(VOCAB), text, place)
    for token in WRITTEN:
        grown = [*text[:place], token, *text[place:]]
        completed = any(
            grown[first : first + len(sequence)] == sequence
            for sequence in words
            for first in range(max(place - len(sequence) + 1, 0), place + 1)
        )
        assert scores[token].isneginf() == completed


@settings(max_examples=400, deadline=None, derandomize=True)
@given(drawn=texts_and_words(), n=st.integers(1, 4))
def test_a_token_is_barred_exactly_where_an_n_gram_around_it_would_stand_twice(drawn, n):
    text, place, _ = drawn
    scores = Bans(config(no_repeat_ngram_size=n), VOCAB).add_to(torch.zeros(VOCAB), text, place)
    for token in WRITTEN:
        grown = [*text[:place], token, *text[place:]]
        grams = [tuple(grown[i : i + n]) for i in range(len(grown) - n + 1)]
        repeats = any(grams.count(grams[i]) > 1 for i in range(len(grams)) if i <= place < i + n)
        assert scores[token].isneginf() == repeats


@settings(max_examples=100, deadline=None, derandomize=True)
@given(drawn=texts_and_words())
def test_a_bias_is_added_once_for_every_occurrence_that_a_token_completes(drawn):
    text, place, words = drawn
    biases = {tuple(sequence): 0.5 + index for index, sequence in enumerate(words)}
    scores = Bans(config(sequence_bias=biases), VOCAB).add_to(torch.zeros(VOCAB), text, place)
    for token in WRITTEN:
        grown = [*text[:place], token, *text[place:]]
        expected = sum(
            bias
            for sequence, bias in biases.items()
            for first in range(max(place - len(sequence) + 1, 0), place + 1)
            if tuple(grown[first : first + len(sequence)]) == sequence
        )
        assert abs(float(scores[token]) - expected) < 1e-6


ARTICLE = 3
# an article may not stand beside a word, nor some words beside one another
BANNED = [
    *([ARTICLE, word] for word in range(4, 9)),
    *([word, ARTICLE] for word in range(4, 9)),
    *([word, word + 1] for word in range(4, VOCAB - 1)),
    *([word, 9, 11] for word in range(4, 9)),
]


def keyword_sets(count=60, doubled=False):
    """Return a canvas of keyword sets with gaps around them, doubled: each set twice, some slots closed."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(4, VOCAB, (count, 4), generator=generator)
    ids = torch.cat([torch.full((count, 1), BOS), words, *([words] if doubled else [])], 1)
    slots = torch.ones_like(ids, dtype=torch.bool)
    if doubled:
        slots[:, [2, 7]] = False
    return Canvas.from_ids(ids, slot_mask=slots)


def broken_sets(mode, count=60):
    """Return how many finished texts hold a banned sequence."""
    out = MODEL.generate(**keyword_sets(count), bad_words_ids=BANNED, max_new_tokens=9, **MODES[mode])
    return sum(any(holds(text, sequence) for sequence in BANNED) for text in out.tolist())


@every_mode
def test_no_finished_text_holds_a_bad_word_whatever_was_written_first(mode):
    assert broken_sets(mode) == 0


@pytest.mark.parametrize("mode", ["greedy", "parallel", "beams"])
def test_control_looking_to_the_left_only_breaks_the_ban(mode, monkeypatch):
    add_to = Bans.add_to
    monkeypatch.setattr(Bans, "add_to", lambda self, scores, text, place: add_to(self, scores, text[:place], place))
    assert broken_sets(mode, 20) > 5


def test_control_tokens_of_one_step_that_do_not_see_one_another_repeat():
    def repeats():
        out = MODEL.generate(
            **Canvas.from_ids(torch.tensor([[BOS, 4, 5, 6]]), slot_mask=torch.ones(1, 4, dtype=torch.bool)),
            no_repeat_ngram_size=1, parallel_slots=4, max_new_tokens=6, min_new_tokens=6,
        )  # fmt: skip
        return len(set(out[0].tolist())) < 10

    def encoded_texts(draft, rows):
        return [draft.ids[row, : draft.cache.lengths[row]].tolist() for row in rows.tolist()]

    assert not repeats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_insnext.insnext.draft.Draft.texts_as_lists", encoded_texts)
        assert repeats()


def is_repeated(canvas, ids, steps, row, n):
    """Whether an n-gram stands twice of which one occurrence was written, or left without a word in an open gap."""
    ids, steps = ([value for value, step in zip(values, steps, strict=True) if step != -2] for values in (ids, steps))
    places = iter(canvas.slot_mask[row].tolist())
    opened = [step > 0 or next(places) for step in steps]
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    free = [max(steps[i : i + n]) > 0 or any(opened[i : i + n - 1]) for i in range(len(grams))]
    return any(is_free and grams.count(gram) > 1 for gram, is_free in zip(grams, free, strict=True))


def sets_with_repetitions(canvas, n, mode, **options):
    out = MODEL.generate(**canvas, max_new_tokens=12, return_dict_in_generate=True, **options, **MODES[mode])
    copies = len(out.sequences) // canvas.rows
    texts = zip(out.sequences.tolist(), out.insertion_steps.tolist(), strict=True)
    return sum(is_repeated(canvas, ids, steps, row // copies, n) for row, (ids, steps) in enumerate(texts))


@every_mode
@pytest.mark.parametrize("n", [2, 3])
def test_no_n_gram_that_was_written_stands_twice(mode, n):
    canvas = keyword_sets(16, doubled=True)
    assert sets_with_repetitions(canvas, n, mode, no_repeat_ngram_size=n) == 0


@pytest.mark.parametrize("n", [2, 3])
def test_control_without_the_option_n_grams_stand_twice(n):
    assert sets_with_repetitions(keyword_sets(16, doubled=True), n, "greedy") > 8


def test_a_gap_that_would_leave_given_tokens_banned_gets_a_token():
    canvas = canvas_of([[(BOS, True), (4, True), (5, False), (6, False)]])
    stop_at_once = writing_model(seed=7, dtype=torch.float32)
    with torch.no_grad():
        state = stop_at_once.model(canvas.input_ids, is_causal=False).last_hidden_state[0, -1]
        stop_at_once.slot_head.stop_key.copy_(stop_at_once.slot_head.query_proj(state) * 50)
    options = dict(max_new_tokens=1, return_dict_in_generate=True)
    assert stop_at_once.generate(**canvas, **options).sequences.tolist() == canvas.input_ids.tolist()
    for banned in ([[4, 5]], [[4, 5, 6]], [[BOS, 9], [4, 5]]):
        text = stop_at_once.generate(**canvas, bad_words_ids=banned, **options).sequences[0].tolist()
        assert text[:2] == [BOS, 4] and text[3:] == [5, 6]
    # the repetition of given tokens beside one another is theirs, that across a gap is not
    twice = canvas_of([[(BOS, False), (4, False), (5, False), (4, True), (5, False)]])
    assert stop_at_once.generate(**twice, no_repeat_ngram_size=2, **options).sequences[0, 3:].tolist()[::2] == [4, 5]
    given_twice = canvas_of([[(BOS, False), (4, False), (5, False), (4, False), (5, True)]])
    stop_at_once.generate(**given_twice, no_repeat_ngram_size=2, **options)


REFUSED = [
    (dict(bad_words_ids=[[5, 6]]), r"\[5, 6\] is banned and stands in the given text of row 0"),
    (dict(bad_words_ids=[[5]]), "suppress_tokens bars tokens from being written only"),
    (dict(sequence_bias={(5, 6): float("-inf")}), r"\[5, 6\] is banned"),
    (dict(bad_words_ids=[[4, 5]], max_gap_tokens=0), r"\[4, 5\] is banned"),
    (dict(bad_words_ids=[[VOCAB]]), rf"bad_words_ids must hold tokens in \[0, {VOCAB}\), got {VOCAB}"),
    (dict(bad_words_ids=[[]]), "bad_words_ids must hold non-empty sequences"),
    (dict(sequence_bias={(4,): float("inf")}), "biases below inf"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_kept_is_refused_before_any_work(options, message, monkeypatch):
    canvas = {**canvas_of([[(BOS, True), (4, True), (5, False), (6, True)]])}
    monkeypatch.setattr("modeling_insnext.insnext.draft.Draft.encode_block", None)
    with pytest.raises(ValueError, match=message):
        MODEL.generate(**{**canvas, "max_new_tokens": 4, **options})
