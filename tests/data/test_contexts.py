from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext.data import ContextMixture, UnitText


def make_text(num_units, given=None, **scores):
    return UnitText(np.arange(num_units), np.ones(num_units, dtype=bool), given=given, **scores)


def draw_many(mixture, text, number=2000):
    rng = np.random.default_rng(0)
    return [mixture.draw_given(text, rng) for _ in range(number)]


def assert_uniform(values, support):
    counts, expected = Counter(values), len(values) / len(support)
    assert set(counts) == set(support)
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in counts.values())


@pytest.mark.parametrize("name", ["words", "prefix"])
def test_sizes_are_uniform_and_something_is_left(name):
    draws = draw_many(ContextMixture(**{name: 1.0}), make_text(6))
    assert all(draw[0] for draw in draws)
    assert_uniform([int(draw.sum()) - 1 for draw in draws], range(5))


def test_words_are_drawn_alike():
    draws = np.array(draw_many(ContextMixture(words=1.0), make_text(6)))
    assert np.abs(draws[:, 1:].mean(0) - 0.4).max() < 0.05


def test_a_prefix_is_a_prefix():
    assert all((np.diff(draw.astype(int)) <= 0).all() for draw in draw_many(ContextMixture(prefix=1.0), make_text(6)))


def test_spans_leave_one_to_three_gaps():
    draws = draw_many(ContextMixture(spans=1.0), make_text(9))
    gaps = [int((np.diff(draw.astype(int)) < 0).sum()) for draw in draws]
    assert_uniform(gaps, [1, 2, 3])
    assert all(draw_many(ContextMixture(spans=1.0), make_text(2))[0] == [True, False])


def test_keywords_come_from_the_keywords():
    keywords = np.array([0, 1, 0, 1, 0, 1], dtype=bool)
    draws = draw_many(ContextMixture(keywords=1.0), make_text(6, keywords=keywords))
    assert not any((draw[1:] & ~keywords[1:]).any() for draw in draws)
    assert_uniform([int(draw.sum()) - 1 for draw in draws], range(4))


def test_weights_are_those_of_the_mixture():
    mixture = ContextMixture(words=0.2, prefix=0.3)
    full = sum(draw.sum() == 1 for draw in draw_many(mixture, make_text(11)))
    assert abs(full - 2000 * (0.5 + 0.5 / 10)) < 5 * np.sqrt(500)


@given(
    st.integers(1, 12).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)),
    st.sampled_from(["words", "spans", "prefix", "keywords"]),
    st.integers(0, 99),
)
@settings(deadline=None)
def test_what_is_given_stays_given_and_something_is_left(flags, name, seed):
    flags[0] = True
    text = make_text(len(flags), given=np.array(flags), keywords=np.array(flags[::-1]))
    drawn = ContextMixture(**{name: 1.0}).draw_given(text, np.random.default_rng(seed))
    assert drawn[np.array(flags)].all()
    assert drawn.all() == all(flags)


def test_reencoded_lengths_are_uniform_over_tokens():
    rng = np.random.default_rng(0)
    draws = [ContextMixture(reencode=1.0).draw_blocks(4, rng) for _ in range(2000)]
    assert {second for _, second in draws} == {0}
    assert_uniform([first for first, _ in draws], range(5))


def test_windows_have_two_tokens_or_more_and_fit():
    rng = np.random.default_rng(0)
    draws = [ContextMixture(windowed=1.0).draw_blocks(4, rng) for _ in range(5000)]
    assert_uniform([first for first, _ in draws], range(5))
    assert_uniform([second for first, second in draws if first == 0], [2, 3, 4])
    assert {second for first, second in draws if first >= 3} == {0}


def test_blocks_strike_as_often_as_asked():
    rng = np.random.default_rng(0)
    draws = [ContextMixture(reencode=0.3, windowed=0.2).draw_blocks(1000, rng) for _ in range(4000)]
    assert abs(sum(second > 0 for _, second in draws) / 4000 - 0.2) < 0.04
    assert abs(sum(first == 0 for first, _ in draws) / 4000 - 0.5) < 0.04


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": -0.1}, r"words must be a probability in \[0, 1\], got -0.1"),
        ({"reencode": 1.5}, r"reencode must be a probability in \[0, 1\], got 1.5"),
        ({"spans": "0.5"}, "spans must be a probability .*, got '0.5'"),
        ({"words": 0.6, "prefix": 0.6}, r"words \+ spans \+ prefix \+ keywords must be at most 1, got 1.2"),
        ({"reencode": 0.6, "windowed": 0.6}, r"reencode \+ windowed must be at most 1, got 1.2"),
    ],
)
def test_bad_probabilities_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContextMixture(**options)


def test_keyword_contexts_say_what_a_text_lacks():
    with pytest.raises(ValueError, match="need keywords or rarity"):
        ContextMixture(keywords=1.0).draw_given(make_text(3), np.random.default_rng(0))
