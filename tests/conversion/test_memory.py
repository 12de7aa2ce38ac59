"""`--memory`: a Llama with a short window and a memory is the Llama within the window, however its reading begins."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from conversion.convert import convert_tensors
from conversion.from_gpt2 import FAMILY as GPT2
from conversion.from_llama import FAMILY as LLAMA
from conversion.memory import BEGINNINGS
from modeling_insnext import ChunkMemoryCache, DrtForCausalLM
from tests.support.drt import padded, read, whole
from tests.support.equality import difference, same_bits
from tests.support.sources import DECODERS, LLAMA3, SMALL, exact, random_ids, shaken, source_model


CLOSE = 1e-9
SHORT = {"chunk_size": 5, "num_retrieved_chunks": 2, "sliding_window": 12}
# SmolLM2-135M with everything but its layers shrunk: nine heads, three of keys
DEEP = LlamaConfig(
    **{**SMALL, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30},
    tie_word_embeddings=True,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
)
SOURCES = {
    "deep": DEEP,
    "llama": DECODERS["llama"],
    "llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "biased": DECODERS["llama_biased"],
    "qwen3": DECODERS["qwen3"],
    "mistral": DECODERS["mistral"],
}
# cross-attention has neither biases nor norms of heads, so these have nothing to be copied into it
FRESH_ONLY = ("biased", "qwen3")
CASES = [(name, begin) for name in SOURCES for begin in BEGINNINGS if begin == "fresh" or name not in FRESH_ONLY]
every_case = pytest.mark.parametrize(("name", "begin"), CASES)


def source_of(name):
    torch.manual_seed(0)
    return exact(shaken(AutoModelForCausalLM.from_config(SOURCES[name])))


def remembering(source, begin, **options):
    options = {**SHORT, **options}
    converted = convert_tensors(LLAMA, source.state_dict(), source.config, "drt", memory=begin, **options)
    model = DrtForCausalLM(converted.config).double().eval()
    model.load_state_dict(converted.tensors, strict=not converted.config.tie_word_embeddings)
    return model


def awake(model):
    """Let what was read say something."""
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.config.cross_layers:
        cross = model.model.layers[layer].cross_attn
        silent = cross.gate if model.config.gated_retrieval else cross.o_proj.weight
        with torch.no_grad():
            silent.copy_(torch.randn(silent.shape, generator=generator, dtype=silent.dtype))
    return model


def with_window(source, ids, window, sinks):
    back = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
    sees = (back >= 0) & ((back < window) | (torch.arange(ids.shape[1]) < sinks))
    mask = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -torch.inf)[None, None]
    with torch.no_grad():
        return source(ids, attention_mask=mask, use_cache=False).logits


@every_case
def test_it_begins_as_the_source_under_its_window_and_first_token(name, begin):
    source, ids = source_of(name), random_ids(1, 40)
    model = remembering(source, begin)
    window, sinks = model.config.sliding_window, model.config.num_sink_tokens
    expected = with_window(source, ids, window, sinks)
    assert difference(whole(model, ids), expected) < CLOSE
    # the first tokens, up to the window, are those of the source that sees everything
    with torch.no_grad():
        full = source(ids, use_cache=False).logits
    assert name == "mistral" or difference(whole(model, ids)[:, :window], full[:, :window]) < CLOSE
    # control: eight chunks were read, and once they are listened to it is another function
    assert difference(whole(awake(model), ids), expected) > 1e-3


def ways_of_reading(model, ids):
    """Yield a name and the logits of the last four tokens of each row, for every way of reading."""
    lengths = [ids.shape[1], 31, 18]
    ragged, mask = padded(ids, lengths, "left")
    yield "ragged", [whole(model, ragged, mask)[:, -4:], lengths]
    full = [ids.shape[1]] * len(ids)
    for step in (1, 7):
        yield f"steps of {step}", [read(model, ids, ChunkMemoryCache(model.config), step)[:, -4:], full]
    for location in ("host", "disk"):
        past = model.prefill(ids[:, :-4], past_key_values=ChunkMemoryCache(model.config, location), segment_length=9)
        yield location, [read(model, ids[:, -4:], past, 4), full]
    past = model.prefill(ids[:, :-4], segment_length=9, lower_only=True)
    yield "lower only", [read(model, ids[:, -4:], past, 4), full]


@pytest.mark.parametrize("begin", BEGINNINGS)
def test_however_it_reads_the_memory_of_thirty_layers_it_is_one_function(begin):
    model, ids = awake(remembering(source_of("deep"), begin)), random_ids(3, 44)
    for way, (logits, lengths) in ways_of_reading(model, ids):
        for row, length in enumerate(lengths):
            alone = whole(model, ids[row : row + 1, :length])[0, -4:]
            assert difference(logits[row], alone) < CLOSE, way


def test_the_shape_for_smollm2():
    config = LlamaConfig(num_hidden_layers=30, max_position_embeddings=8192)
    fields = LLAMA.memory(config, "copy")
    assert (fields["num_lower_layers"], fields["retrieval_groups"]) == (15, [5, 5, 5])
    assert [fields[n] for n in ("sliding_window", "num_sink_tokens", "chunk_size", "num_retrieved_chunks")] == [
        *(512, 1),
        *(64, 8),
    ]
    model = remembering(source_of("deep"), "copy")
    assert model.config.cross_layers == [15, 20, 25] and model.config.memory_heads == 9
    # a window of the source's own is no longer than it was, and needs no sink
    rolling = LLAMA.memory(MistralConfig(num_hidden_layers=4, sliding_window=256), "fresh")
    assert (rolling["sliding_window"], rolling["num_sink_tokens"]) == (256, 0)
    longer = LLAMA.memory(MistralConfig(num_hidden_layers=4, sliding_window=4096), "fresh")
    assert (longer["sliding_window"], longer["num_sink_tokens"]) == (512, 1)


def test_copied_reading_has_the_keys_and_values_that_self_attention_makes():
    """Of the first upper layer exactly, positions aside; another layer's are something else."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**DEEP.to_dict(), "rms_norm_eps": 1e-30})
    source = exact(shaken(AutoModelForCausalLM.from_config(config)))
    model, ids = remembering(source, "copy", encoder_rms_norm_eps=1e-30), random_ids(1, 40)
    past = ChunkMemoryCache(model.config)
    read(model, ids, past, 40)
    states = {}
    layer = source.model.layers[15]
    layer.self_attn.k_proj.register_forward_hook(lambda module, inputs, out: states.update(keys=out))
    layer.self_attn.v_proj.register_forward_hook(lambda module, inputs, out: states.update(values=out))
    with_window(source, ids, 12, 1)
    held = past.memory.slab.chunks[:8]
    for part, name in enumerate(("keys", "values")):
        expected = states[name][0].unflatten(-1, (3, 4)).unflatten(0, (8, 5)).transpose(1, 2)
        assert difference(held[:, part, :3], expected) < CLOSE
        assert difference(held[:, part, 3:6], expected) > 1e-3
    first, own = model.model.layers[15], source.model.layers[15].self_attn
    assert same_bits(first.cross_attn.q_proj.weight, own.q_proj.weight)
    assert same_bits(first.cross_attn.o_proj.weight, own.o_proj.weight)


@pytest.mark.parametrize("begin", BEGINNINGS)
def test_what_is_silent_learns_from_the_first_step_and_the_rest_follows(begin):
    model, ids = remembering(source_of("llama"), begin), random_ids(2, 40)
    silent = "gate" if begin == "copy" else "o_proj.weight"
    for step in range(2):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads = {name: p.grad.abs().max() for name, p in model.named_parameters() if p.grad is not None}
        cross = {name: grad for name, grad in grads.items() if ".cross_attn." in name}
        assert all((grad > 1e-9) == (name.endswith(silent) or step == 1) for name, grad in cross.items())
        assert (grads["model.encoder.k_proj.weight"] > 1e-9) == (step == 1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(f"cross_attn.{silent}"):
                    p.sub_(p.grad)


@pytest.mark.parametrize(
    ("family", "source", "options", "message"),
    [
        (LLAMA, "qwen2", {"memory": "copy"}, "memory=copy needs attention_bias=False, .* got True: use memory=fresh"),
        (LLAMA, "qwen3", {"memory": "copy"}, "memory=copy needs qk_norm=False"),
        (LLAMA, "llama", {"memory": "copy", "keys_per_layer": False}, "memory=copy needs keys_per_layer=True"),
        (LLAMA, "llama", {"memory": "copy", "retrieval_groups": []}, r"needs layers that retrieve, got .*=\[\]"),
        (LLAMA, "llama", {"memory": "drawn"}, r"memory must be one of \('copy', 'fresh'\), got 'drawn'"),
        (GPT2, "gpt2", {"memory": "fresh"}, "memory is for DRTs made of a Llama and its like, got 'fresh' for GPT-2"),
    ],
)
def test_what_has_no_memory_is_refused(family, source, options, message):
    source = source_model(source)
    with pytest.raises(ValueError, match=message):
        convert_tensors(family, source.state_dict(), source.config, "drt", **{**SHORT, **options})
