"""Orders against enumeration: who may be written when, and the exact distribution over the next slot."""

import itertools
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext.data import (
    ORDERS,
    InsertionCollator,
    Order,
    TargetKind,
    UnitText,
    gap_indices,
    get_mixture,
    get_order,
)


NUM_DRAWS = 1500


def make_text(lengths, given_units, sentences=None, keywords=None, rarity=None):
    """A text whose units have these lengths and, as a program, a line each; tokens are numbered from 1 on."""
    starts = np.concatenate([np.arange(n) == 0 for n in lengths])
    return UnitText(
        np.arange(1, len(starts) + 1),
        starts,
        sentences=None if sentences is None else np.array(sentences),
        given=np.repeat(np.array(given_units, dtype=bool), lengths),
        keywords=None if keywords is None else np.array(keywords, dtype=bool),
        rarity=None if rarity is None else np.array(rarity, dtype=float),
        pieces=[b"\nx" if start else b"x" for start in starts],
    )


def runs(units):
    return [[unit for _, unit in run] for _, run in itertools.groupby(enumerate(units), lambda x: x[1] - x[0])]


def grouped(groups, shuffled_groups, shuffled_inside):
    """All ways to write groups of units one after the other, each as likely as the others."""
    for order in itertools.permutations(groups) if shuffled_groups else [groups]:
        inside = [itertools.permutations(group) if shuffled_inside else [tuple(group)] for group in order]
        yield from (sum(choice, ()) for choice in itertools.product(*inside))


def tree(units):
    """Binary trees by a queue."""
    queue, out = runs(units), []
    while queue:
        part = queue.pop(0)
        middle = len(part) // 2
        out.append(part[middle])
        queue += [half for half in (part[:middle], part[middle + 1 :]) if half]
    return out


def enumerate_order(name, text):
    """Every permutation of the order, equally likely, from the order's definition."""
    missing = np.flatnonzero(~text.given_units).tolist()
    if name == "keyword_first":
        keywords = [unit for unit in missing if text.keywords[unit]]
        return list(grouped([keywords, [unit for unit in missing if unit not in keywords]], False, True))
    if name == "sentence_local":
        groups = [list(group) for _, group in itertools.groupby(missing, lambda unit: text.sentences[unit])]
        return list(grouped(groups, False, True))
    if name == "binary_tree":
        return [tuple(tree(missing))]
    return {
        "uniform": lambda: list(itertools.permutations(missing)),
        # every line is a statement
        "program_lines": lambda: list(itertools.permutations(missing)),
        "left_to_right": lambda: [tuple(missing)],
        "gap_left_to_right": lambda: list(grouped(runs(missing), True, False)),
    }[name]()


TEXTS = {
    "words": make_text([1, 2, 1, 3, 1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 0, 1]),
    "gaps": make_text([1, 2, 1, 1, 2, 1, 1], [1, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 1, 0, 0]),
    "one_gap": make_text([1, 1, 2, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
    "one_left": make_text([1, 1, 2], [1, 1, 0], [0, 0, 1], [0, 0, 1]),
    "nothing": make_text([1, 2], [1, 1], [0, 0], [0, 0]),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_is_uniform_over_its_permutations(name, text):
    rng = np.random.default_rng(0)
    expected = Counter(enumerate_order(name, text))
    total = sum(expected.values())
    counts = Counter(tuple(ORDERS[name](text, text.given_units, rng).tolist()) for _ in range(NUM_DRAWS))
    assert set(counts) <= set(expected)
    chi_square = sum(
        (counts[key] - NUM_DRAWS * n / total) ** 2 / (NUM_DRAWS * n / total) for key, n in expected.items()
    )
    freedom = len(expected) - 1
    assert chi_square <= freedom + 4 * np.sqrt(2 * freedom)


def slot_of(token, present):
    """The slot of a token: its left neighbour in the text."""
    return max(other for other in present if other < token)


def exact_next_slots(text, permutations):
    """Distribution of the next token's slot after each partly written sequence of tokens, by counting."""
    given_tokens = np.flatnonzero(text.given).tolist()
    counts = defaultdict(Counter)
    for units in permutations:
        written = text.tokens_of(np.array(units, dtype=int)).tolist()
        for step, token in enumerate(written):
            counts[tuple(written[:step])][slot_of(token, given_tokens + written[:step])] += 1
    return {
        prefix: {slot: Fraction(n, sum(slots.values())) for slot, n in slots.items()}
        for prefix, slots in counts.items()
    }


def target_slots(batch, step, by_words=True):
    """Distribution over slots that the batch asks for at the insertion of token `step`, from positions alone."""
    positions, starts = batch["positions"][0].tolist(), batch["unit_starts"][0].tolist()
    present, token = sorted(positions[:step]), positions[step]
    kind = batch["target_kinds"][0, step].item()
    if kind == TargetKind.HARD:
        return {slot_of(token, present): Fraction(1)}
    missing = dict.fromkeys(present, 0)
    for position, start in zip(positions, starts, strict=True):
        if position not in present:
            missing[slot_of(position, present)] += start if by_words else 1
    if kind == 2:
        missing = {slot: int(n > 0) for slot, n in missing.items()}
    return {slot: Fraction(n, sum(missing.values())) for slot, n in missing.items() if n}


def collate(name, text, units):
    """The batch of a text written in a fixed order, with the kinds of a registered one."""
    registered = ORDERS[name]
    order = Order(name, lambda *_: np.array(units, dtype=int), registered.kinds)
    collator = InsertionCollator(pad_token_id=0, order=order)
    piece = collator._lay_out(text, True, 1.0, np.random.default_rng(0))
    return collator._stack([piece])


def compare_with_enumeration(name, text, **measure):
    """Compare soft targets with the enumerated distribution; hard ones must be in its support.

    Returns the number of (soft, hard though random) steps.
    """
    permutations = enumerate_order(name, text)
    exact = exact_next_slots(text, permutations)
    num_context, soft, missed = int(text.given.sum()), 0, 0
    for units in permutations:
        batch = collate(name, text, units)
        positions = batch["positions"][0].tolist()
        for step in range(num_context, len(positions)):
            expected = exact[tuple(positions[num_context:step])]
            target = target_slots(batch, step, **measure)
            if batch["target_kinds"][0, step] != TargetKind.HARD:
                soft += 1
                assert target == expected, f"{name} {units} step {step}: {target} instead of {expected}"
            else:
                assert target.keys() <= expected.keys()
                missed += target != expected
    return soft, missed


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ORDERS)
def test_soft_targets_are_the_orders_conditional_distribution(name, text):
    soft, missed = compare_with_enumeration(name, text)
    if name in ("uniform", "gap_left_to_right", "left_to_right", "binary_tree"):
        assert missed == 0, "a random step has a hard target"
    if name == "uniform" and not text.given.all():
        assert soft > 0


def test_gap_boundaries_are_soft_while_more_than_one_gap_is_left():
    batch = collate("gap_left_to_right", TEXTS["gaps"], [4, 1, 2, 6])
    assert batch["target_kinds"][0].tolist() == [0, 0, 0, 2, 0, 2, 0, 0, 0]


def test_control_the_comparison_sees_weights_by_tokens():
    with pytest.raises(AssertionError, match="instead of"):
        compare_with_enumeration("uniform", TEXTS["words"], by_words=False)


@pytest.mark.parametrize(("name", "swap"), [("uniform", [0, 2, 0]), ("gap_left_to_right", [0, 0, 1])])
def test_control_the_comparison_sees_the_wrong_kind(name, swap, monkeypatch):
    order = ORDERS[name]
    monkeypatch.setitem(ORDERS, name, Order(name, order.draw, lambda *a: np.array(swap)[order.kinds(*a)]))
    with pytest.raises(AssertionError, match="instead of"):
        compare_with_enumeration(name, TEXTS["gaps"])


@st.composite
def texts(draw):
    num_units = draw(st.integers(1, 12))
    column = st.lists(st.integers(0, 1), min_size=num_units, max_size=num_units)
    lengths = draw(st.lists(st.integers(1, 3), min_size=num_units, max_size=num_units))
    return make_text(lengths, [1] + draw(column)[1:], np.cumsum(draw(column)), draw(column), range(num_units))


@given(texts(), st.sampled_from(sorted(ORDERS)), st.integers(0, 9))
@settings(deadline=None, max_examples=150)
def test_every_order_permutes_the_missing_units_and_writes_words_left_to_right(text, name, seed):
    rng = np.random.default_rng(seed)
    units, kinds = get_mixture(name).draw(text, text.given_units, rng)
    assert sorted(units.tolist()) == np.flatnonzero(~text.given_units).tolist()
    assert kinds.shape == units.shape
    batch = collate(name, text, units)
    positions = batch["positions"][0].numpy()[text.given.sum() :]
    inside = ~text.unit_starts[positions]
    assert (positions[1:][inside[1:]] == positions[:-1][inside[1:]] + 1).all()
    assert not batch["target_kinds"][0].numpy()[text.given.sum() :][inside].any()


def test_keywords_by_rarity_come_rarest_first():
    text = make_text([1] * 9, [1] + [0] * 8, rarity=[0, 3, 1, 9, 2, 4, 7, 5, 6])
    for seed in range(5):
        assert ORDERS["keyword_first"](text, text.given_units, np.random.default_rng(seed)).tolist()[:2] == [3, 6]


def test_gaps_are_runs_of_missing_units():
    assert gap_indices(np.array([1, 0, 0, 1, 0, 1, 1, 0], dtype=bool)).tolist() == [0, 0, 1, 2]


def test_a_mixture_draws_by_weight():
    mixture = get_mixture({"left_to_right": 3, lambda text, given_units, rng: np.array([3, 2, 1]): 1})
    text, rng = make_text([1] * 4, [1, 0, 0, 0]), np.random.default_rng(0)
    backwards = sum(mixture.draw(text, text.given_units, rng)[0][0] == 3 for _ in range(2000))
    assert abs(backwards - 500) < 4 * np.sqrt(2000 * 3 / 16)
    assert mixture.probabilities == get_mixture([("left_to_right", 0.75), ("uniform", 0.25)]).probabilities


@pytest.mark.parametrize("drawn", [[1, 1], [1], [0, 1], [[1, 2]], [1, 3]])
def test_a_callable_must_return_a_permutation(drawn):
    text = make_text([1] * 3, [1, 0, 0])
    with pytest.raises(ValueError, match=r"order 'mine' must return a permutation of the 2 missing units \[1, 2\]"):
        Order("mine", lambda *_: drawn)(text, text.given_units, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("unifrom", ValueError, "order must be one of binary_tree, gap_left_to_right, .*, got 'unifrom'"),
        ({"uniform": 1, "l2r": 1}, ValueError, "got 'l2r'"),
        ({}, ValueError, "at least one order"),
        ({"uniform": 0}, ValueError, "weight of order 'uniform' must be a finite number above 0, got 0"),
        ([("uniform", float("nan"))], ValueError, "got nan"),
        (["uniform", "left_to_right"], TypeError, "list of pairs"),
        (3, TypeError, "list of pairs .order, weight., got 3"),
        ([(3, 1.0)], TypeError, "an order must be a name or a callable, got 3"),
    ],
)
def test_bad_orders_are_refused(spec, error, message):
    with pytest.raises(error, match=message):
        get_mixture(spec)


@pytest.mark.parametrize(
    ("name", "message"), [("keyword_first", "need keywords or rarity"), ("sentence_local", "set sentence_ends")]
)
def test_orders_say_what_a_text_lacks(name, message):
    text = make_text([1] * 3, [1, 0, 0])
    with pytest.raises(ValueError, match=message):
        get_order(name)(text, text.given_units, np.random.default_rng(0))
