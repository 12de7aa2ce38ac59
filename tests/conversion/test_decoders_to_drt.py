"""Llama, Qwen, Mistral and GPT-2 as DRT: the same function in float64, and the way back bit for bit."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

from conversion.checkpoint import expected_shapes
from conversion.convert import convert_back, convert_tensors, with_prefix
from conversion.from_gpt2 import FAMILY as GPT2
from conversion.from_llama import FAMILY as LLAMA
from modeling_insnext import ChunkMemoryCache, DrtForCausalLM
from tests.support.equality import difference, same_bits
from tests.support.sources import CHUNKS, DECODERS, SMALL, exact, random_ids, shaken, source_model


CLOSE = 1e-9
every_decoder = pytest.mark.parametrize("name", DECODERS)


def family_of(name):
    return GPT2 if name == "gpt2" else LLAMA


def as_drt(source, name, **options):
    converted = convert_tensors(family_of(name), source.state_dict(), source.config, "drt", **{**CHUNKS, **options})
    model = DrtForCausalLM(converted.config).double().eval()
    model.load_state_dict(converted.tensors, strict=not converted.config.tie_word_embeddings)
    return model


@torch.no_grad()
def logits_of(model, ids, mask=None):
    options = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    if isinstance(model, DrtForCausalLM):
        options = {}
    return model(ids, attention_mask=mask, use_cache=False, **options).logits


@every_decoder
@pytest.mark.parametrize("options", [{}, {"residual": "stream", "landmark_source": "cls"}], ids=["bypass", "stream"])
def test_a_decoder_as_drt_is_the_same_function(name, options):
    source, ids = exact(source_model(name)), random_ids(2, 40)
    drt = as_drt(source, name, **options)
    assert difference(logits_of(drt, ids), logits_of(source, ids)) < CLOSE
    # with eight chunks, of which two are read: once retrieval says something, it is another function
    torch.nn.init.normal_(drt.model.layers[-1].cross_attn.o_proj.weight)
    assert difference(logits_of(drt, ids), logits_of(source, ids)) > 1e-3


@every_decoder
def test_a_source_as_it_is_differs_by_its_own_float32(name):
    """Transformers rounds RMSNorms and rotary tables to float32 in any model; GPT-2 has neither."""
    source, ids = source_model(name), random_ids(2, 40)
    error = difference(logits_of(as_drt(source, name), ids), logits_of(source, ids))
    assert error < (CLOSE if name == "gpt2" else 1e-4)
    assert (error > 1e-9) == (name != "gpt2")


@every_decoder
def test_padded_rows_token_by_token_and_in_segments_are_the_source(name):
    source, ids = exact(source_model(name)), random_ids(2, 30)
    drt, mask = as_drt(source, name), torch.ones(2, 30, dtype=torch.long)
    mask[1, :11] = 0
    expected, real = logits_of(source, ids, mask), mask.bool()
    assert difference(logits_of(drt, ids, mask)[real], expected[real]) < CLOSE
    for step in (1, 7):
        past, logits = ChunkMemoryCache(drt.config), []
        with torch.no_grad():
            for column in range(0, 30, step):
                end = min(column + step, 30)
                logits.append(drt(ids[:, column:end], mask[:, :end], past_key_values=past).logits)
        assert difference(torch.cat(logits, 1)[real], expected[real]) < CLOSE


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_beyond_a_shorter_window_a_source_keeps_its_first_token(name):
    """The source under a mask of a window of 12 and its first token; of the window alone it is another."""
    source, ids = exact(source_model(name)), random_ids(1, 40)
    back = torch.arange(40)[:, None] - torch.arange(40)
    near = (back >= 0) & (back < 12)
    for sinks in (1, 0):
        drt = as_drt(source, name, sliding_window=12, **({} if sinks else {"num_sink_tokens": 0}))
        assert drt.config.num_sink_tokens == sinks
        logits = logits_of(drt, ids)
        for sees, same in ((near | ((back >= 0) & (torch.arange(40) == 0)), sinks == 1), (near, sinks == 0)):
            mask = torch.zeros(40, 40, dtype=torch.float64).masked_fill(~sees, -torch.inf)[None, None]
            with torch.no_grad():
                expected = source(ids, attention_mask=mask, use_cache=False).logits
            assert (difference(logits, expected) < CLOSE) == same


def test_a_window_that_rolls_in_the_source_gets_no_sink():
    config = MistralConfig(**SMALL, sliding_window=12)
    assert LLAMA.fields(config, "drt")["num_sink_tokens"] == 0
    assert LLAMA.fields(source_model("llama").config, "drt")["num_sink_tokens"] == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_shorter_window_is_the_same_function_up_to_there(name):
    source, ids = exact(source_model(name)), random_ids(1, 40)
    drt = as_drt(source, name, sliding_window=12)
    difference = (logits_of(drt, ids) - logits_of(source, ids)).abs().amax(2)[0]
    # the thirteenth token sees its window and the first one, which is everything
    assert difference[:13].max() < CLOSE and difference[13:].min() > 1e-6


def test_the_window_of_mistral_is_the_window():
    source, ids = exact(source_model("mistral")), random_ids(1, 40)
    drt = as_drt(source, "mistral")
    assert drt.config.sliding_window == source.config.sliding_window == 9
    for wrong in (8, 10):
        assert (
            difference(logits_of(as_drt(source, "mistral", sliding_window=wrong), ids), logits_of(source, ids)) > 1e-6
        )


@every_decoder
def test_generated_texts_are_the_same(name):
    source, ids = source_model(name), random_ids(2, 12)
    call = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert same_bits(as_drt(source, name).generate(ids, **call), source.generate(ids, **call))


@every_decoder
def test_the_way_back_is_bit_equal(name):
    source, family = source_model(name), family_of(name)
    there = convert_tensors(family, source.state_dict(), source.config, "drt", **CHUNKS)
    back = convert_back(family, there.tensors, there.config, source.config.model_type)
    assert sorted(back.new) == sorted(there.new)
    shapes = expected_shapes(source.config)
    tensors = with_prefix(back.tensors, shapes, f"{source.base_model_prefix}.")
    assert {n: tuple(x.shape) for n, x in tensors.items()} == shapes
    assert all(same_bits(tensors[n], source.state_dict()[n]) for n in shapes)
    old, new = source.config.to_dict(), back.config.to_dict()
    ignored = ("dtype", "architectures", "resid_pdrop", "embd_pdrop", "transformers_version")
    assert {k: v for k, v in old.items() if new[k] != v and k not in ignored and v is not None} == {}


def test_what_is_no_model_of_the_family_has_no_way_back():
    source = source_model("qwen2")
    drt = convert_tensors(LLAMA, source.state_dict(), source.config, "drt", **CHUNKS)
    with pytest.raises(ValueError, match="a llama of this shape has attention_output_bias=True, got a drt with False"):
        convert_back(LLAMA, drt.tensors, drt.config, "llama")
    with pytest.raises(ValueError, match="a gpt2 of this shape has num_key_value_heads=4, got a drt with 2"):
        convert_back(GPT2, drt.tensors, drt.config, "gpt2")
    source = source_model("mistral")
    drt = convert_tensors(LLAMA, source.state_dict(), source.config, "drt", **CHUNKS)
    with pytest.raises(ValueError, match="sees 64 tokens, got a drt with sliding_window=9"):
        convert_back(LLAMA, drt.tensors, drt.config, "llama")
    drt.tensors["model.landmark"] = torch.zeros(32).double()
    with pytest.raises(ValueError, match="needs a way back|1 without: model.landmark"):
        convert_back(LLAMA, drt.tensors, drt.config, "mistral")


STRAY = {
    "llama": {"sliding_window": 9, "layer_types": ["sliding_attention"] * 4},
    "mistral": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"attention_bias": False, "mlp_bias": True},
}


@pytest.mark.parametrize("name", STRAY)
def test_a_field_that_the_type_ignores_is_ignored(name):
    config = type(DECODERS[name])(**{**DECODERS[name].to_dict(), **STRAY[name]})
    source, ids = exact(shaken(AutoModelForCausalLM.from_config(config))), random_ids(2, 40)
    assert {getattr(config, field) for field in STRAY[name] if field != "layer_types"} <= {9, True, False}
    assert difference(logits_of(as_drt(source, name), ids), logits_of(source, ids)) < CLOSE


def test_layers_of_a_window_without_a_size_are_refused():
    config = Qwen2Config(**SMALL, layer_types=["sliding_attention"] * 4)
    with pytest.raises(ValueError, match="layers of sliding_attention need a sliding_window, got none"):
        convert_tensors(LLAMA, {}, config, "drt")


@pytest.mark.parametrize("groups", [[], [1], [1, 2], [2, 1, 1]])
def test_layers_outside_of_the_groups_are_lower_ones(groups):
    source, ids = exact(source_model("mistral")), random_ids(2, 40)
    drt = as_drt(source, "mistral", retrieval_groups=groups)
    assert (drt.config.num_lower_layers, drt.config.retrieval_groups) == (4 - sum(groups), groups)
    assert difference(logits_of(drt, ids), logits_of(source, ids)) < CLOSE


def test_the_plain_window_model_goes_back_whatever_its_window():
    source = shaken(AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=1)))
    there = convert_tensors(LLAMA, source.state_dict(), source.config, "drt", retrieval_groups=[])
    back = convert_back(LLAMA, there.tensors, there.config, "mistral")
    assert there.new == back.new == [] and back.config.sliding_window == 1


def test_new_tensors_depend_on_the_seed_alone():
    source = source_model("llama")
    one, same, other = (
        convert_tensors(LLAMA, source.state_dict(), source.config, "drt", seed=seed, **CHUNKS) for seed in (1, 1, 2)
    )
    drawn = [name for name in one.new if one.tensors[name].std() > 0]
    assert len(drawn) >= 10 and not any("o_proj" in name and "cross" in name for name in drawn)
    assert all(same_bits(one.tensors[name], same.tensors[name]) for name in one.new)
    assert not any(same_bits(one.tensors[name], other.tensors[name]) for name in drawn)
    spread = torch.cat([one.tensors[name].flatten() for name in drawn]).std()
    assert 0.9 < spread / one.config.initializer_range < 1.1


def test_retrieval_can_be_learned_from_the_first_step():
    source, ids = source_model("llama"), random_ids(2, 40)
    drt = as_drt(source, "llama")
    drt(ids, labels=ids, use_cache=False).loss.backward()
    silent = [layer.cross_attn for layer in drt.model.layers if layer.cross_attn is not None]
    assert len(silent) == 2 and all(part.o_proj.weight.grad.abs().max() > 1e-6 for part in silent)
    # what stands behind the silent projection follows, once it says something
    assert all(part.q_proj.weight.grad.abs().max() == 0 for part in silent)
