"""Likelihood by enumeration: on a tiny vocabulary all paths of insertion are walked, and `score` must agree."""

import math
from itertools import combinations, permutations, product

import pytest
import torch

import modeling_insnext.insnext.attention as attention
import modeling_insnext.insnext.scoring as scoring
from modeling_insnext.insnext.scoring import _draw_orders
from tests.support.equality import difference, same_bits
from tests.support.insnext import tiny_model


BUDGET = 1e-10
WORDS = (3, 4, 5)
MOST = 3


def small_model(seed=0, **overrides):
    return tiny_model(vocab_size=6, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16,
                      seed=seed, **overrides)  # fmt: skip


@torch.no_grad()
def next_step(model, ids, positions, context=1):
    """Return the probability of STOP, and of every (slot, token) of a partly written text, slots left to right."""
    head = model.slot_head
    fields = {"positions": torch.tensor([positions]), "context_length": context}
    hidden = model.model(torch.tensor([ids]), **fields).last_hidden_state[0]
    text = sorted(range(len(ids)), key=positions.__getitem__)
    right = [head.right_proj(hidden[entry]) for entry in text[1:]] + [head.right_proj(head.edge)]
    u = torch.stack([head.left_proj(hidden[entry]) + r for entry, r in zip(text, right, strict=True)])
    z = torch.cat([head.key_proj(u), head.stop_key[None]]) @ head.query_proj(hidden[-1]) / 16**0.5
    p = (30 * torch.tanh(z / 30)).softmax(0)
    logits = model.lm_head(head.norm(u + head.state_proj(hidden[-1])))
    logits[:, :3] = -torch.inf
    return p[-1], p[:-1, None] * logits.softmax(1)


def paths(model, ids, positions, context=1, most=MOST):
    """Yield (text, order of places, log p, stopped) of every path, stopped or cut after `most` insertions."""
    start = len(ids)

    def walk(ids, positions, log_p):
        stop, choices = next_step(model, ids, positions, context)
        text = tuple(token for _, token in sorted(zip(positions, ids, strict=True)))
        yield text, tuple(positions[start:]), log_p + stop.log(), True
        if len(ids) - start == most:
            # cut: what goes on is one event
            yield text, tuple(positions[start:]), log_p + choices.sum().log(), False
            return
        for slot in range(choices.shape[0]):
            moved = [p + (p > slot) for p in positions]
            for token in WORDS:
                yield from walk([*ids, token], [*moved, slot + 1], log_p + choices[slot, token].log())

    yield from walk(list(ids), list(positions), torch.zeros((), dtype=torch.float64))


def orders_of(m):
    return torch.tensor(list(permutations(range(m))), dtype=torch.long).reshape(math.factorial(m), m)


def test_all_paths_stopped_or_cut_have_probability_one():
    total = torch.stack([log_p for *_, log_p, _ in paths(small_model(), [1], [0])]).exp().sum()
    assert difference(total, torch.ones_like(total)) < BUDGET


def test_without_stop_they_do_not():
    """Control: leaving the probability of the stopped paths out breaks the sum."""
    total = torch.stack([log_p for *_, log_p, stopped in paths(small_model(), [1], [0]) if not stopped]).exp().sum()
    assert total < 1 - 1e-3


def test_scores_of_all_texts_over_all_orders_sum_to_one():
    """Texts of up to two tokens stopped, and everything of three tokens whatever comes after."""
    model, total = small_model(), torch.zeros((), dtype=torch.float64)
    for m in range(MOST + 1):
        for words in product(WORDS, repeat=m):
            ids = torch.tensor([[1, *words]])
            total += model.score(ids, orders=orders_of(m), stop=m < MOST)[0].exp()
    assert difference(total, torch.ones_like(total)) < BUDGET


def test_the_score_over_all_orders_is_the_sum_over_the_paths_that_write_the_text():
    model = small_model()
    by_text = {}
    for text, _, log_p, stopped in paths(model, [1], [0]):
        if stopped:
            by_text.setdefault(text, []).append(log_p)
    assert len(by_text) == 1 + 3 + 9 + 27
    for text, terms in by_text.items():
        m = len(text) - 1
        assert len(terms) == math.factorial(m)
        expected = torch.stack(terms).logsumexp(0)
        score = model.score(torch.tensor([text]), orders=orders_of(m))[0]
        assert difference(score, expected) < BUDGET


def test_every_order_has_the_probability_of_its_own_path():
    model = small_model()
    found = {}
    for text, places, log_p, stopped in paths(model, [1], [0]):
        if stopped and text == (1, 3, 5, 4):
            found[places] = log_p
    assert len(found) == 6
    for places, log_p in found.items():
        order = torch.tensor([places]) - 1
        assert difference(model.score(torch.tensor([[1, 3, 5, 4]]), orders=order)[0], log_p) < BUDGET


def test_paths_behind_a_context_sum_to_one_and_score_agrees():
    model, total = small_model(), torch.zeros((), dtype=torch.float64)
    terms = [
        (text, log_p, stopped) for text, _, log_p, stopped in paths(model, [1, 4, 3], [0, 1, 2], context=3, most=2)
    ]
    ones = torch.stack([log_p for _, log_p, _ in terms]).exp().sum()
    assert difference(ones, torch.ones_like(ones)) < BUDGET
    # the same text around the same given tokens may be written in other places: sum over the places given
    for text in {text for text, _, _ in terms}:
        m = len(text) - 3
        expected = torch.stack([log_p for other, log_p, stopped in terms if other == text and stopped]).exp().sum()
        got = torch.zeros((), dtype=torch.float64)
        for given in combinations(range(1, len(text)), 2):
            if [text[place] for place in given] == [4, 3]:
                mask = torch.zeros(1, len(text), dtype=torch.bool)
                mask[0, [0, *given]] = True
                got += model.score(torch.tensor([text]), context_mask=mask, orders=orders_of(m))[0].exp()
        assert difference(got, expected) < BUDGET
        total += got
    assert total < 1


def test_left_to_right_score_is_the_sum_of_the_logits():
    model = small_model()
    ids = torch.tensor([[1, 4, 3, 5]])
    with torch.no_grad():
        logits = model(ids).logits[0]
    terms = logits[0, 4] + logits[1, 3] + logits[2, 5]
    assert difference(model.score(ids, stop=False)[0], terms) < BUDGET
    assert difference(model.score(ids)[0], terms + logits[3, 2]) < BUDGET
    mask = torch.tensor([[True, True, False, False]])
    assert difference(model.score(ids, context_mask=mask)[0], terms - logits[0, 4] + logits[3, 2]) < BUDGET


def test_left_to_right_scores_of_all_texts_sum_to_one():
    model, total = small_model(), torch.zeros((), dtype=torch.float64)
    for m in range(MOST + 1):
        for words in product(WORDS, repeat=m):
            total += model.score(torch.tensor([[1, *words]]), stop=m < MOST)[0].exp()
    assert difference(total, torch.ones_like(total)) < BUDGET


def estimates_over(draws, monkeypatch):
    """Return the estimates of one text from each of these draws, in place of random ones."""
    model, ids, values = small_model(), torch.tensor([[1, 3, 5, 4]]), []
    for draw in draws:
        monkeypatch.setattr(scoring, "_draw_orders", lambda *_, draw=draw: torch.stack(draw))
        values.append(model.score(ids, num_orders=len(draw))[0])
    return torch.stack(values)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_drawn_orders_are_unbiased_in_probability_and_a_lower_bound_in_expectation(count, monkeypatch):
    """The mean over every possible draw of K of the 6 orders."""
    exact = small_model().score(torch.tensor([[1, 3, 5, 4]]), orders=orders_of(3))[0]
    estimates = estimates_over(combinations(orders_of(3), count), monkeypatch)
    assert difference(estimates.exp().mean(), exact.exp()) < BUDGET
    # of a single draw that is not so
    assert estimates.mean() < exact < estimates.max()
    more = estimates_over(combinations(orders_of(3), count + 1), monkeypatch)
    assert estimates.mean() < more.mean()


def test_draws_with_replacement_give_a_looser_bound(monkeypatch):
    """Control: what an order that comes twice costs."""
    distinct = estimates_over(combinations(orders_of(3), 2), monkeypatch)
    replaced = estimates_over(product(orders_of(3), repeat=2), monkeypatch)
    assert difference(distinct.exp().mean(), replaced.exp().mean()) < BUDGET
    assert replaced.mean() < distinct.mean()


def test_with_as_many_draws_as_orders_the_score_is_exact():
    model, ids = small_model(), torch.tensor([[1, 3, 5, 4]])
    exact = model.score(ids, orders=orders_of(3))
    for count in (6, 7, 100):
        assert difference(model.score(ids, num_orders=count), exact) < BUDGET
    assert difference(model.score(ids, num_orders=5), exact) > 1e-6
    nothing = torch.tensor([[1]])
    assert difference(model.score(nothing, num_orders=1), model.score(nothing)) < BUDGET


@pytest.mark.parametrize(("m", "count"), [(4, 3), (4, 12), (4, 20), (9, 50)])
def test_every_order_is_drawn_as_often_and_none_twice(m, count):
    generator = torch.Generator().manual_seed(0)
    draws = [_draw_orders(m, count, generator) for _ in range(400 if m == 4 else 5)]
    for orders in draws:
        assert orders.shape == (count, m) and len(orders.unique(dim=0)) == count
        assert same_bits(orders.sort(1).values, torch.arange(m).expand(count, m))
    if m == 4:
        seen = torch.cat(draws).unique(dim=0, return_counts=True)[1]
        assert len(seen) == 24
        # five standard deviations of a binomial count
        p = count / 24
        assert (seen - 400 * p).abs().max() < 5 * (400 * p * (1 - p)) ** 0.5


def test_drawn_orders_are_reproducible_and_vary():
    model, ids = small_model(), torch.tensor([[1, 3, 5, 4, 4, 3]])
    scores = [model.score(ids, num_orders=2, generator=torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


def test_forward_passes_of_any_size_give_the_same_score():
    model, ids = small_model(), torch.tensor([[1, 3, 5, 4]])
    exact = model.score(ids, orders=orders_of(3))
    assert difference(model.score(ids, orders=orders_of(3), batch_size=4), exact) < BUDGET


def test_padding_and_eos_change_no_score():
    model = small_model()
    ids = torch.tensor([[1, 3, 5, 4]])
    for fields in ({}, {"orders": orders_of(3)}):
        exact = model.score(ids, **fields)
        for left, right in ((2, 0), (0, 3)):
            padded, mask = (torch.nn.functional.pad(x, (left, right)) for x in (ids, torch.ones_like(ids)))
            assert difference(model.score(padded, attention_mask=mask, **fields), exact) < BUDGET
        assert difference(model.score(torch.nn.functional.pad(ids, (0, 1), value=2), **fields), exact) < BUDGET


def test_offsets_of_the_final_text_break_the_sum(monkeypatch):
    """Control: positions of the final text tell the model how much is still to come, and where."""

    def final_offsets(interval):
        positions = interval.positions_BK
        return positions[:, None] - positions.gather(1, interval.entries_BQ)[..., None]

    def total_score(model):
        total = torch.zeros((), dtype=torch.float64)
        for m in range(MOST + 1):
            for words in product(WORDS, repeat=m):
                total += model.score(torch.tensor([[1, *words]]), orders=orders_of(m), stop=m < MOST)[0].exp()
        return total

    model = small_model()
    assert abs(total_score(model) - 1) < BUDGET
    monkeypatch.setattr(attention, "insertion_offsets", final_offsets)
    assert abs(total_score(model) - 1) > 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_orders": 2, "orders": torch.tensor([[0, 1]])}, "num_orders and orders exclude each other"),
        ({"num_orders": 0}, "num_orders must be an integer of at least 1, got 0"),
        ({"num_orders": 2.0}, "num_orders must be an integer of at least 1, got 2.0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"generator": torch.Generator()}, "generator draws orders, which num_orders asks for"),
        ({"orders": torch.tensor([[0.0, 1.0]])}, r"orders must be permutations of 0..1"),
        ({"orders": torch.tensor([[0, 0]])}, r"orders must be permutations of 0..1, \[K, 2\], got \[\[0, 0\]\]"),
        ({"orders": torch.tensor([[0, 1, 2]])}, r"orders must be permutations of 0..1"),
        ({"context_mask": torch.tensor([[True, False, True]])}, "left to right the context must lead"),
        ({"context_mask": torch.tensor([[True, False]])}, r"context_mask must be \[1, 3\], got \[1, 2\]"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "ones of an attention_mask row must form one run"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "ones of an attention_mask row must form one run, got 0"),
    ],
)
def test_bad_arguments_of_score_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        small_model().score(torch.tensor([[1, 3, 4]]), **fields)


def test_score_needs_a_batch():
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\], got \[3\]"):
        small_model().score(torch.tensor([1, 3, 4]))


@pytest.mark.parametrize("fields", [{}, {"num_orders": 2}, {"orders": torch.tensor([[0, 1, 2]])}], ids=list)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 3, 2, 4, 2]]), r"ids \[0, 1, 2\] are structure .*, got 2 at token 2 of row 0"),
        (torch.tensor([[1, 3, 0, 4]]), "never written inside a text, got 0 at token 2 of row 0"),
        (torch.tensor([[1, 3, 4, 4], [1, 1, 3, 4]]), "got 1 at token 1 of row 1"),
        (torch.tensor([[3, 4, 3, 5]]), "a text begins with BOS, id 1, got 3 in row 0"),
        (torch.tensor([[1, 3, 4, 6]]), r"ids must be in 0..5, got 6 in row 0"),
        (torch.tensor([[1.0, 3.0, 4.0, 5.0]]), "input_ids must be a tensor of integers, got torch.float32"),
        ([[1, 3, 4, 5]], "input_ids must be a tensor of integers, got list"),
    ],
)
def test_what_is_no_text_has_no_score_in_any_way(ids, message, fields):
    with pytest.raises(ValueError, match=message):
        small_model().score(ids, **fields)


def test_structure_inside_given_text_is_context():
    ids, given = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[True, True, False, False]])
    for fields in ({}, {"num_orders": 2}):
        assert small_model().score(ids, context_mask=given, **fields).isfinite().all()
