"""A checkpoint as a folder: what is in it, shards, subfolders, and what importing the package costs."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_insnext
from modeling_insnext import InsertionGenerationConfig, InsNextForInsertionLM
from tests.support import forked
from tests.support.equality import same_bits, within_rounding
from tests.support.insnext import random_ids, shipped_model
from tests.support.tokenizers import tiny_tokenizer


IDS = random_ids(2, 6)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def saved_weights(folder):
    names = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {name: file.get_tensor(name).dtype for name in file.keys()}
    return names


@pytest.mark.parametrize("tied", [True, False])
def test_shared_weights_are_saved_once(tied, tmp_path):
    model = shipped_model(InsNextForInsertionLM, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    expected = {name for name, _ in model.named_parameters()}
    assert ("lm_head.weight" in expected) == (not tied)
    assert saved_weights(tmp_path).keys() == expected


def test_a_folder_in_shards(tmp_path):
    model = shipped_model(InsNextForInsertionLM)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert within_rounding(logits(loaded), logits(model))


def test_a_folder_in_a_subfolder(tmp_path):
    model = shipped_model(InsNextForInsertionLM)
    model.generation_config.ebr_ratio = 0.25
    model.save_pretrained(tmp_path / "inner")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert within_rounding(logits(loaded), logits(model))
    assert loaded.generation_config.ebr_ratio == 0.25


def test_saving_twice_writes_the_same_folder(tmp_path):
    model = shipped_model(InsNextForInsertionLM)
    model.save_pretrained(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == first


def test_the_configuration_names_no_folder_of_this_machine(tmp_path):
    shipped_model(InsNextForInsertionLM).save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "generation_config.json"):
        assert str(tmp_path) not in (tmp_path / "second" / name).read_text()


def test_weights_of_another_shape_are_refused(tmp_path):
    shipped_model(InsNextForInsertionLM).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch|shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, intermediate_size=64)


def test_a_generation_config_with_an_unknown_option_is_refused(tmp_path):
    shipped_model(InsNextForInsertionLM).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "erb": True}))
    with pytest.raises(ValueError, match="unknown generation option 'erb', did you mean 'ebr'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_tokenizer_beside_the_model_makes_the_same_canvas(tmp_path):
    model, tokenizer = shipped_model(InsNextForInsertionLM), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    first, second = (model.canvas(each, "the ___ man ___{1,3}") for each in (tokenizer, loaded))
    assert first.keys() == second.keys()
    assert same_bits(first, second)


def test_every_public_name_is_there_and_generation_options_have_their_class():
    assert all(hasattr(modeling_insnext, name) for name in modeling_insnext.__all__)
    assert InsNextForInsertionLM.generation_config_class is InsertionGenerationConfig
    assert InsNextForInsertionLM.can_generate()


def test_importing_the_package_imports_no_library_that_transformers_does_not():
    code = """
import sys
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers import StoppingCriteriaList
from transformers.utils.output_capturing import capture_outputs

before = set(sys.modules)
import modeling_insnext

new = {name.split(".")[0] for name in set(sys.modules) - before}
print("NEW", *sorted(new - set(sys.stdlib_module_names)))
"""
    done = forked.run([sys.executable, "-c", code], Path(__file__).parents[2], dict(os.environ))
    assert done.returncode == 0, done.stderr
    # the kernels' package, where it is installed, imports torch only
    assert done.stdout.split("NEW")[1].split() == ["insnext_kernels", "modeling_insnext", "transformers"]
