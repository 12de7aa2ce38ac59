"""Position encodings and the other options of the decoder: what they keep, what they refuse."""

import json

import pytest
import torch

from modeling_insnext import ChunkMemoryCache, DrtConfig, DrtForCausalLM
from modeling_insnext.drt import modeling_drt, positions
from modeling_insnext.drt.rope import Rope, rope_of
from tests.support.drt import FORMS, GPT2, ROPE, random_ids, read, tiny_config, tiny_model, whole
from tests.support.equality import same_bits, within_rounding


LONG = 10_000_000


def turned_back(position: int, config, wide: bool) -> torch.Tensor:
    """Return cosines of the turns between `position` and the one before, which no position may change."""
    frequencies = rope_of(config).frequencies
    places = torch.tensor([position - 1, position])
    if wide:
        cos, sin = Rope(frequencies, 1.0).turns(places, torch.float64)
    else:
        angle = (places[:, None].float() * torch.tensor(frequencies).repeat(2)).double()
        cos, sin = angle.cos(), angle.sin()
    return cos[0] * cos[1] + sin[0] * sin[1]


def test_rotary_positions_stay_exact_at_ten_million():
    config = tiny_config(**ROPE, hidden_size=256)
    near = turned_back(1, config, wide=True)
    assert (turned_back(LONG, config, wide=True) - near).abs().max() < 1e-6
    # control: angles in float32
    assert (turned_back(LONG, config, wide=False) - near).abs().max() > 0.1


def test_only_differences_of_rotary_positions_matter(monkeypatch):
    model, ids = tiny_model(**ROPE), random_ids(2, 30)
    expected, right = whole(model, ids), positions.slot_positions
    monkeypatch.setattr(modeling_drt, "slot_positions", lambda *args: right(*args) + 1000)
    assert (whole(model, ids) - expected).abs().max() < 1e-9
    # control: positions twice as far apart
    monkeypatch.setattr(modeling_drt, "slot_positions", lambda *args: right(*args) * 2)
    assert (whole(model, ids) - expected).abs().max() > 1e-3


def test_casting_a_model_does_not_round_its_frequencies():
    model = tiny_model(**ROPE)
    before = model.model.rope
    assert model.bfloat16().model.rope == before
    assert not same_bits(torch.tensor(before[0]).bfloat16().float(), torch.tensor(before[0]))


@pytest.mark.parametrize("name", FORMS)
def test_a_model_of_any_form_is_saved_and_loaded(name, tmp_path):
    model, ids = tiny_model(**FORMS[name]), random_ids(1, 30)
    model.save_pretrained(tmp_path)
    loaded = DrtForCausalLM.from_pretrained(tmp_path, dtype="float64")
    assert {n: w.shape for n, w in loaded.state_dict().items()} == {n: w.shape for n, w in model.state_dict().items()}
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert within_rounding(whole(loaded, ids), whole(model, ids))
    texts = [some.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None) for some in (loaded, model)]
    assert same_bits(*texts)


def test_new_biases_are_zero_and_new_norms_one():
    state = tiny_model(**GPT2).state_dict()
    biases = [name for name in state if name.endswith("bias")]
    norms = [name for name in state if "norm" in name and name.endswith("weight")]
    assert len(biases) > 20 and not any(state[name].any() for name in biases)
    assert len(norms) > 10 and all((state[name] == 1).all() for name in norms)


def test_a_configuration_without_the_options_means_what_it_meant(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    younger = {"position_encoding", "rope_parameters", "max_position_embeddings", "norm", "hidden_act", "qk_norm"}
    younger |= {"gated_mlp", "mlp_bias", "attention_bias", "attention_output_bias", "head_dim"}
    older = {name: value for name, value in saved.items() if name not in younger}
    assert DrtConfig(**older).to_dict() == config.to_dict()
    assert config.rope_parameters is None and config.position_encoding == "alibi"
    names = set(tiny_model().state_dict())
    assert not any(name.endswith("bias") or "embed_positions" in name for name in names)


def test_no_text_is_longer_than_its_learned_positions():
    model = tiny_model(**{**GPT2, "max_position_embeddings": 20, "landmark_source": "mean"})
    ids = random_ids(1, 21)
    assert whole(model, ids[:, :20]).isfinite().all()
    with pytest.raises(ValueError, match="holds at most max_position_embeddings=20, got 21"):
        whole(model, ids)
    past = ChunkMemoryCache(model.config)
    read(model, ids[:, :20], past)
    with pytest.raises(ValueError, match="holds at most max_position_embeddings=20, got 21"):
        read(model, ids[:, 20:], past)
    assert past.seen == [20]


def test_a_saved_memory_is_of_its_position_encoding(tmp_path):
    model, path = tiny_model(**ROPE), tmp_path / "book"
    past = ChunkMemoryCache(model.config)
    read(model, random_ids(1, 30), past, 10)
    past.save(path, model)
    ChunkMemoryCache.load(path, model)
    for changes, rule in (
        ({}, "position_encoding is 'rope' in it, 'alibi' in the model"),
        ({**ROPE, "rope_parameters": {"rope_theta": 9.0}}, "rope_parameters is .* in it, .*9.0.* in the model"),
    ):
        with pytest.raises(ValueError, match=rule):
            ChunkMemoryCache.load(path, tiny_model(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_encoding": "rotary"}, "position_encoding must be one of .* got 'rotary'"),
        ({"norm": "batchnorm"}, r"norm must be one of \('rmsnorm', 'layernorm'\), got 'batchnorm'"),
        ({"hidden_act": "swish5"}, "hidden_act must be one of .* got 'swish5'"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters need position_encoding=\"rope\", got 'alibi'"),
        ({**ROPE, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "must be one of .* got 'dynamic'"),
        ({**ROPE, "rope_parameters": {"partial_rotary_factor": 0.5}}, "whole heads are turned, got .*=0.5"),
        ({"position_encoding": "learned"}, r"must be .* \(position_encoding='learned'\), got None"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be an integer of at least 1 .* got 0"),
        ({"head_dim": 5}, "the head width must be even .* got 5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
