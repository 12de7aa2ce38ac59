"""Llama, Qwen and Mistral as insertion models: from left to right the same function in float64, and the way back."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from conversion.convert import convert_back, convert_tensors
from conversion.from_llama import FAMILY
from modeling_insnext import InsNextForInsertionLM
from tests.support.equality import difference, same_bits
from tests.support.sources import DECODERS, SMALL, exact, random_ids, shaken, source_model


CLOSE = 1e-9
LINEAR = LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0})
SOURCES = {name: config for name, config in DECODERS.items() if name != "gpt2"} | {"linear": LINEAR}
every_decoder = pytest.mark.parametrize("name", SOURCES)


def source_of(name):
    if name in DECODERS:
        return source_model(name)
    torch.manual_seed(0)
    return shaken(AutoModelForCausalLM.from_config(SOURCES[name]))


def as_insnext(source, **options):
    converted = convert_tensors(FAMILY, source.state_dict(), source.config, "insnext", **options)
    model = InsNextForInsertionLM(converted.config).double().eval()
    model.load_state_dict(converted.tensors, strict=not converted.config.tie_word_embeddings)
    return model


def without(log_p, ids):
    """Return log-probabilities without these ids, renormalised."""
    log_p = log_p.clone()
    log_p[..., ids] = -torch.inf
    return log_p.log_softmax(-1)[..., [i for i in range(log_p.shape[-1]) if i not in ids]]


@torch.no_grad()
def both(ours, source, ids):
    """Return log p(token | the text goes on) of both, without the ids that frame a text."""
    structure = ours.config.never_inserted
    return without(ours(ids).logits, structure), without(source(ids).logits, structure)


def reach(name):
    return SOURCES[name].sliding_window if "window" in name or name == "mistral" else 30


@every_decoder
def test_from_left_to_right_it_is_its_source(name):
    source, ids = exact(source_of(name)), random_ids(2, reach(name))
    ours = as_insnext(source)
    assert difference(*both(ours, source, ids)) < CLOSE
    # once a slot says something of its right neighbour, it is another function
    torch.nn.init.normal_(ours.slot_head.right_proj.weight)
    torch.nn.init.normal_(ours.slot_head.edge)
    assert difference(*both(ours, source, ids)) > 1e-3


@every_decoder
def test_control_other_rotary_positions_are_another_function(name):
    source, ids = exact(source_of(name)), random_ids(2, reach(name))
    ours = as_insnext(source)
    ours.model.rope = ours.model.rope._replace(frequencies=[1.01 * rate for rate in ours.model.rope.frequencies])
    assert difference(*both(ours, source, ids)) > 1e-5


def test_control_a_second_rmsnorm_is_another_function():
    source, ids = exact(source_of("llama_biased")), random_ids(2, 20)
    assert difference(*both(as_insnext(source, slot_norm="rmsnorm"), source, ids)) > 1e-4


@torch.no_grad()
@every_decoder
def test_at_first_a_text_goes_on_where_it_was_written_last(name):
    ours, ids = as_insnext(source_of(name)), random_ids(1, 12)
    head, state = ours.slot_head, ours.model(ids, is_causal=True).last_hidden_state
    query, allowed = head.query_proj(state), torch.ones(12, 12, dtype=torch.bool).tril()
    log_p = head.log_p(query, head.key_proj(head.left_proj(state)), allowed)[0]
    assert log_p.argmax(-1).tolist() == list(range(12)) and log_p[:, -1].exp().max() < 0.01
    # drawn weights say nothing of places
    torch.nn.init.normal_(head.key_proj.weight, std=0.02)
    drawn = head.log_p(query, head.key_proj(head.left_proj(state)), allowed)[0]
    assert drawn.argmax(-1).tolist() != list(range(12))


def test_beyond_the_window_of_mistral_it_sees_more():
    source, ids = exact(source_of("mistral")), random_ids(1, 20)
    apart = torch.stack(both(as_insnext(source), source, ids)).diff(dim=0).abs().amax((0, 1, 3))
    assert apart[:9].max() < CLOSE and apart[9:].min() > 1e-6


@every_decoder
def test_it_writes_as_its_source_where_nothing_stops_it(name):
    source, ids = exact(source_of(name)), random_ids(1, 4)
    ours = as_insnext(source)
    structure = [[token] for token in ours.config.never_inserted]
    expected = source.generate(
        ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, bad_words_ids=structure or None
    )
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert ours.generate(ids, left_to_right=True, **options).tolist() == expected.tolist()


@every_decoder
def test_the_way_back_is_bit_for_bit(name):
    source = source_of(name)
    converted = convert_tensors(FAMILY, source.state_dict(), source.config, "insnext")
    back = convert_back(FAMILY, converted.tensors, converted.config, source.config.model_type)
    expected = {n: t for n, t in source.state_dict().items() if n in back.tensors}
    assert set(expected) == set(back.tensors) and "model.norm.weight" in expected
    assert all(same_bits(back.tensors[n], tensor) for n, tensor in expected.items())
    assert "slot_head.stop_key" in back.new and "model.norm.weight" in back.new


def test_slots_that_were_trained_have_no_way_back():
    source = source_of("llama")
    converted = convert_tensors(FAMILY, source.state_dict(), source.config, "insnext")
    places = converted.tensors | {"slot_head.stop_key": torch.ones(32, dtype=torch.float64)}
    assert convert_back(FAMILY, places, converted.config, "llama").tensors.keys() == dict(source.state_dict()).keys()
    for name in ("slot_head.left_proj.weight", "slot_head.right_proj.weight", "slot_head.state_proj.weight"):
        trained = converted.tensors | {name: torch.ones(32, 32, dtype=torch.float64)}
        with pytest.raises(ValueError, match=f"slots are their left neighbours.*{name}"):
            convert_back(FAMILY, trained, converted.config, "llama")
    trained = converted.tensors | {"model.norm.weight": torch.full((32,), 2.0, dtype=torch.float64)}
    with pytest.raises(ValueError, match="model.norm.weight that was trained"):
        convert_back(FAMILY, trained, converted.config, "llama")
