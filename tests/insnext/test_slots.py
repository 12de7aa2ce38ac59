"""The slot table against a text that is really built, and the targets that are read off it."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext.insnext.attention import build_interval
from modeling_insnext.insnext.neighbours import neighbours
from modeling_insnext.insnext.slots import missing_units, slot_table
from modeling_insnext.insnext.supervision import TargetKind
from tests.support.built_text import build_row, losses_by_state, packed_rows, random_ids
from tests.support.equality import difference, same_bits
from tests.support.insnext import tiny_model
from tests.support.largest import LargestTensor


EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True)


def table_of(row):
    return slot_table(*row.tensors())


def slots_in(text, N):
    """Return the slots (left, right) of a text; N is its right edge."""
    return sorted(zip(text, text[1:] + [N], strict=True))


def slots_alive(row, table):
    """Return for every state the (left, right) pairs that the table calls alive."""
    alive = table.alive(row.tensors()[1], slice(None))[0]
    return [
        sorted((int(table.left_BS[0, s]), int(table.right_BS[0, s])) for s in alive[state].nonzero().squeeze(1))
        for state in range(len(row.start))
    ]


def states_of(row):
    """Return the entries whose hidden state is one: the last of every block."""
    return [entry for entry, horizon in enumerate(row.horizon) if entry == horizon]


def written_alone(row):
    """Return the entries that were written alone after the context."""
    return [
        entry
        for entry in range(len(row.start))
        if row.start[entry] != entry
        and row.horizon[entry] == entry
        and row.horizon[entry - 1] == entry - 1
        and row.start[entry] == row.start[entry - 1]
    ]


@EXAMPLES
@given(packed_rows())
def test_exactly_the_slots_of_the_text_are_alive_at_every_state(row):
    alive, N = slots_alive(row, table_of(row)), len(row.start)
    for state in states_of(row):
        assert alive[state] == slots_in(row.snapshots[state], N)


@pytest.mark.parametrize("field", ["born_BS", "dies_BS"])
def test_slots_that_live_one_state_too_long_fail_the_same_comparison(field):
    row = build_row([[[0, 1], [1], [2]]])
    table = table_of(row)
    wrong = table._replace(**{field: getattr(table, field) + (1 if field == "dies_BS" else -1)})
    states = states_of(row)[:-1]
    expected = [slots_in(row.snapshots[state], 4) for state in states]
    assert [slots_alive(row, table)[state] for state in states] == expected
    assert [slots_alive(row, wrong)[state] for state in states] != expected


@EXAMPLES
@given(packed_rows())
def test_the_target_is_the_slot_that_the_token_was_written_into(row):
    table, N = table_of(row), len(row.start)
    alone = written_alone(row)
    assert table.written_BN[0].nonzero().squeeze(1).tolist() == alone
    for entry in alone:
        before, after = row.snapshots[entry - 1], row.snapshots[entry] + [N]
        place = after.index(entry)
        left, right = after[place - 1], after[place + 1]
        assert (left, right) in slots_in(before, N)
        slot = int(table.slot_BN[0, entry])
        assert (int(table.left_BS[0, slot]), int(table.right_BS[0, slot])) == (left, right)


@EXAMPLES
@given(packed_rows())
def test_a_slot_dies_with_the_first_token_written_into_it(row):
    table, N = table_of(row), len(row.start)
    for slot in range(2 * N):
        left, right = int(table.left_BS[0, slot]), int(table.right_BS[0, slot])
        if left < 0:
            continue
        born = int(table.born_BS[0, slot])
        text = row.finals[left]
        inside = text[text.index(left) + 1 : len(text) if right == N else text.index(right)]
        later = [entry for entry in inside if entry > born]
        assert inside == [entry for entry in inside if entry in later]
        assert int(table.dies_BS[0, slot]) == min(later, default=N)


@EXAMPLES
@given(packed_rows(), st.data())
def test_missing_units_are_counted_in_the_final_text(row, data):
    table, N = table_of(row), len(row.start)
    starts = torch.tensor([data.draw(st.lists(st.booleans(), min_size=N, max_size=N))])
    positions, start, _ = row.tensors()
    missing = missing_units(table, positions, start, starts)[0]
    for slot in range(2 * N):
        left, right = int(table.left_BS[0, slot]), int(table.right_BS[0, slot])
        inside = []
        if left >= 0:
            text = row.finals[left]
            inside = text[text.index(left) + 1 : len(text) if right == N else text.index(right)]
        assert int(missing[slot]) == sum(bool(starts[0, entry]) for entry in inside)


def neighbours_by_definition(positions_BN, start_BN, horizon_BN, older):
    """Return the nearest tokens left and right of each among those it saw; `[B, N, N]`."""
    N = positions_BN.shape[1]
    key_N = torch.arange(N)
    seen = (key_N >= start_BN[..., None]) & (key_N <= horizon_BN[..., None])
    if older:
        seen &= horizon_BN[:, None] < horizon_BN[..., None]
    keys, query = positions_BN[:, None], positions_BN[..., None]
    low, high = -(2**40), 2**40
    left_value, left = keys.masked_fill(~(seen & (keys < query)), low).max(2)
    right_value, right = keys.masked_fill(~(seen & (keys > query)), high).min(2)
    return torch.where(left_value == low, -1, left), torch.where(right_value == high, N, right)


@EXAMPLES
@given(packed_rows())
def test_neighbours_are_the_nearest_tokens_that_were_seen(row):
    tensors = row.tensors()
    newest, older = (neighbours_by_definition(*tensors, older) for older in (False, True))
    assert same_bits(list(neighbours(*tensors)), [*newest, *older])


def test_neighbours_in_long_rows_are_found_without_a_table_of_pairs():
    generator = torch.Generator().manual_seed(0)
    n = 700
    start = torch.cat([torch.zeros(500, dtype=torch.long), torch.full((200,), 500)]).expand(2, n)
    positions = torch.stack(
        [torch.cat([torch.randperm(m, generator=generator) for m in (500, 200)]) for _ in range(2)]
    )
    horizon = torch.arange(n).expand(2, n).clone()
    horizon[:, :64], horizon[:, 500:530] = 63, 529
    newest, older = (neighbours_by_definition(positions, start, horizon, older) for older in (False, True))
    with LargestTensor() as seen:
        found = neighbours(positions, start, horizon)
    assert same_bits(list(found), [*newest, *older]) and seen.largest <= 2 * (n + 1)
    # control: blocks of several tokens tell the two apart
    assert not same_bits(list(newest), list(older))


def orders_after(context, written, total):
    """Yield every order of all tokens that begins with `context` and the already written ones, as positions."""
    begun = [*context, *written]
    missing = [p for p in range(total) if p not in begun]
    for rest in permutations(missing):
        yield torch.tensor([[*begun, *rest]])


def position_losses(model, ids_in_text, positions, context, kinds=None):
    interval = build_interval(positions.shape, positions.device, positions=positions, context_length=context)
    return losses_by_state(
        model, ids_in_text[0][positions], interval,
        target_kinds=None if kinds is None else torch.full_like(positions, kinds),
        unit_starts=torch.ones_like(positions, dtype=torch.bool),
    )[0][0]  # fmt: skip


@pytest.mark.parametrize("written", [[], [3], [3, 1]])
def test_missing_unit_targets_are_the_mean_over_all_continuations_of_a_uniform_order(written):
    model = tiny_model()
    ids = torch.tensor([[1, 5, 9, 4, 17, 8]])
    context = [0, 4]
    state = len(context) + len(written) - 1
    orders = list(orders_after(context, written, 6))
    hard = torch.stack([position_losses(model, ids, order, 2)[state] for order in orders])
    for order in orders[:2]:
        soft = position_losses(model, ids, order, 2, TargetKind.PROPORTIONAL)[state]
        assert difference(soft, hard.mean()) < 1e-10
        equal = position_losses(model, ids, order, 2, TargetKind.EQUAL)[state]
        assert written == [3, 1] or difference(equal, hard.mean()) > 1e-4  # there all gaps miss alike
    assert (
        difference(
            position_losses(model, ids, orders[0], 2, TargetKind.HARD), position_losses(model, ids, orders[0], 2)
        )
        == 0
    )


@pytest.mark.parametrize(("written", "gaps"), [([], [[1, 2, 3], [5], [7, 8]]), ([1, 2, 3], [[5], [7, 8]])])
def test_unfinished_gap_targets_are_the_mean_over_all_orders_of_the_gaps(written, gaps):
    model = tiny_model()
    ids = torch.tensor([[1, 5, 9, 4, 17, 8, 3, 11, 6]])
    context = [0, 4, 6]
    state = len(context) + len(written) - 1
    orders = [
        torch.tensor([[*context, *written, *(token for gap in order for token in gap)]])
        for order in permutations(gaps)
    ]
    hard = torch.stack([position_losses(model, ids, order, 3)[state] for order in orders])
    for order in orders:
        soft = position_losses(model, ids, order, 3, TargetKind.EQUAL)[state]
        assert difference(soft, hard.mean()) < 1e-10
        assert difference(position_losses(model, ids, order, 3, TargetKind.PROPORTIONAL)[state], hard.mean()) > 1e-4


def test_soft_targets_leave_stop_alone():
    model = tiny_model()
    positions = torch.tensor([[0, 3, 1, 2]])
    kinds = (TargetKind.HARD, TargetKind.PROPORTIONAL)
    hard, soft = (position_losses(model, torch.tensor([[1, 5, 9, 4]]), positions, 1, kind) for kind in kinds)
    assert soft[-1] == hard[-1] > 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(packed_rows())
def test_the_losses_are_the_slot_head_on_the_text_as_it_stands(row):
    """Twin: for every state a list of slots, one softmax over them and STOP, one softmax over the vocabulary."""
    model = tiny_model()
    head, interval, N = model.slot_head, row.interval(), len(row.start)
    ids = random_ids(row, torch.Generator().manual_seed(N))
    with torch.no_grad():
        position, token, supervised = losses_by_state(model, ids, interval)
        hidden = model.model(ids, interval=interval).last_hidden_state[0]
        right = torch.cat([head.right_proj(hidden), head.right_proj(head.edge)[None]])
        expected, tokens = torch.zeros(N).double(), torch.zeros(N).double()
        for state in states_of(row):
            slots = slots_in(row.snapshots[state], N)
            u = torch.stack([head.left_proj(hidden[left]) + right[r] for left, r in slots])
            query = head.query_proj(hidden[state])
            z = torch.cat([head.key_proj(u), head.stop_key[None]]) @ query / 32**0.5
            log_p = (30 * torch.tanh(z / 30)).log_softmax(0)
            if state + 1 in written_alone(row):
                after = row.snapshots[state + 1] + [N]
                place = after.index(state + 1)
                slot = slots.index((after[place - 1], after[place + 1]))
                expected[state] = -log_p[slot]
                logits = model.lm_head(head.norm(u[slot] + head.state_proj(hidden[state])))
                logits[[0, 1, 2]] = -torch.inf
                tokens[state] = -logits.log_softmax(0)[ids[0, state + 1]]
            elif row.start[state] != state and (state + 1 == N or row.start[state + 1] != row.start[state]):
                expected[state] = -log_p[-1]
    assert supervised[0].nonzero().squeeze(1).tolist() == [entry - 1 for entry in written_alone(row)]
    assert difference(position[0], expected) < 1e-10
    assert difference(token[0], tokens) < 1e-10
