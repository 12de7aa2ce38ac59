"""Beam search against all texts of a tiny vocabulary, enumerated with every order in which they can be written."""

import math
from functools import cache

import pytest
import torch

from modeling_insnext.insnext import write_beam
from tests.support.generation_twins import TextTwin, canvas_of, writing_model
from tests.support.insnext import BOS


# three tokens that can be written
MODEL = writing_model(seed=3, vocab_size=6)
WRITTEN = (3, 4, 5)
# scores are returned in float32
FLOAT32 = 1e-6


@cache
def all_texts(limit, start=(BOS, 4), model=MODEL):
    """Return the log-probability of every text of up to `limit` insertions, ended by STOP or cut at the limit.

    All orders of writing, breadth first; a text has the sum over its orders.
    """
    finished, running = {}, [(0.0, ())]
    for step in range(limit + 1):
        grown = []
        for log_p, writes in running:
            twin = TextTwin(model, start, range(len(start)))
            for number, write in enumerate(writes, 1):
                twin.insert([write], number)
            text = tuple(twin.tokens())
            if step == limit:
                finished.setdefault(text, []).append(log_p)
                continue
            slots, stop, tokens = twin.scores()
            places, tokens = torch.cat([slots, stop[None]]).log_softmax(0), tokens.log_softmax(1)
            finished.setdefault(text, []).append(log_p + float(places[-1]))
            for slot in range(len(slots)):
                for token in WRITTEN:
                    grown.append((log_p + float(places[slot] + tokens[slot, token]), (*writes, (slot, token))))
        running = grown
    return {text: log_sum(*orders) for text, orders in finished.items()}


def log_sum(*values):
    return float(torch.logsumexp(torch.tensor(values, dtype=torch.float64), 0))


def searched(beams, model=MODEL, **options):
    out = model.generate(
        **canvas_of([[(BOS, True), (4, True)]]),
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


def test_the_enumerated_probabilities_sum_to_1():
    assert abs(sum(math.exp(log_p) for log_p in all_texts(2).values()) - 1) < 1e-10


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_once_all_orders_fit_every_text_is_found_with_the_sum_over_its_orders(limit):
    # 2 slots x 3 tokens, then 3 x 3, then 4 x 3: 648 orders of three insertions
    expected = best_of(all_texts(limit), 12)
    found = searched(648, max_new_tokens=limit, num_return_sequences=len(expected))
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert max(abs(score - log_p) for (_, score), (_, log_p) in zip(found, expected, strict=True)) < FLOAT32


@pytest.mark.parametrize("beams", [2, 4, 8, 20])
def test_a_score_is_a_lower_bound_of_the_log_probability(beams):
    texts = all_texts(3)
    for text, score in searched(beams, max_new_tokens=3, num_return_sequences=beams):
        assert score == -math.inf or score < texts[text] + FLOAT32


def test_control_a_state_that_stands_for_other_orders_breaks_the_bound(monkeypatch):
    def merged(pool, beams):
        # one order goes on for all and is handed their probability
        kept = [max(mine, key=lambda each: each.candidate.log_p) for mine in by_text(whole(pool, 10**6)).values()]
        kept = [each._replace(candidate=each.candidate._replace(log_p=each.log_mass)) for each in kept]
        return sorted(kept, key=lambda each: -each.log_mass)[:beams]

    def by_text(kept):
        groups = {}
        for each in kept:
            groups.setdefault(each.text, []).append(each)
        return groups

    whole = write_beam._kept
    monkeypatch.setattr(write_beam, "_kept", merged)
    texts = all_texts(3)
    found = searched(648, max_new_tokens=3, num_return_sequences=20)
    assert max(abs(score - texts[text]) for text, score in found) > 1e-3


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 24), marks=pytest.mark.slow)], ids=["8", "16 more"])
def test_more_beams_than_texts_find_the_likeliest_text_of_random_models(seeds):
    for seed in seeds:
        model = writing_model(seed=seed, vocab_size=6)
        texts = all_texts(3, model=model)
        [(found, score)] = searched(len(texts), model, max_new_tokens=3)
        [(text, log_p)] = best_of(texts)
        assert found == text and abs(score - log_p) < FLOAT32


def test_control_without_the_other_orders_the_probabilities_are_too_small(monkeypatch):
    texts = all_texts(1)
    count = len(texts)

    def score_of_doubled():
        # written left or right of the given 4
        return dict(searched(300, max_new_tokens=1, num_return_sequences=count))[BOS, 4, 4]

    assert abs(score_of_doubled() - texts[BOS, 4, 4]) < FLOAT32
    monkeypatch.setattr(write_beam, "log_sum", max)
    assert score_of_doubled() < texts[BOS, 4, 4] - 1e-3


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
    finished = write_beam.Finished(1)
    finished.add((0, BOS), math.log(0.45), {})
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
