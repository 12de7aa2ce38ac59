"""Scores against brute force, Wilson intervals against their definition and printed values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext.tasks import (
    NeedleQuestion,
    NeedleSample,
    NeedleScore,
    NeedleTally,
    answer_score,
    generated_score,
    needle_scores,
    wilson_interval,
)


KINDS = ("passkey", "multi_key", "two_hop")
VOCAB = 3
HIT, MISS = NeedleScore(True, True), NeedleScore(False, False)


def make_sample(kind, ids, ends_and_stops):
    questions = tuple(NeedleQuestion(end, end, stop, (0,)) for end, stop in ends_and_stops)
    return NeedleSample(kind, np.array(ids), ((0, 1),), (0.0,), questions)


class TableModel:
    """A language model whose next token is random, and a function of all tokens before it."""

    def __init__(self, seed):
        self.seed = seed

    def next_logits(self, ids):
        return np.random.default_rng([self.seed, *ids]).random(VOCAB)

    def forward(self, ids):
        return torch.tensor(np.array([self.next_logits(ids[: i + 1]) for i in range(len(ids))]))

    def generate(self, ids, count):
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.next_logits(ids).argmax()))
        return ids[-count:]


@given(
    st.sampled_from(KINDS), st.integers(0, 10**6), st.lists(st.integers(0, VOCAB - 1), min_size=12, max_size=12),
    st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_the_whole_answer_is_right_if_and_only_if_greedy_generation_writes_it(kind, seed, ids, answer_tokens):
    model = TableModel(seed)
    sample = make_sample(kind, ids, [(4, 5 + answer_tokens), (8, 9 + answer_tokens)])
    for number, score in enumerate(needle_scores(model.forward(ids), sample)):
        question = sample.questions[number]
        written = model.generate(ids[: question.end + 1], answer_tokens)
        answer = ids[question.end + 1 : question.stop]
        at = question.end + 1 if kind != "two_hop" else question.stop - 1
        assert score.exact == (written == answer)
        assert score.published == (int(model.next_logits(ids[:at]).argmax()) == ids[at])
        generated = generated_score(written + [0, 0], sample, number)
        assert generated.exact == score.exact
        assert generated.published in (score.published, None if written[:-1] != answer[:-1] else score.published)


def logits_that_say(tokens):
    """Logits whose argmax at i - 1 is token i."""
    return torch.nn.functional.one_hot(torch.tensor([*tokens[1:], 0]), 10).float()


IDS = [9, 8, 7, 6, 1, 2, 3, 5, 5]


@pytest.mark.parametrize(
    ("said", "passkey", "two_hop"),
    [
        ([1, 2, 3], (True, True), (True, True)),
        ([1, 2, 4], (False, True), (False, False)),
        ([4, 2, 3], (False, False), (False, True)),
        ([1, 4, 3], (False, True), (False, True)),
    ],
)
def test_the_published_score_is_one_token_given_the_others(said, passkey, two_hop):
    logits = logits_that_say([*IDS[:4], *said, *IDS[7:]])
    for kind, expected in (("passkey", passkey), ("multi_key", passkey), ("two_hop", two_hop)):
        sample = make_sample(kind, IDS, [(3, 7)])
        assert needle_scores(logits, sample) == [expected]
        assert needle_scores(logits[None], sample) == needle_scores(logits[-6:].bfloat16(), sample) == [expected]


def test_control_logits_one_token_off_are_wrong():
    sample = make_sample("passkey", IDS, [(3, 7)])
    assert needle_scores(logits_that_say(IDS), sample) == [HIT]
    assert needle_scores(logits_that_say(IDS).roll(1, 0), sample) == [MISS]
    assert needle_scores(logits_that_say(IDS).roll(-1, 0), sample) == [MISS]


def test_the_logits_of_the_answer_alone_say_the_same():
    sample = make_sample("two_hop", IDS, [(1, 3), (3, 7)])
    logits = logits_that_say([9, 8, 7, 0, 1, 0, 3, 5, 5])
    both = [answer_score(logits[1:2], sample, 0), answer_score(logits[3:6], sample)]
    assert both == needle_scores(logits, sample) == [(True, True), (False, True)]
    for wrong in (logits[3:7], logits[None, 3:6]):
        with pytest.raises(ValueError, match=r"logits must be \[3, V\], one a token of the answer, got"):
            answer_score(wrong, sample)


def test_generated_answers():
    passkey, two_hop = make_sample("passkey", IDS, [(3, 7)]), make_sample("two_hop", IDS, [(3, 7)])
    assert generated_score(torch.tensor([1, 2, 3, 9]), passkey) == generated_score([1, 2, 3], two_hop) == HIT
    assert generated_score([1, 2], passkey) == generated_score(np.array([1, 5, 3]), passkey) == (False, True)
    assert generated_score([2, 2, 3], passkey) == generated_score([], passkey) == MISS
    assert generated_score([1, 2, 9, 3], two_hop) == MISS
    # what the last token would have been after a right beginning is not known
    assert generated_score([4, 2, 3], two_hop) == generated_score([1, 2], two_hop) == (False, None)
    with pytest.raises(ValueError, match=r"new_ids must be the tokens of one text, \[N\], got \(1, 3\)"):
        generated_score([[1, 2, 3]], passkey)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 10), "logits must be those of the last 6 to 9 tokens, got 5"),
        ((10, 10), "logits must be those of the last 6 to 9 tokens, got 10"),
        ((2, 9, 10), r"logits must be \[K, V\] or \[1, K, V\], got \(2, 9, 10\)"),
    ],
)
def test_bad_logits(shape, message):
    with pytest.raises(ValueError, match=message):
        needle_scores(torch.zeros(shape), make_sample("passkey", IDS, [(3, 7)]))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, table I, method 3; the last two by hand
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718),
     (97, 100, 0.9155, 0.9897), (0, 1, 0, 0.7935)],
)  # fmt: skip
def test_wilson_interval_of_printed_examples(successes, n, low, high):
    assert np.round(wilson_interval(successes, n), 4).tolist() == pytest.approx([low, high])
    mirrored = wilson_interval(n - successes, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx(wilson_interval(successes, n))


@given(st.integers(1, 10**6), st.data(), st.floats(0.01, 0.999))
@settings(deadline=None)
def test_wilson_interval_holds_the_rate_and_its_ends_solve_the_equation(n, data, confidence):
    successes = data.draw(st.integers(0, n))
    low, high = wilson_interval(successes, n, confidence)
    assert 0 <= low <= successes / n <= high <= 1
    assert (low == 0.0) == (successes == 0) and (high == 1.0) == (successes == n)
    for end in (low, high):
        if 0 < end < 1:
            z = abs(successes / n - end) / math.sqrt(end * (1 - end) / n)
            assert math.erf(z / math.sqrt(2)) == pytest.approx(confidence, abs=1e-6)


def test_wilson_interval_covers_where_the_simple_one_does_not():
    """Coverage at p = 0.97, n = 100, by summing the binomial distribution."""
    n, p = 100, 0.97
    mass = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    wilson = [low <= p <= high for low, high in (wilson_interval(k, n) for k in range(n + 1))]
    wald = [abs(k / n - p) <= 1.96 * math.sqrt(k / n * (1 - k / n) / n) for k in range(n + 1)]
    assert np.dot(mass, wilson) > 0.93 > np.dot(mass, wald)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 0), "n must be at least 1, got 0"),
        ((3, 2), "successes must be in 0..2, got 3"),
        ((-1, 2), "successes must be in 0..2, got -1"),
        ((1, 2, 1.0), "confidence must be between 0 and 1, got 1.0"),
        ((1, 2, 0), "confidence must be between 0 and 1, got 0"),
    ],
)
def test_bad_intervals(numbers, message):
    with pytest.raises(ValueError, match=message):
        wilson_interval(*numbers)


def test_a_tally_always_says_n_and_the_interval():
    tally = NeedleTally()
    assert str(tally) == "whole answer - (n=0), published score - (n=0)"
    assert tally.summary() == {"exact": {"right": 0, "n": 0}, "published": {"right": 0, "n": 0}}
    tally.add(NeedleScore(i < 97, i < 99) for i in range(99))
    tally.add(NeedleScore(False, None))
    assert str(tally) == "whole answer 97.0 % (n=100, 91.5-99.0), published score 100.0 % (n=99, 96.3-100.0)"
    low, high = wilson_interval(97, 100)
    assert tally.summary()["exact"] == {"right": 97, "n": 100, "rate": 0.97, "low": low, "high": high}
    wider = NeedleTally(confidence=0.99)
    wider.add([HIT] * 97 + [MISS] * 3)
    assert str(wider).startswith("whole answer 97.0 % (n=100, 88.9-99.2)")
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        NeedleTally(confidence=95)
