"""Rotary positions on insertion offsets: segments are pairs, and the cache is exact."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext import InsertionCache, InsNextConfig, InsNextModel
from modeling_insnext.insnext import rotary
from modeling_insnext.insnext.attention import Interval, build_interval, insertion_offsets
from tests.support.built_text import build_row, packed_rows, random_ids, random_text
from tests.support.equality import difference, same_bits
from tests.support.insnext import tiny_model


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24},
}


def rotary_model(rope="default", **options):
    options = {"num_key_value_heads": 2, "position_encoding": "rotary", "rope_parameters": ROPES[rope]} | options
    return tiny_model(**options)


@settings(max_examples=60, deadline=None)
@given(row=packed_rows(), rope=st.sampled_from(sorted(ROPES)), width=st.sampled_from([1, 3, 32]))
def test_segments_are_pairs_in_every_order_and_in_blocks_of_any_width(row, rope, width):
    ids = random_ids(row, torch.Generator().manual_seed(len(row.start)))
    model = rotary_model(rope)
    expected = model.model(ids, interval=row.interval()).last_hidden_state
    model.set_attn_implementation("sdpa")
    with mock.patch.multiple(rotary, QUERIES_PER_BLOCK=width, MOST_BLOCKS=64):
        got = model.model(ids, interval=row.interval()).last_hidden_state
    assert difference(got, expected) < 1e-9


def test_a_score_turns_the_key_by_its_offset_as_the_text_stood():
    row = build_row([[[0, 1], [1], [1], [2]]])
    interval, model = row.interval(), rotary_model()
    ids = random_ids(row, torch.Generator().manual_seed(0))
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    attention = model.model.layers[0].self_attn
    query, key = (proj(hidden).view(5, -1, 8) for proj in (attention.q_proj, attention.k_proj))
    captured = model.model(ids, interval=interval, output_attentions=True).attentions[0][0]
    for i, text in enumerate(row.snapshots):
        offset = torch.tensor([text.index(j) - text.index(i) for j in text])
        cos, sin = model.model.rope.turns(offset, torch.float64)
        for head in range(4):
            keys = rotary.turn(key[text, head // 2], cos, sin)
            weights = (keys @ query[i, head] * attention.scaling).softmax(0)
            assert difference(captured[head, i, text], weights) < 1e-12


def test_plain_text_may_be_told_by_any_positions_that_rise():
    model = rotary_model(attn="sdpa").model
    ids = torch.randint(3, 23, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = model(ids, is_causal=True).last_hidden_state
    told = {"positions": 7 * torch.arange(40).expand(2, 40), "context_length": 1}
    assert difference(model(ids, **told).last_hidden_state, expected) < 1e-9
    told["positions"] = told["positions"].flip(1)
    assert difference(model(ids, **told).last_hidden_state, expected) > 1e-3


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("max_length", [None, 32], ids=["dynamic", "static"])
def test_cached_steps_equal_one_pass(attn, max_length):
    model = rotary_model(attn=attn).model
    ids, positions = random_text(24, 5, torch.Generator().manual_seed(3))
    expected = model(ids, positions=positions, context_length=5).last_hidden_state
    cache, states = InsertionCache(1, max_length), []
    for first, last in [(0, 5), *((i, i + 1) for i in range(5, 24))]:
        seen = cache.key_length(last - first)
        padded = torch.nn.functional.pad(positions[:, :last], (0, max(0, seen - last)), value=0)[:, :seen]
        horizon = torch.full((1, last - first), last - 1)
        states.append(
            model(ids[:, first:last], positions=padded, horizon=horizon, past_key_values=cache).last_hidden_state
        )
    assert difference(torch.cat(states, 1), expected) < 1e-9


def test_ranks_of_a_draft_are_a_shortcut_and_no_other_function():
    model = rotary_model(attn="sdpa").model
    ids, positions = random_text(14, 4, torch.Generator().manual_seed(5))
    cache = InsertionCache(1)
    model(ids[:, :13], positions=positions[:, :13], context_length=4, past_key_values=cache)
    entry = torch.tensor([[13]])
    counted = Interval(positions, torch.zeros_like(entry), entry, entry)
    step = {"past_key_values": cache, "advance_cache": False}
    expected = model(ids[:, 13:], interval=counted, **step).last_hidden_state
    got = model(ids[:, 13:], interval=counted._replace(ranked=True), **step).last_hidden_state
    assert difference(got, expected) < 1e-12
    scaled = counted._replace(positions_BK=3 * positions, ranked=True)
    assert difference(model(ids[:, 13:], interval=scaled, **step).last_hidden_state, expected) > 1e-3


def test_control_final_ranks_and_unshifted_keys_are_another_function(monkeypatch):
    ids, positions = random_text(20, 4, torch.Generator().manual_seed(1))
    model = rotary_model(attn="sdpa").model
    expected = model(ids, positions=positions, context_length=4).last_hidden_state
    final = lambda interval: positions[:, None] - positions[..., None]  # noqa: E731
    monkeypatch.setattr(rotary, "insertion_offsets", final)
    assert difference(model(ids, positions=positions, context_length=4).last_hidden_state, expected) > 1e-3
    monkeypatch.setattr(rotary, "insertion_offsets", insertion_offsets)
    # a key keeps the rank that it had when it came
    came = torch.tensor([[sum(p < positions[0, j] for p in positions[0, : max(j + 1, 4)]) for j in range(20)]])
    monkeypatch.setattr(rotary, "insertion_offsets", lambda interval: came[:, None] - came[..., None])
    assert difference(model(ids, positions=positions, context_length=4).last_hidden_state, expected) > 1e-3


def test_a_padded_batch_equals_its_rows_and_packed_texts_equal_theirs():
    model = rotary_model(attn="sdpa").model
    generator = torch.Generator().manual_seed(2)
    texts = [random_text(length, context, generator) for length, context in ((9, 3), (6, 6), (12, 1))]
    alone = [
        model(ids, positions=positions, context_length=context).last_hidden_state
        for (ids, positions), context in zip(texts, (3, 6, 1), strict=True)
    ]
    pad = lambda x, value: torch.nn.functional.pad(x, (0, 12 - x.shape[1]), value=value)  # noqa: E731
    together = model(
        torch.cat([pad(ids, 0) for ids, _ in texts]),
        attention_mask=torch.cat([pad(torch.ones_like(ids), 0) for ids, _ in texts]),
        positions=torch.cat([pad(positions, 0) for _, positions in texts]),
        context_length=torch.tensor([3, 6, 1]),
    ).last_hidden_state
    for row, states in zip(together, alone, strict=True):
        assert difference(row[: states.shape[1]], states[0]) < 1e-9
    starts, horizons, first = [], [], 0
    for (ids, _), context in zip(texts, (3, 6, 1), strict=True):
        entries = torch.arange(first, first + ids.shape[1])
        starts.append(torch.full_like(entries, first))
        horizons.append(entries.clamp_min(first + context - 1))
        first += ids.shape[1]
    packed = model(
        torch.cat([ids for ids, _ in texts], 1),
        positions=torch.cat([positions for _, positions in texts], 1),
        start=torch.cat(starts)[None],
        horizon=torch.cat(horizons)[None],
    ).last_hidden_state
    assert difference(packed, torch.cat(alone, 1)) < 1e-9


@pytest.mark.parametrize(
    "options", [{}, {"ebr": True}, {"ebr": True, "ebr_ratio": 0.0}, {"ebr": True, "ebr_window": 3}]
)
@pytest.mark.parametrize("beams", [1, 3])
def test_eager_and_sdpa_write_the_same(options, beams):
    model = rotary_model()
    canvas = {"input_ids": torch.tensor([[1, 5, 6, 7], [1, 9, 0, 0]])}
    canvas["attention_mask"] = (canvas["input_ids"] > 0).long()
    canvas["slot_mask"] = canvas["attention_mask"].bool()
    written = []
    for attn in ("eager", "sdpa"):
        model.set_attn_implementation(attn)
        written.append(model.generate(**canvas, max_new_tokens=9, min_new_tokens=6, num_beams=beams, **options))
    assert same_bits(*written)


@pytest.mark.parametrize("options", [{"parallel_slots": 3}, {"cache_implementation": "static"}])
def test_other_ways_of_writing_follow_the_definition(options):
    canvas = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "slot_mask": torch.ones(1, 4, dtype=torch.bool)}
    model = rotary_model()
    expected = model.generate(**canvas, max_new_tokens=9, **options)
    model.set_attn_implementation("sdpa")
    assert same_bits(model.generate(**canvas, max_new_tokens=9, **options), expected)


def test_gradients_of_segments_are_those_of_pairs_with_checkpointing_too(monkeypatch):
    monkeypatch.setattr(rotary, "QUERIES_PER_BLOCK", 4)
    ids, positions = random_text(15, 3, torch.Generator().manual_seed(4))
    found = []
    for attn, checkpointing in (("eager", False), ("sdpa", False), ("sdpa", True)):
        model = rotary_model(attn=attn).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, positions=positions, context_length=3, labels=ids).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert difference(found[1], found[0]) < 1e-9 and difference(found[2], found[0]) < 1e-9


@pytest.mark.parametrize("attn", ["flex_attention", "insnext_triton"])
def test_an_implementation_that_cannot_turn_says_which_can(attn):
    model = rotary_model(attn=attn)
    with pytest.raises(ValueError, match="rotary.*needs attn_implementation eager or sdpa"):
        model(torch.tensor([[1, 5, 6]]))


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"rope_parameters": ROPES["default"], "position_encoding": "alibi"}, "need position_encoding"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "whole heads are turned"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "'linear' needs a positive factor .*, got None",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0.0}}, "needs a positive factor .*, got 0.0"),
        ({"rope_parameters": {**ROPES["llama3"], "low_freq_factor": None}}, "needs a positive low_freq_factor"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "'default' needs a positive rope_theta"),
        ({"head_dim": 7}, "even head_dim"),
        ({"slot_norm": "none"}, "slot_norm must be one of"),
    ],
)
def test_bad_fields_are_refused(fields, rule):
    with pytest.raises(ValueError, match=rule):
        InsNextConfig(**{"hidden_size": 32, "num_attention_heads": 4, "position_encoding": "rotary"} | fields)


def test_it_is_saved_and_loaded(tmp_path):
    model = rotary_model("yarn", attn="sdpa").model
    model.save_pretrained(tmp_path)
    loaded = InsNextModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.rope == model.rope and loaded.config.rope_parameters["rope_type"] == "yarn"
    ids, positions = random_text(10, 4, torch.Generator().manual_seed(6))
    read = {"positions": positions, "context_length": 4}
    assert difference(loaded(ids, **read).last_hidden_state, model(ids, **read).last_hidden_state) < 1e-9


def test_plain_reading_needs_one_turn_a_query():
    interval = build_interval((1, 500), torch.device("cpu"), is_causal=True)
    prepared = rotary.rotary_segments(interval, rotary_model().model.rope, torch.float64)
    assert interval.ranked and prepared.pair_BQK is None and prepared.query_turns[0].shape == (1, 1, 500, 8)


def gap_wise(tokens: int, every: int) -> Interval:
    """A text of which every so-many-th token is given, and its gaps are written from left to right."""
    rank = torch.arange(tokens)
    order = torch.cat([rank[rank % every == 0], rank[rank % every != 0]])
    return build_interval((1, tokens), torch.device("cpu"), positions=order[None], context_length=-(-tokens // every))


def test_blocks_see_the_keys_of_their_texts_alone_and_meet_few_angles():
    rope, width = rotary_model().model.rope, rotary.QUERIES_PER_BLOCK
    blocks = rotary.rotary_segments(gap_wise(256, 4), rope, torch.float64).blocks
    assert [(block.queries.start, block.keys.stop) for block in blocks] == [
        (first, max(64, first + width)) for first in range(0, 256, width)
    ]
    assert sum(block.segments.query_turns[0].shape[2] for block in blocks) < 256 * width / 3
    text = gap_wise(64, 4)
    packed = Interval(*(torch.cat([x, x + 64], 1) for x in text[:4]))
    later = rotary.rotary_segments(packed, rope, torch.float64).blocks[64 // width :]
    assert [block.keys.start for block in later] == [64] * (64 // width)


@pytest.mark.parametrize("cut", [slice(1, None), slice(None, -1)], ids=["first", "last"])
def test_control_blocks_that_miss_a_key_are_another_function(monkeypatch, cut):
    ids, positions = random_text(20, 4, torch.Generator().manual_seed(1))
    model = rotary_model(attn="sdpa").model
    read = {"positions": positions, "context_length": 4}
    monkeypatch.setattr(rotary, "QUERIES_PER_BLOCK", 5)
    expected, blocks_of = model(ids, **read).last_hidden_state, rotary.blocks_of

    def short(interval):
        cut_off = [(block, range(20)[keys][cut]) for block, keys in blocks_of(interval)]
        return [(block, slice(kept.start, kept.stop)) for block, kept in cut_off]

    monkeypatch.setattr(rotary, "blocks_of", short)
    assert difference(model(ids, **read).last_hidden_state, expected) > 1e-3
