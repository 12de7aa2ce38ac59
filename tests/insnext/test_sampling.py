"""Options of `generate`: what is drawn, when it ends, what processors, criteria and streamers see."""

import math

import pytest
import torch
from transformers import LogitsProcessor

from modeling_insnext.insnext.generation_configuration import InsertionGenerationConfig
from modeling_insnext.insnext.write_sample import RowSampler, choose_slots
from tests.support.generation_twins import TextTwin, canvas_of, draft_of, writing_model
from tests.support.insnext import BOS, EOS, PAD
from tests.support.one_canvas import CANVAS, MODEL, PROMPT, Watch, run, written


def test_draws_have_the_frequencies_of_softmax():
    scores = torch.tensor([[0.5, -1.0, 2.0, -math.inf, 1.0]], dtype=torch.float64)
    draws = 4000
    sampler = RowSampler(draws, True, list(range(draws)), "cpu")
    many = scores.expand(draws, -1)
    chosen = sampler.add_noise(many, torch.full((draws,), 5)).argmax(1)
    frequency = chosen.bincount(minlength=5) / draws
    p = scores[0].softmax(0)
    # four standard deviations of a proportion
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / draws).sqrt()).all()
    greedy = RowSampler(draws, False, None, "cpu")
    assert (greedy.add_noise(many, torch.full((draws,), 5)).argmax(1) == 2).all()


def slot_frequencies(draws=3000, **options):
    """Return how often each slot, and STOP as the last, is drawn first, and the logits of the twin."""
    config = InsertionGenerationConfig(
        do_sample=True, **{"slot_temperature": 1.0, "slot_top_p": 1.0, "parallel_slots": 1, **options}
    )
    with torch.no_grad():
        draft = draft_of(MODEL, CANVAS.repeat(draws), 3)
        slots, takes = choose_slots(draft, RowSampler(draws, True, 5, "cpu"), config)
        logits, stop, _ = TextTwin(MODEL, PROMPT[0].tolist(), [0, -1, 1, 2]).scores()
    chosen = torch.where(takes[:, 0], slots[:, 0], 4)
    return chosen.bincount(minlength=5) / draws, torch.cat([logits, stop[None]]).index_fill(
        0, torch.tensor(1), -math.inf
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 20.0])
def test_slots_are_drawn_from_their_softmax_over_slot_temperature(temperature):
    frequency, logits = slot_frequencies(slot_temperature=temperature)
    p = (logits / temperature).softmax(0)
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / 3000).sqrt() + 1e-12).all()
    assert frequency[1] == 0
    other = (logits / (temperature * 3)).softmax(0)
    assert ((frequency - other).abs() > 4 * (other * (1 - other) / 3000).sqrt()).any()


def test_slot_top_p_cuts_the_tail_of_the_slots():
    frequency, logits = slot_frequencies(slot_temperature=8.0, slot_top_p=0.6)
    p, order = (logits / 8).softmax(0).sort(descending=True)
    kept = order[: int((p.cumsum(0) < 0.6).sum()) + 1]
    assert set(frequency.nonzero().squeeze(1).tolist()) == set(kept.tolist())
    assert 1 < len(kept) < 4


def test_a_row_that_draws_several_slots_has_them_distinct_and_before_stop():
    config = InsertionGenerationConfig(do_sample=True, slot_temperature=5.0, slot_top_p=1.0, parallel_slots=4)
    with torch.no_grad():
        slots, takes = choose_slots(draft_of(MODEL, CANVAS.repeat(200), 3), RowSampler(200, True, 5, "cpu"), config)
    counts = takes.sum(1)
    assert set(counts.tolist()) == {0, 1, 2, 3}
    for row, count in zip(slots.tolist(), counts.tolist(), strict=True):
        assert len(set(row[:count])) == count and set(row[:count]) <= {0, 2, 3}


def test_stop_ends_a_text_and_min_new_tokens_bars_it():
    stopping = writing_model(seed=0)
    with torch.no_grad():
        stopping.slot_head.stop_key.copy_(
            stopping.slot_head.query_proj(stopping.model(PROMPT, is_causal=False).last_hidden_state[0, -1]) * 50
        )
    assert run(stopping, min_new_tokens=0).sequences.tolist() == PROMPT.tolist()
    for least in (1, 3):
        assert len(written(run(stopping, min_new_tokens=least))) >= least
    assert len(written(run(stopping, min_new_tokens=8))) == 8


def test_slot_window_keeps_to_the_last_insertions_and_opens_all_slots_where_none_is_near():
    near = 0
    for seed in range(12):
        out = run(do_sample=True, seed=seed, slot_temperature=9.0, slot_window=2)
        order = sorted((int(step), place) for place, step in enumerate(out.insertion_steps[0]) if step > 0)
        for step, place in order[2:]:
            before = [p for p in range(out.sequences.shape[1]) if out.insertion_steps[0, p] < step]
            index = sum(p < place for p in before)
            sides = {int(out.insertion_steps[0, p]) for p in before[index - 1 : index + 1]}
            assert sides & {step - 1, step - 2}
            near += 1
    assert near == 12 * 6
    # control: without the window some insertion is far from the last two
    out = run(do_sample=True, seed=1, slot_temperature=9.0)
    steps = [int(step) for step in out.insertion_steps[0]]
    assert any(min(abs(steps.index(s) - steps.index(s - 1)), abs(steps.index(s) - steps.index(s - 2))) > 2
               for s in range(3, 9))  # fmt: skip
    # the gaps beside what was written are full, so the window has nothing open
    full = MODEL.generate(**{**CANVAS, "max_gap_tokens": torch.tensor([[1, 1, 1]])}, max_new_tokens=3,
                          min_new_tokens=3, slot_window=1)  # fmt: skip
    assert full.shape[1] == 7


def test_processors_see_all_tokens_and_the_slot_at_the_end():
    watch = Watch()
    out = run(logits_processor=[watch])
    text = {0: BOS}
    order = sorted((int(step), place) for place, step in enumerate(out.insertion_steps[0]))
    for seen, (step, place) in zip(watch.seen, [entry for entry in order if entry[0] > 0], strict=True):
        text = [p for p in range(out.sequences.shape[1]) if out.insertion_steps[0, p] < step]
        left = [int(out.sequences[0, p]) for p in text if p < place]
        right = [int(out.sequences[0, p]) for p in text if p > place]
        assert seen[0].tolist() == right + left


def test_processors_of_a_ragged_batch_see_pads_on_the_left_only():
    watch = Watch()
    canvas = canvas_of([[(BOS, True), (5, True), (6, True)], [(BOS, True)]])
    MODEL.generate(**canvas, max_new_tokens=3, min_new_tokens=3, logits_processor=[watch])
    for seen in watch.seen:
        for row in seen.tolist():
            assert PAD not in row[row.count(PAD) :] and row[row.count(PAD) :].count(BOS) == 1


def test_no_processor_brings_back_what_is_never_written():
    class End(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -5.0).index_fill(1, torch.tensor([PAD, BOS, EOS]), 99.0)

    assert not {PAD, BOS, EOS} & {int(token) for token in written(run(logits_processor=[End()]))}


ACTS = {
    "temperature": ({"do_sample": True, "seed": 3, "temperature": 0.01}, {"do_sample": True, "seed": 3}),
    "top_k": (
        {"do_sample": True, "seed": 3, "top_k": 1, "temperature": 30.0},
        {"do_sample": True, "seed": 3, "top_k": 9, "temperature": 30.0},
    ),
    "top_p": ({"do_sample": True, "seed": 3, "top_p": 0.01}, {"do_sample": True, "seed": 3}),
    "repetition_penalty": ({"repetition_penalty": 9.0}, {}),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, {}),
    "bad_words_ids": ({"bad_words_ids": [[7]]}, {}),
    "suppress_tokens": ({"suppress_tokens": [4, 7]}, {}),
    "prefix_allowed_tokens_fn": ({"prefix_allowed_tokens_fn": lambda row, ids: [6, 7]}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTS)
def test_an_option_of_the_token_scores_acts(name):
    changed, plain = (run(**options).sequences.tolist() for options in ACTS[name])
    assert changed != plain


def test_what_is_barred_is_not_written():
    assert 7 not in tokens_of(bad_words_ids=[[7]]) and not {4, 7} & tokens_of(suppress_tokens=[4, 7])
    assert tokens_of(prefix_allowed_tokens_fn=lambda row, ids: [6, 8]) <= {6, 8}
    once = run(no_repeat_ngram_size=1, max_new_tokens=7, min_new_tokens=7).sequences[0].tolist()
    assert len(set(once)) == len(once) == 11


def tokens_of(**options):
    return set(map(int, written(run(**options))))


def test_bad_words_of_several_tokens_are_not_completed_at_the_slot():
    def completed(out, pair):
        steps, ids = out.insertion_steps[0].tolist(), out.sequences[0].tolist()
        places = [place for place in range(1, len(ids)) if (ids[place - 1], ids[place]) == pair]
        # at the slot: the right one of the pair was written after the left one
        return any(steps[place] > steps[place - 1] for place in places)

    pair = (5, 7)
    assert completed(run(), pair)
    assert not completed(run(bad_words_ids=[list(pair)]), pair)


def test_allowed_tokens_are_asked_for_with_the_row_of_the_canvas_and_the_text_without_pads():
    asked = []
    canvas = canvas_of([[(BOS, True)], [(BOS, True), (5, True), (6, True)]])
    canvas["max_gap_tokens"] = torch.tensor([[1, -1, -1], [-1, -1, -1]])

    def allowed(row, ids):
        asked.append((row, len(ids)))
        assert PAD not in ids
        return [7] if row == 0 else [8]

    out = MODEL.generate(
        **canvas, max_new_tokens=4, min_new_tokens=1, prefix_allowed_tokens_fn=allowed, return_dict_in_generate=True
    )
    assert set(map(int, written(out, 0))) == {7} and set(map(int, written(out, 1))) == {8}
    assert {length for row, length in asked if row == 0} == {1}


def test_a_slot_in_which_every_token_is_barred_raises():
    with pytest.raises(ValueError, match="no token may be written into the chosen slot of row 0"):
        run(suppress_tokens=list(range(3, 13)))
