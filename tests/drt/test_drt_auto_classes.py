"""The Auto classes with the package imported: what is loaded, what is new, and what survives saving."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from modeling_insnext import DrtConfig, DrtForCausalLM, DrtForSequenceClassification, DrtModel
from modeling_insnext.drt import AUTO_CLASSES
from tests.support.drt import random_ids, shipped_model, tiny_config
from tests.support.equality import same_bits, within_rounding


IDS = random_ids(2, 33)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = shipped_model()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def read(model, ids=IDS):
    output = model.eval()(ids)
    return output.last_hidden_state if "last_hidden_state" in output else output.logits


def equal_states(first, second):
    assert first.keys() == second.keys()
    return same_bits(first, second)


def test_three_auto_classes_are_registered(checkpoint):
    assert AUTO_CLASSES == {
        AutoModel: DrtModel,
        AutoModelForCausalLM: DrtForCausalLM,
        AutoModelForSequenceClassification: DrtForSequenceClassification,
    }
    for auto_class, model_class in AUTO_CLASSES.items():
        assert type(auto_class.from_config(tiny_config())) is model_class
    assert type(AutoConfig.from_pretrained(checkpoint[0])) is DrtConfig


def test_a_saved_model_comes_back_bit_for_bit_and_gives_the_same_logits(checkpoint):
    folder, model = checkpoint
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert not loaded.training
    assert equal_states(model.state_dict(), loaded.state_dict())
    assert within_rounding(read(loaded), read(model))
    # control: another seed is another model
    assert not within_rounding(read(shipped_model(seed=1)), read(model))


def test_the_generation_config_survives(checkpoint):
    folder, model = checkpoint
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.generation_config.max_new_tokens == 7
    out = loaded.generate(IDS, do_sample=False)
    assert same_bits(out, model.generate(IDS, do_sample=False)) and out.shape[1] <= 33 + 7


def test_the_decoder_of_a_checkpoint_is_loaded_whole(checkpoint):
    folder, model = checkpoint
    decoder, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert within_rounding(read(decoder), read(model.model))


def test_a_decoder_is_loaded_from_an_untied_language_model_without_a_report(tmp_path):
    shipped_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    for auto_class, missing in ((AutoModel, set()), (AutoModelForSequenceClassification, {"score.weight"})):
        _, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert set(report.pop("missing_keys")) == missing and not any(report.values()), report


def test_a_head_gets_the_weights_of_the_language_model_and_a_new_classifier(checkpoint, tmp_path):
    folder, model = checkpoint
    torch.manual_seed(1)
    head, report = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert set(report["missing_keys"]) == {"score.weight"} and not report["unexpected_keys"]
    assert equal_states(head.model.state_dict(), model.model.state_dict())
    assert 0.1 < head.score.weight.std() / model.config.initializer_range < 10
    head.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert within_rounding(read(loaded), read(head))


@pytest.mark.parametrize(
    "changes",
    [
        {"retriever": "fixed"},
        {"retriever": "random"},
        {"landmark_source": "cls"},
        {"landmark_source": "mean", "landmark_slot": "dropped"},
        {"retrieval_groups": []},
        {"retrieval_groups": [], "sliding_window": None, "self_attention": "landmark"},
        {"tie_word_embeddings": False},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_kind_of_model_survives_saving(changes, tmp_path):
    model = shipped_model(**changes)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert within_rounding(read(loaded), read(model))


def test_the_frozen_vectors_of_a_fixed_retriever_are_saved_and_not_trained(tmp_path):
    model = shipped_model(retriever="fixed")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert same_bits(stored["model.bag_of_tokens"], model.model.bag_of_tokens)
    assert model.model.bag_of_tokens.std() > 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.bag_of_tokens.dtype == torch.bfloat16
    # control: other vectors choose other chunks
    save_file({**stored, "model.bag_of_tokens": -stored["model.bag_of_tokens"].roll(1, 0)}, tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / "model.safetensors")
    assert not within_rounding(read(AutoModelForCausalLM.from_pretrained(tmp_path)), read(model))


def test_weights_are_tied_after_loading_and_saved_once(checkpoint):
    folder, model = checkpoint
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "auto"], ids=str)
def test_a_dtype_is_taken_from_the_caller_or_the_checkpoint(checkpoint, dtype):
    folder, model = checkpoint
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    assert {weight.dtype for weight in loaded.state_dict().values()} == {expected}
    logits = read(loaded)
    assert logits.dtype == expected
    close = (logits.float() - read(model)).abs().max() / read(model).std()
    assert close < (0.5 if dtype == torch.bfloat16 else 1e-4)


def test_half_precision_writes_and_reads_its_cache(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(IDS).logits
        first = model(IDS[:, :19], use_cache=True)
        second = model(IDS[:, 19:], past_key_values=first.past_key_values)
    assert first.past_key_values.memory.landmarks.dtype == torch.bfloat16
    error = (torch.cat([first.logits, second.logits], 1) - expected).float().abs().mean() / expected.float().std()
    assert error < 0.05
    assert model.generate(IDS, do_sample=False, max_new_tokens=9).shape[1] <= 42


def test_weights_that_are_no_numbers_are_refused(checkpoint, tmp_path):
    folder, model = checkpoint
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.landmark"][3] = float("nan")
    stored["model.landmark"][4] = float("inf")
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights must be finite, got 2 that are not in model.landmark"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_new_weights_have_the_spread_of_the_config_and_nothing_is_left_empty():
    model = shipped_model(landmark_source="cls", initializer_range=0.05)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert weight.eq(1).all(), name
        else:
            assert 0.5 < weight.std() / 0.05 < 1.5, name
    # a checkpoint of another model lacks what this one has: those weights are new, and drawn from the generator
    assert 0.5 < shipped_model(initializer_range=0.05).model.landmark.std() / 0.05 < 1.5


def test_a_model_with_a_landmark_is_made_of_one_without(tmp_path):
    """What a checkpoint does not have is drawn anew, and nothing is left uninitialised."""
    shipped_model(retrieval_groups=[], num_lower_layers=4).save_pretrained(tmp_path)
    torch.manual_seed(3)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, retrieval_groups=[1, 1], num_lower_layers=2
    )
    assert {"model.landmark", "model.encoder.k_proj.weight", "model.query_norms.0.weight"} <= report["missing_keys"]
    assert model.model.landmark.std() > 0.1 and model.model.query_norms[0].weight.eq(1).all()
    assert read(model).isfinite().all()


def test_attention_can_be_chosen_at_load_time(checkpoint):
    folder, model = checkpoint
    for name in ("eager", "sdpa", "flex_attention"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)
        assert loaded.config._attn_implementation == name
        assert (read(loaded) - read(model)).abs().max() < 1e-4 * read(model).std()
    assert "attn_implementation" not in json.dumps(json.loads((folder / "config.json").read_text()))
    with pytest.raises(ValueError, match="no_such_thing"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="no_such_thing")


def test_more_tokens_can_be_added(tmp_path):
    model = shipped_model()
    before = read(model)
    model.resize_token_embeddings(60)
    assert model.config.vocab_size == model.vocab_size == 60 and read(model).shape[-1] == 60
    assert within_rounding(read(model)[..., :50], before)
    assert read(model, IDS + 10).isfinite().all()
    labels = IDS + 10
    assert model(labels, labels=labels).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert equal_states(model.state_dict(), loaded.state_dict())
    assert within_rounding(read(loaded), read(model))
