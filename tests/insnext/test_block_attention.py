"""`block_attention="causal"`: a token sees what stands left of it in its block, the last one everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext import InsertionCache
from modeling_insnext.insnext.attention import insertion_offsets, visible_keys
from tests.support.built_text import packed_rows, random_ids, random_text
from tests.support.equality import difference
from tests.support.insnext import tiny_model


ROTARY = {"position_encoding": "rotary", "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
KINDS = [{}, {"position_encoding": "sinusoidal"}, ROTARY]
BACKENDS = [*((kind, attn) for kind in KINDS for attn in ("eager", "sdpa")), ({}, "flex_attention")]


def causal_model(**options):
    return tiny_model(block_attention="causal", **options)


def seen(row, i):
    """Return the entries that entry `i` sees, from left to right, found in the text as it stood after its block."""
    text, last = row.snapshots[i], row.horizon[i]
    block = {j for j in text if row.horizon[j] == last}
    return [j for j in text if i == last or j not in block or text.index(j) <= text.index(i)]


@settings(max_examples=100, deadline=None)
@given(row=packed_rows())
def test_who_sees_whom_and_from_how_far(row):
    interval = row.interval()._replace(causal_blocks=True)
    visible, offsets = visible_keys(interval)[0], insertion_offsets(interval)[0]
    for i in range(len(row.start)):
        text = seen(row, i)
        assert sorted(text) == visible[i].nonzero().flatten().tolist()
        assert [text.index(j) - text.index(i) for j in text] == offsets[i, text].tolist()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "attn"), BACKENDS, ids=str)
def test_a_text_that_is_given_is_read_as_from_left_to_right(kind, attn):
    dtype = torch.float32 if attn == "flex_attention" else torch.float64
    model = causal_model(**kind, attn=attn, dtype=dtype).model
    ids = torch.randint(3, 23, (2, 14), generator=torch.Generator().manual_seed(0))
    expected = model(ids, is_causal=True).last_hidden_state
    budget = 100 * torch.finfo(dtype).eps
    assert difference(model(ids, context_length=14).last_hidden_state, expected) < budget
    model.config.block_attention = "bidirectional"
    assert difference(model(ids, context_length=14).last_hidden_state, expected) > 1e-3


@settings(max_examples=40, deadline=None)
@given(row=packed_rows(), kind=st.sampled_from(KINDS))
def test_the_fast_paths_are_the_definition_in_every_order(row, kind):
    ids = random_ids(row, torch.Generator().manual_seed(len(row.start)))
    model = causal_model(**kind)
    expected = model.model(ids, interval=row.interval()).last_hidden_state
    model.set_attn_implementation("sdpa")
    assert difference(model.model(ids, interval=row.interval()).last_hidden_state, expected) < 1e-9


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_token_that_stands_right_in_the_block_changes_nothing_but_the_state(kind):
    model = causal_model(**kind).model
    ids, positions = random_text(6, 6, torch.Generator().manual_seed(4))
    changed = ids.clone()
    changed[0, 3] = 3 + (ids[0, 3] - 2) % 20
    before, after = (model(x, positions=positions, context_length=6).last_hidden_state[0] for x in (ids, changed))
    moved = (before - after).abs().amax(1) > 1e-9
    right_of_it = positions[0] >= positions[0, 3]
    right_of_it[5] = True
    assert moved.tolist() == right_of_it.tolist()


@pytest.mark.parametrize("max_length", [None, 32], ids=["dynamic", "static"])
@pytest.mark.parametrize(("kind", "attn"), BACKENDS[:-1], ids=str)
def test_cached_blocks_equal_one_pass(kind, attn, max_length):
    model = causal_model(**kind, attn=attn).model
    ids, positions = random_text(20, 5, torch.Generator().manual_seed(3))
    blocks = [(0, 5), (5, 6), (6, 10), (10, 11), (11, 13), *((i, i + 1) for i in range(13, 20))]
    horizon = torch.tensor([[last - 1 for first, last in blocks for _ in range(first, last)]])
    expected = model(ids, positions=positions, horizon=horizon).last_hidden_state
    cache, states = InsertionCache(1, max_length), []
    for first, last in blocks:
        held = cache.key_length(last - first)
        padded = torch.nn.functional.pad(positions[:, :last], (0, max(0, held - last)), value=0)[:, :held]
        fields = {"positions": padded, "horizon": horizon[:, first:last], "past_key_values": cache}
        states.append(model(ids[:, first:last], **fields).last_hidden_state)
    assert difference(torch.cat(states, 1), expected) < 1e-9


def test_the_kernels_refuse_it_by_name():
    with pytest.raises(ValueError, match='block_attention="causal" is not for'):
        model = causal_model(dtype=torch.float32, attn="insnext_triton").model
        model(torch.tensor([[3, 4, 5]]), context_length=3)
