"""Attention sinks: the first tokens stay visible to every window, exactly, however a text is read."""

import copy

import pytest
import torch

from modeling_insnext import ChunkMemoryCache
from tests.support.drt import GPT2, ROPE, padded, random_ids, read, tiny_config, tiny_model, whole
from tests.support.equality import same_bits
from tests.support.twin_drt import brute_force_logits


CLOSE = 1e-9
LENGTH = 43
CONFIGS = {
    "one": {**ROPE, "num_sink_tokens": 1},
    "a chunk": {**ROPE, "num_sink_tokens": 5, "retrieval_groups": [1]},
    "learned": {**GPT2, "num_sink_tokens": 3, "landmark_source": "mean"},
    "no retrieval": {**ROPE, "num_sink_tokens": 4, "retrieval_groups": [], "num_lower_layers": 3},
}
every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)


def worst(actual, expected):
    return float((actual - expected).abs().max())


@every_config
def test_the_model_is_its_formulae(changes):
    model, ids = tiny_model(**changes), random_ids(1, LENGTH)
    expected = brute_force_logits(model, ids[0].tolist())
    for implementation in ("sdpa", "eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        assert worst(whole(model, ids)[0], expected) < CLOSE
    # control: the same weights without sinks, which are the same function as long as nothing left the window
    other = tiny_model(**{**changes, "num_sink_tokens": 0})
    without = whole(other, ids)[0]
    near = 9 - (model.config.has_landmark_tokens)
    assert worst(without[:near], expected[:near]) < CLOSE
    assert worst(without[near:], expected[near:]) > 1e-2


@every_config
@pytest.mark.parametrize("location", ["device", "host"])
def test_every_way_of_reading_gives_the_same(changes, location):
    model, ids = tiny_model(**changes), random_ids(2, LENGTH)
    expected = whole(model, ids)
    for step in (1, 2, 7, 20, LENGTH):
        past = ChunkMemoryCache(model.config, location)
        assert worst(read(model, ids, past, step), expected) < CLOSE
    # control: a cache that forgets them
    past = ChunkMemoryCache(model.config, location)
    read(model, ids[:, :30], past, 10)
    for tail in past.sinks:
        tail.tensor = torch.zeros_like(tail.tensor)
    assert worst(read(model, ids[:, 30:], past, 5), expected[:, 30:]) > 1e-3


@every_config
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_ragged_batch_have_sinks_of_their_own(changes, side):
    model, ids, lengths = tiny_model(**changes), random_ids(4, LENGTH), [LENGTH, 17, 2, 30]
    text, mask = padded(ids, lengths, side)
    more = random_ids(4, 14, seed=1)
    alone = [whole(model, torch.cat([ids[row, :n], more[row]])[None])[0] for row, n in enumerate(lengths)]
    logits = whole(model, text, mask)
    for row, length in enumerate(lengths):
        assert worst(logits[row][mask[row].bool()], alone[row][:length]) < CLOSE
    for step in (1, 3, LENGTH):
        past = ChunkMemoryCache(model.config)
        read(model, text, past, step, mask)
        logits = read(model, more, past, 4, torch.cat([mask, torch.ones_like(more)], 1))
        assert all(worst(logits[row], alone[row][length:]) < CLOSE for row, length in enumerate(lengths))


@every_config
@pytest.mark.parametrize("segment", [3, 16, None])
def test_a_lower_only_prefill_reads_the_sinks_in_full(changes, segment):
    model, ids, more = tiny_model(**changes), random_ids(3, 90), random_ids(3, 6, seed=1)
    past = model.prefill(ids, segment_length=segment, lower_only=True)
    assert worst(read(model, more, past), whole(model, torch.cat([ids, more], 1))[:, 90:]) < CLOSE
    text, mask = padded(ids, [90, 51, 70], "left")
    past = model.prefill(text, mask, segment_length=segment, lower_only=True)
    logits = read(model, more, past, 2, torch.cat([mask, torch.ones_like(more)], 1))
    for row, length in enumerate([90, 51, 70]):
        assert worst(logits[row], whole(model, torch.cat([ids[row, :length], more[row]])[None])[0, length:]) < CLOSE


def test_without_its_upper_layers_a_sink_is_another(monkeypatch):
    """The control of the above."""
    model, ids = tiny_model(**CONFIGS["one"]), random_ids(1, 91)
    monkeypatch.setattr(type(model), "_column_behind_sinks", lambda *args: 0)
    past = model.prefill(ids[:, :90], lower_only=True)
    assert worst(read(model, ids[:, 90:], past), whole(model, ids)[:, 90:]) > 1e-4


@every_config
def test_caches_are_cut_moved_copied_saved_and_loaded(changes, tmp_path):
    model, ids, more = tiny_model(**changes), random_ids(2, LENGTH), random_ids(2, 12, seed=1)
    past = ChunkMemoryCache(model.config)
    read(model, ids, past, 6)
    past.crop(-4)
    past.reorder_cache(torch.tensor([1, 0]))
    past.save(tmp_path / "book", model)
    expected = whole(model, torch.cat([ids[:, : LENGTH - 4].flip(0), more], 1))[:, LENGTH - 4 :]
    pasts = [past, copy.deepcopy(past), ChunkMemoryCache.load(tmp_path / "book", model)]
    assert all(worst(read(model, more, one, 5), expected) < CLOSE for one in pasts)
    # cut to less than the sinks, which are then others
    past = ChunkMemoryCache(model.config)
    read(model, ids[:, :5], past)
    past.crop(-5)
    assert worst(read(model, more, past, 2), whole(model, more)) < CLOSE
    with pytest.raises(ValueError, match="num_sink_tokens is . in it, 2 in the model"):
        ChunkMemoryCache.load(tmp_path / "book", tiny_model(**{**changes, "num_sink_tokens": 2}))


def test_training_reaches_the_sinks_under_checkpointing_as_well():
    model, ids = tiny_model(**CONFIGS["one"], num_retrieved_chunks=9), random_ids(2, 30)
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert max(worst(*pair) for pair in zip(*gradients, strict=True)) < CLOSE


def test_generation_goes_on_behind_them():
    model, ids = tiny_model(**CONFIGS["one"]), random_ids(2, 30)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, use_cache=False, **options)
    assert same_bits(model.generate(ids, **options), plain)
    assert same_bits(model.generate(ids, prefill_chunk_size=7, lower_only_prefill=True, **options), plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_sink_tokens": 1},
        {**ROPE, "num_sink_tokens": 6},
        {**ROPE, "num_sink_tokens": 1, "sliding_window": None},
        {**ROPE, "num_sink_tokens": 3, "sliding_window": 2, "retrieval_groups": []},
    ],
)
def test_sinks_that_would_do_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="num_sink_tokens must be at most chunk_size=5 and sliding_window="):
        tiny_config(**changes)


def test_kernels_say_that_they_have_none():
    model = tiny_model(**CONFIGS["one"]).float()
    model.set_attn_implementation("insnext_triton")
    with pytest.raises(ValueError, match='insnext_triton" has no attention sinks, got 1; use eager or sdpa'):
        model(random_ids(1, 12))
