"""The Auto classes with the package imported: what is loaded, what is new, and what survives saving."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
)

from modeling_insnext import InsertionGenerationConfig, InsNextConfig, InsNextForInsertionLM
from modeling_insnext.insnext import AUTO_CLASSES
from tests.support.equality import same_bits, within_rounding
from tests.support.insnext import SHIPPED_VOCAB, random_ids, shipped_model, tiny_config


IDS = random_ids(2, 6)
HEADS = [AutoModelForMultipleChoice, AutoModelForSequenceClassification, AutoModelForTokenClassification]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = shipped_model(InsNextForInsertionLM)
    model.generation_config.ebr = True
    model.save_pretrained(folder)
    return folder, model


def read(model, ids=IDS):
    """Return everything a model says about ids."""
    with torch.no_grad():
        output = model.eval()(ids[None] if "MultipleChoice" in type(model).__name__ else ids)
    return output.last_hidden_state if "last_hidden_state" in output else output.logits


def equal_states(first, second):
    assert first.keys() == second.keys()
    return same_bits(first, second)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda auto: auto.__name__)
def test_from_config_makes_the_registered_class(auto_class):
    assert type(auto_class.from_config(tiny_config())) is AUTO_CLASSES[auto_class]


def test_all_six_auto_classes_are_registered(checkpoint):
    assert {auto.__name__ for auto in AUTO_CLASSES} == {
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMultipleChoice",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
    assert type(AutoConfig.from_pretrained(checkpoint[0])) is InsNextConfig
    assert type(AutoConfig.for_model("insnext")) is InsNextConfig


def test_a_saved_model_gives_the_same_logits_bit_for_bit(checkpoint):
    folder, model = checkpoint
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert not loaded.training
    assert equal_states(model.state_dict(), loaded.state_dict())
    assert within_rounding(read(loaded), read(model))
    positions = torch.tensor([[0, 4, 1, 3, 2, 5]] * 2)
    losses = [m(IDS, positions=positions, context_length=2, labels=IDS).loss for m in (model, loaded)]
    assert losses[0] == losses[1]


def test_the_encoder_of_a_checkpoint_is_loaded_whole(checkpoint):
    folder, model = checkpoint
    encoder, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(key.startswith("slot_head.") for key in report["unexpected_keys"])
    assert equal_states(encoder.state_dict(), model.model.state_dict())


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto: auto.__name__)
def test_a_head_gets_the_weights_of_the_language_model_and_a_new_classifier(checkpoint, auto_class, tmp_path):
    folder, model = checkpoint
    options = {} if auto_class is AutoModelForMultipleChoice else {"num_labels": 3}
    torch.manual_seed(1)
    head, report = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    assert set(report["missing_keys"]) == {"score.weight", "score.bias"}
    assert all(key.startswith("slot_head.") for key in report["unexpected_keys"])
    assert equal_states(head.model.state_dict(), model.model.state_dict())
    assert head.score.bias.abs().max() == 0
    assert 0.1 < head.score.weight.std() / model.config.initializer_range < 10
    torch.manual_seed(2)
    assert not same_bits(auto_class.from_pretrained(folder, **options).score.weight, head.score.weight)

    head.save_pretrained(tmp_path)
    loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert within_rounding(read(loaded), read(head))


def test_the_encoder_of_a_head_becomes_a_language_model_with_new_slots(tmp_path):
    head = shipped_model(AUTO_CLASSES[AutoModelForSequenceClassification])
    head.save_pretrained(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert all(key.startswith("slot_head.") for key in report["missing_keys"])
    assert equal_states(model.model.state_dict(), head.model.state_dict())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.slot_head.edge.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "value", "default"), [("norm", "deepnorm", "rmsnorm"), ("position_encoding", "sinusoidal", "alibi")]
)
def test_the_ablations_survive_saving(name, value, default, tmp_path):
    model = shipped_model(InsNextForInsertionLM, **{name: value})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert within_rounding(read(loaded), read(model))
    # control: the field decides about the function
    other, _ = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **{name: default})
    assert not within_rounding(read(other), read(model))


def test_the_configuration_survives_saving(tmp_path):
    fields = {
        "num_key_value_heads": 2,
        "alibi_slope_ratio": 2.0,
        "position_logit_cap": 20.0,
        "attention_dropout": 0.1,
        "norm": "deepnorm",
        "pad_token_id": 5,
        "tie_word_embeddings": False,
    }
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    ignored = {"transformers_version", "_name_or_path", "auto_map"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }
    assert {name: getattr(loaded, name) for name in fields} == fields


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "auto"], ids=str)
def test_a_dtype_is_taken_from_the_caller_or_the_checkpoint(checkpoint, dtype, tmp_path):
    folder, model = checkpoint
    expected = torch.float32 if dtype == "auto" else dtype
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    assert read(loaded).isfinite().sum() == read(model).isfinite().sum()
    assert (read(loaded).exp() - read(model).exp()).abs().max() < 0.2
    loaded.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype is expected
    assert within_rounding(read(AutoModelForCausalLM.from_pretrained(tmp_path)), read(loaded))


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
def test_a_device_map_on_the_cpu(checkpoint, device_map):
    folder, model = checkpoint
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert within_rounding(read(loaded), read(model))
    assert same_bits(
        loaded.generate(IDS, max_new_tokens=4, do_sample=True, seed=1),
        model.generate(IDS, max_new_tokens=4, do_sample=True, seed=1),
    )


def test_nothing_is_lost_on_the_meta_device(checkpoint):
    with torch.device("meta"):
        model = InsNextForInsertionLM(tiny_config(position_encoding="sinusoidal"))
    assert model.device.type == "meta"
    # no buffer and no plain tensor that loading would leave without values
    assert not list(model.named_buffers())
    for module in model.modules():
        assert not [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_attention_is_chosen_at_load_time_or_later(checkpoint, name):
    folder, model = checkpoint
    exact = read(model).exp()
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)
    assert loaded.config._attn_implementation == loaded.model.layers[0].self_attn.config._attn_implementation == name
    assert (read(loaded).exp() - exact).abs().max() < 1e-4
    loaded.set_attn_implementation("eager")
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.model(IDS, is_causal=False, output_attentions=True).attentions[0].shape == (2, 4, 6, 6)
    loaded.set_attn_implementation(name)
    assert (read(loaded).exp() - exact).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["flash_attention_2", "no_such_attention"])
def test_an_attention_that_does_not_exist_is_refused(checkpoint, name):
    with pytest.raises((ValueError, ImportError), match=name.replace("flash_attention_2", "Flash")):
        AutoModelForCausalLM.from_pretrained(checkpoint[0], attn_implementation=name)


def test_sinusoidal_refuses_flex_attention():
    model = shipped_model(InsNextForInsertionLM, position_encoding="sinusoidal", attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="sinusoidal.*flex_attention"):
        model(IDS)


def test_the_embedding_is_the_token_head():
    model = shipped_model(InsNextForInsertionLM)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings() is model.model.embed_tokens


@pytest.mark.parametrize("tied", [True, False])
def test_more_embeddings(tied, tmp_path):
    model = shipped_model(InsNextForInsertionLM, tie_word_embeddings=tied)
    before = read(model)
    with pytest.raises(ValueError, match=r"\[0, 60\), got 64"):
        model(torch.tensor([[1, 64]]))
    model.resize_token_embeddings(SHIPPED_VOCAB + 8)
    assert model.config.vocab_size == model.lm_head.out_features == SHIPPED_VOCAB + 8
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    after = read(model)
    assert after.shape[-1] == SHIPPED_VOCAB + 8
    assert torch.allclose(after.exp().sum(-1), torch.ones(2, 6))
    # STOP does not compete with tokens, so it keeps its probability; tokens keep their odds
    assert torch.allclose(after[..., 2], before[..., 2])
    assert torch.allclose(after[..., 5] - after[..., 6], before[..., 5] - before[..., 6], atol=1e-4)
    assert model.generate(torch.tensor([[1, 64]]), max_new_tokens=3).shape[1] > 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert within_rounding(read(loaded), after)


def test_untied_heads_stay_apart(tmp_path):
    model = shipped_model(InsNextForInsertionLM, tie_word_embeddings=False)
    assert not same_bits(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert within_rounding(read(loaded), read(model))


def test_generation_options_survive_saving_again_and_again(tmp_path):
    fields = {"ebr": True, "ebr_ratio": 0.5, "ebr_window": 8, "seed": [3, 4], "slot_top_p": 0.9, "max_new_tokens": 7}
    model = shipped_model(InsNextForInsertionLM)
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    for generation in range(3):
        folder = tmp_path / str(generation)
        model.save_pretrained(folder)
        assert fields.items() <= json.loads((folder / "generation_config.json").read_text()).items()
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model.generation_config) is InsertionGenerationConfig
        assert {name: getattr(model.generation_config, name) for name in fields} == fields
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)


def test_a_plain_generation_config_is_taken_over_at_load_time(checkpoint):
    options = GenerationConfig(max_new_tokens=3, top_k=7)
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], generation_config=options)
    assert type(model.generation_config) is InsertionGenerationConfig
    assert (model.generation_config.max_new_tokens, model.generation_config.top_k) == (3, 7)


def test_a_checkpoint_without_generation_options_gets_the_defaults(tmp_path):
    shipped_model(InsNextForInsertionLM).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model.generation_config) is InsertionGenerationConfig
    assert model.generation_config.eos_token_id == 2
    assert model.generate(IDS, max_new_tokens=3).shape[0] == 2


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = shipped_model(InsNextForInsertionLM)
    with torch.no_grad():
        model.slot_head.edge[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"finite, got 1 .* slot_head\.edge"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
