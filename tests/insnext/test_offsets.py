"""Offsets: the distance in the text as it stood when a token was encoded, and the slopes that punish it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext.insnext.attention import (
    Interval,
    alibi_bias,
    alibi_slopes,
    build_interval,
    dense_bias,
    insertion_offsets,
    visible_keys,
)
from tests.support.built_text import Built, build_row, packed_rows
from tests.support.equality import same_bits


EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)


def offsets_of(row: Built):
    interval = row.interval()
    return insertion_offsets(interval)[0], visible_keys(interval)[0]


def offsets_by_list_insertion(row: Built):
    N = len(row.start)
    offsets, visible = torch.zeros(N, N, dtype=torch.long), torch.zeros(N, N, dtype=torch.bool)
    for query, text in enumerate(row.snapshots):
        for index, key in enumerate(text):
            offsets[query, key] = index - text.index(query)
            visible[query, key] = True
    return offsets, visible


@EXAMPLES
@given(packed_rows())
def test_building_the_text_by_list_insertion_gives_the_same_offsets(row):
    offsets, visible = offsets_of(row)
    expected, seen = offsets_by_list_insertion(row)
    assert same_bits(visible, seen)
    assert same_bits(offsets[seen], expected[seen])


def test_offsets_of_the_final_text_fail_the_same_comparison():
    row = build_row([[[0], [1], [1], [1]]])
    expected, seen = offsets_by_list_insertion(row)
    positions = torch.tensor(row.positions)
    final = positions[None] - positions[:, None]
    assert same_bits(offsets_of(row)[0][seen], expected[seen])
    assert not same_bits(final[seen], expected[seen])


@EXAMPLES
@given(packed_rows())
def test_offsets_have_the_sign_of_the_difference_of_positions(row):
    offsets, visible = offsets_of(row)
    positions = torch.tensor(row.positions)
    assert same_bits(offsets.sign()[visible], (positions[None] - positions[:, None]).sign()[visible])


@EXAMPLES
@given(st.integers(1, 12), st.integers(1, 12))
def test_left_to_right_offsets_are_j_minus_i(length, context):
    interval = build_interval((1, length), torch.device("cpu"), context_length=min(context, length))
    index = torch.arange(length)
    visible = visible_keys(interval)[0]
    assert same_bits(insertion_offsets(interval)[0][visible], (index[None] - index[:, None])[visible])


def test_right_to_left_offsets_are_not_j_minus_i():
    interval = build_interval((1, 5), torch.device("cpu"), positions=torch.tensor([[0, 4, 3, 2, 1]]), is_causal=True)
    index = torch.arange(5)
    visible = visible_keys(interval)[0]
    assert not same_bits(insertion_offsets(interval)[0][visible], (index[None] - index[:, None])[visible])


@EXAMPLES
@given(st.data())
def test_permuting_the_future_changes_no_row(data):
    length = data.draw(st.integers(2, 12))
    positions = data.draw(st.permutations(range(length)))
    now = data.draw(st.integers(1, length - 1))
    context = data.draw(st.integers(1, now))
    future = data.draw(st.permutations(range(now, length)))
    other = list(positions[:now]) + [positions[entry] for entry in future]
    before, after = (
        insertion_offsets(
            build_interval((1, length), torch.device("cpu"), positions=torch.tensor([p]), context_length=context)
        )[0, :now, :now]
        for p in (positions, other)
    )
    visible = visible_keys(build_interval((1, length), torch.device("cpu"), context_length=context))[0, :now, :now]
    assert same_bits(before[visible], after[visible])


def test_permuting_what_a_block_sees_does_change_its_rows():
    """Control: the future begins behind the horizon, not behind the query."""
    rows = [
        insertion_offsets(build_interval((1, 4), torch.device("cpu"), positions=torch.tensor([p]), context_length=4))
        for p in ([0, 1, 2, 3], [0, 1, 3, 2])
    ]
    assert not same_bits(rows[0][0, :2], rows[1][0, :2])


@EXAMPLES
@given(packed_rows(), st.integers(-50, 50), st.integers(1, 7))
def test_only_the_order_of_positions_matters(row, shift, factor):
    positions, start, horizon = row.tensors()
    interval = row.interval()
    moved = interval._replace(positions_BK=positions * factor + shift)
    visible = visible_keys(interval)
    assert same_bits(insertion_offsets(moved)[visible], insertion_offsets(interval)[visible])


def test_rows_behind_a_cache_equal_the_rows_of_one_pass():
    positions = torch.tensor([[0, 3, 1, 4, 2]])
    whole = build_interval((1, 5), torch.device("cpu"), positions=positions, context_length=2)
    tail = Interval(positions, whole.start_BQ[:, 3:], whole.horizon_BQ[:, 3:], whole.entries_BQ[:, 3:])
    visible = visible_keys(tail)
    assert same_bits(insertion_offsets(tail)[visible], insertion_offsets(whole)[:, 3:][visible])


@pytest.mark.parametrize("heads", [1, 2, 5, 8])
@pytest.mark.parametrize("ratio", [1.0, 4.0, 0.5])
def test_slopes_are_powers_of_two_and_alternate_their_steep_side(heads, ratio):
    left, right = alibi_slopes(heads, ratio)
    for head in range(heads):
        slope = 2 ** (-8 * (head + 1) / heads)
        assert left[head].item() == pytest.approx(slope * (ratio if head % 2 == 0 else 1), rel=1e-15)
        assert right[head].item() == pytest.approx(slope * (ratio if head % 2 == 1 else 1), rel=1e-15)


def test_bias_punishes_left_and_right_by_their_own_slopes():
    offsets = torch.tensor([-3, -1, 0, 2])
    assert alibi_bias(offsets, torch.tensor(4.0), torch.tensor(0.5)).tolist() == [-12.0, -4.0, 0.0, -1.0]


@pytest.mark.parametrize(("ratio", "blind"), [(1.0, True), (4.0, False)])
def test_only_asymmetric_slopes_tell_a_text_from_its_mirror_image(ratio, blind):
    positions = torch.tensor([[0, 4, 2, 1, 3]])
    slopes = alibi_slopes(4, ratio)
    text, mirror = (
        dense_bias(build_interval((1, 5), torch.device("cpu"), positions=p, context_length=3), slopes, torch.float64)
        for p in (positions, -positions)
    )
    assert same_bits(text, mirror) == blind


def test_bias_is_minus_infinity_exactly_on_invisible_keys():
    row = build_row([[[0, 1], [1], [1, 2]], [[0], [1]]], pads=1)
    bias = dense_bias(row.interval(), alibi_slopes(4, 4.0), torch.float64)
    assert same_bits(bias[0].isneginf(), ~offsets_by_list_insertion(row)[1].expand(4, -1, -1))
