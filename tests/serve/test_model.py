"""Which model is served: the folder that was asked for, or the best of ours that can be had."""

import logging

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from examples.serve import model as serving
from tests.support import insnext
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "mine"
    insnext.shipped_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path / "adapter"


def test_a_folder_is_served_under_its_name(folder):
    model, tokenizer, name = serving.load(str(folder), "float32")
    assert name == "mine" and not model.training
    assert tokenizer.bos_token_id == model.config.bos_token_id


def test_an_adapter_is_merged_and_served_under_its_own_name(folder, adapter, monkeypatch):
    asked = []
    monkeypatch.setattr("conversion.smollm2.adapted", lambda path: asked.append(path) or folder)
    assert serving.load(str(adapter), "float32")[2] == "adapter"
    assert asked == [adapter]


def test_only_the_default_gives_way_to_another(folder, adapter, monkeypatch, caplog):
    def out_of_reach(path):
        raise OSError("no base")

    monkeypatch.setattr("conversion.smollm2.adapted", out_of_reach)
    monkeypatch.setattr(serving, "DEFAULT", adapter)
    # uvicorn, once it has run, keeps what it logs to itself
    monkeypatch.setattr(serving, "logger", logging.getLogger("models"))
    monkeypatch.setattr(serving, "LAST_RESORT", folder)
    assert serving.load(None, "float32")[2] == "mine"
    assert "no base" in caplog.text
    with pytest.raises(OSError, match="no base"):
        serving.load(str(adapter), "float32")


def test_what_is_no_model_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a folder"):
        serving.load(str(tmp_path / "nowhere"), "float32")
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=60)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an InsNeXt or a DRT, got 'gpt2'"):
        serving.load(str(tmp_path), "float32")
