"""Quantised at load time: torchao and bitsandbytes, both architectures."""

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_insnext import DrtForCausalLM, InsNextForInsertionLM
from tests.support import drt, insnext
from tests.support.equality import same_bits


quantization = pytest.importorskip("torchao.quantization")
pytestmark = pytest.mark.outside

IDS = torch.tensor([[1, 5, 9, 4], [1, 7, 3, 8]])
MODELS = {"insnext": (InsNextForInsertionLM, insnext.tiny_model), "drt": (DrtForCausalLM, drt.tiny_model)}
CONFIGS = {
    "torchao int8 weights": lambda: TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    "torchao int8": lambda: TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig()),
    "bitsandbytes 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4 bits": lambda: BitsAndBytesConfig(load_in_4bit=True),
}


def nats(model):
    """Return -log p of the second half of the texts, left to right."""
    with torch.no_grad():
        log_p = model(IDS).logits.log_softmax(-1)
    return float(-log_p[:, 1:-1].gather(2, IDS[:, 2:, None]).mean())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", CONFIGS)
def test_a_quantised_model_is_nearer_to_its_source_than_another_model(name, how, tmp_path):
    model_class, make = MODELS[name]
    make(dtype=torch.float32).save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, quantization_config=CONFIGS[how]())
    exact, other = nats(make(dtype=torch.float32)), nats(make(dtype=torch.float32, seed=1))
    assert 0 < abs(nats(model) - exact) < abs(other - exact)
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == 7
    if name == "insnext":
        loss = model(IDS, positions=torch.tensor([[0, 2, 1, 3]] * 2), context_length=1, labels=IDS).loss
        assert loss.isfinite()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_quantised_by_torchao_is_saved_and_loaded(name, tmp_path):
    model_class, make = MODELS[name]
    make(dtype=torch.float32).save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, quantization_config=CONFIGS["torchao int8 weights"]())
    model.save_pretrained(tmp_path / "small")
    loaded = model_class.from_pretrained(tmp_path / "small")
    assert type(loaded.model.layers[0].mlp.up_proj.weight) is type(model.model.layers[0].mlp.up_proj.weight)
    parts = [layer.mlp.up_proj.weight.dequantize() for layer in (model.model.layers[0], loaded.model.layers[0])]
    assert same_bits(*parts)


def kept_whole(model) -> list[str]:
    """Return the linear layers whose weights are what they were."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return [name for name, module in linear.items() if type(module.weight) is torch.nn.Parameter]


@pytest.mark.parametrize("name", MODELS)
def test_torchao_takes_every_projection_and_leaves_the_tied_head(name, tmp_path):
    model_class, make = MODELS[name]
    make(dtype=torch.float32).save_pretrained(tmp_path)
    config = CONFIGS["torchao int8 weights"]()
    assert kept_whole(model_class.from_pretrained(tmp_path, quantization_config=config)) == ["lm_head"]


def test_the_slot_head_is_left_out_where_that_is_asked_and_stays_out_when_saved(tmp_path):
    insnext.tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["slot_head", "lm_head"])
    model = InsNextForInsertionLM.from_pretrained(tmp_path, quantization_config=config)
    model.save_pretrained(tmp_path / "small")
    loaded = InsNextForInsertionLM.from_pretrained(tmp_path / "small")
    names = ["left_proj", "right_proj", "state_proj", "query_proj", "key_proj"]
    for each in (model, loaded):
        assert kept_whole(each) == [*(f"slot_head.{name}" for name in names), "lm_head"]
    assert same_bits(model.slot_head.query_proj.weight, loaded.slot_head.query_proj.weight)
