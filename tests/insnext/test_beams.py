"""Beam search against all texts of a tiny vocabulary, enumerated with every order in which they can be written."""

import math
from functools import cache

import pytest
import torch
from generation_twins import BOS, TextTwin, canvas_of, tiny_model

from modeling_insnext.insnext import beam


# three tokens that can be written
MODEL = tiny_model(3, vocab_size=6)
WRITTEN = (3, 4, 5)
# scores are returned in float32
FLOAT32 = 1e-6


@cache
def all_texts(limit, merge=True, start=(BOS, 4)):
    """Return the log-probability of every text of up to `limit` insertions, ended by STOP or cut at the limit.

    All of them, breadth first. The orders that lead to one text are merged: their probabilities are added, and the
    likeliest goes on for all. Without `merge` every order goes on, and a text has the sum over all its orders.
    """
    finished, running = {}, {start: (0.0, ())}

    def add(text, log_p):
        finished[text] = log_sum(finished.get(text, -math.inf), log_p)

    for step in range(limit + 1):
        grown = {}
        for log_p, writes in running.values():
            twin = TextTwin(MODEL, start, range(len(start)))
            for number, write in enumerate(writes, 1):
                twin.insert([write], number)
            slots, stop, tokens = twin.scores()
            places, tokens = torch.cat([slots, stop[None]]).log_softmax(0), tokens.log_softmax(1)
            if step == limit:
                add(tuple(twin.tokens()), log_p)
                continue
            add(tuple(twin.tokens()), log_p + float(places[-1]))
            for slot in range(len(slots)):
                for token in WRITTEN:
                    text = twin.tokens()
                    text.insert(twin.text.index(slot) + 1, token)
                    key = tuple(text) if merge else (*writes, (slot, token))
                    new = log_p + float(places[slot] + tokens[slot, token])
                    grown.setdefault(key, []).append((new, (*writes, (slot, token))))
        running = {key: (log_sum(*(p for p, _ in orders)), max(orders)[1]) for key, orders in grown.items()}
    return finished


def log_sum(*values):
    return float(torch.logsumexp(torch.tensor(values, dtype=torch.float64), 0))


def searched(beams, **options):
    canvas = canvas_of([[(BOS, True), (4, True)]])
    out = MODEL.generate(
        **canvas,
        **{"length_penalty": 0.0, "max_new_tokens": 2, **options},
        num_beams=beams,
        return_dict_in_generate=True,
    )
    return [
        (tuple(ids[steps != -2].tolist()), float(score))
        for ids, steps, score in zip(out.sequences, out.insertion_steps, out.sequences_scores, strict=True)
    ]


def best_of(texts, count=1):
    return sorted(texts.items(), key=lambda item: -item[1])[:count]


@pytest.mark.parametrize("merge", [True, False])
def test_the_enumerated_probabilities_sum_to_1(merge):
    assert abs(sum(math.exp(log_p) for log_p in all_texts(2, merge).values()) - 1) < 1e-10


@pytest.mark.parametrize("limit", [1, 2])
def test_a_wide_beam_finds_all_texts_with_the_probability_of_all_merged_orders(limit):
    expected = best_of(all_texts(limit), 12)
    found = searched(300, max_new_tokens=limit, num_return_sequences=len(expected))
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert max(abs(score - log_p) for (_, score), (_, log_p) in zip(found, expected, strict=True)) < FLOAT32


def test_after_one_insertion_the_score_is_the_sum_over_orders_and_the_best_text_is_the_likeliest():
    # nothing is written after a merge, so no order stands for another one
    everything = all_texts(1, merge=False)
    assert (BOS, 4, 4) in everything  # written left or right of the given 4
    for text, score in searched(300, max_new_tokens=1, num_return_sequences=len(everything)):
        assert abs(score - everything[text]) < FLOAT32
    assert searched(300, max_new_tokens=1)[0][0] == best_of(everything)[0][0]


@pytest.mark.parametrize("merge", [True, False])
def test_a_beam_of_twenty_finds_the_likeliest_of_all_texts_of_three_insertions(merge):
    [(text, log_p)] = best_of(all_texts(3, merge))
    [(found, score)] = searched(20, max_new_tokens=3)
    assert found == text
    assert not merge or abs(score - log_p) < FLOAT32


def test_control_without_merging_the_probabilities_are_too_small(monkeypatch):
    texts = all_texts(1)
    count = len(texts)
    assert (
        abs(dict(searched(300, max_new_tokens=1, num_return_sequences=count))[BOS, 4, 4] - texts[BOS, 4, 4]) < FLOAT32
    )
    monkeypatch.setattr(beam, "_logaddexp", max)
    assert dict(searched(300, max_new_tokens=1, num_return_sequences=count))[BOS, 4, 4] < texts[BOS, 4, 4] - 1e-3


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_the_length_penalty_divides_by_a_power_of_the_written_tokens(early_stopping):
    for penalty in (0.5, 2.0):
        expected = {text: log_p / max(len(text) - 2, 1) ** penalty for text, log_p in all_texts(2).items()}
        found = searched(300, length_penalty=penalty, early_stopping=early_stopping, num_return_sequences=5)
        for text, score in found:
            assert abs(score - expected[text]) < FLOAT32
        if early_stopping == "never":
            assert [text for text, _ in found] == [text for text, _ in best_of(expected, 5)]


def test_early_stopping_ends_with_the_first_full_set_of_texts():
    calls = []

    def count(input_ids, scores, **kwargs):
        calls.append(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def steps_of(early_stopping):
        calls.clear()
        searched(2, max_new_tokens=9, early_stopping=early_stopping, length_penalty=3.0, stopping_criteria=[count])
        return len(calls)

    assert steps_of(True) <= steps_of(False) <= steps_of("never")
    assert steps_of(True) < steps_of("never")


def test_never_waits_for_a_text_that_several_hypotheses_lead_to():
    # two texts of 0.3 run, one of 0.45 has ended: together the two may become one of more than that
    finished = beam.Finished(1)
    finished.add((BOS,), math.log(0.45), 1, {})
    assert not finished.is_closed(math.log(0.6)) and finished.is_closed(math.log(0.3))


def test_returned_texts_differ_and_the_best_comes_first():
    found = searched(6, num_return_sequences=6)
    assert len({text for text, _ in found}) == 6
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)


def test_where_there_are_fewer_texts_than_asked_for_rows_stay_with_their_canvas():
    # nothing is open in the first canvas, so it has one text
    canvas = canvas_of([[(BOS, False), (4, False)], [(BOS, True), (5, False)]])
    out = MODEL.generate(**canvas, num_beams=3, num_return_sequences=3, max_new_tokens=3, return_dict_in_generate=True)
    assert out.sequences[:3, :2].tolist() == [[BOS, 4]] * 3
    assert out.sequences_scores[1:3].tolist() == [-math.inf] * 2
    assert all(row[0] == BOS and 5 in row for row in out.sequences[3:].tolist())
    assert len({tuple(row) for row in out.sequences[3:].tolist()}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "do_sample"),
        ({"num_return_sequences": 4}, "num_return_sequences.* .4. .* .num_beams. .3."),
        ({"parallel_slots": 2}, "parallel_slots=1, got"),
        ({"streamer": object()}, "num_beams=3"),
    ],
)
def test_beams_refuse_what_they_cannot_be_combined_with(options, message):
    with pytest.raises(ValueError, match=message):
        MODEL.generate(torch.tensor([[BOS]]), num_beams=3, max_new_tokens=2, **options)


def test_allowed_tokens_hold_in_beams():
    seen = set()

    def only_threes(row, ids):
        seen.add(row)
        return [3]

    canvas = canvas_of([[(BOS, True), (4, True)], [(BOS, True)], [(BOS, True)]])
    out = MODEL.generate(
        **canvas, num_beams=2, max_new_tokens=3, min_new_tokens=2, prefix_allowed_tokens_fn=only_threes
    )
    assert seen == {0, 1, 2}
    assert {token for row in out.tolist() for token in row} <= {0, BOS, 3, 4}


def test_a_text_that_may_not_stop_but_has_no_token_left_raises():
    with pytest.raises(ValueError, match="no token may be written .* row 0"):
        MODEL.generate(torch.tensor([[BOS]]), num_beams=2, min_new_tokens=1, suppress_tokens=list(WRITTEN))
