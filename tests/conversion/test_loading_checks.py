"""A folder loads only if its tensors are those of the model, and says when another version of the code wrote it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

import modeling_insnext
from modeling_insnext.drt.configuration_drt import CODE_VERSION as DRT_VERSION
from modeling_insnext.insnext.configuration_insnext import CODE_VERSION as INSNEXT_VERSION
from tests.support.equality import same_bits
from tests.support.saved import MAKERS


NORM = "model.norm.weight"


def drop(tensors):
    del tensors[NORM]


def add(tensors):
    tensors["model.surplus.weight"] = torch.ones(3)


def reshape(tensors):
    tensors[NORM] = torch.ones(7)


def spoil(tensors):
    tensors[NORM][3] = torch.nan


FAULTS = [
    (drop, "missing model.norm.weight"),
    (add, "unexpected model.surplus.weight"),
    (reshape, "model.norm.weight|mismatch"),
    (spoil, "1 that are not in model.norm.weight"),
]


@pytest.fixture(params=MAKERS)
def saved(request, tmp_path):
    MAKERS[request.param]().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_folder_with_wrong_tensors_does_not_load(saved, fault, message):
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    # control: the untouched tensors load
    AutoModelForCausalLM.from_pretrained(saved)
    fault(tensors)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_a_language_model_still_loads_without_its_head_or_with_another(saved, auto_class):
    model, info = auto_class.from_pretrained(saved, output_loading_info=True)
    head = {"score.weight"} if auto_class is AutoModelForSequenceClassification else set()
    assert head <= set(info["missing_keys"])
    assert same_bits(model.state_dict()[NORM if head else "norm.weight"], load_file(saved / "model.safetensors")[NORM])


def test_the_code_has_the_version_of_the_package():
    assert INSNEXT_VERSION == DRT_VERSION == modeling_insnext.__version__


@pytest.fixture
def warnings(monkeypatch):
    """What the loggers of Transformers say, each message once."""
    said = []
    for name in MAKERS:
        logger = logging.get_logger(f"modeling_insnext.{name}.checkpoint")
        monkeypatch.setattr(logger, "warning", lambda message, *rest: said.append(message))
        logger.warning_once.__func__.cache_clear()
    return said


def test_another_version_of_the_code_is_said_once(saved, warnings):
    AutoModelForCausalLM.from_pretrained(saved)
    assert warnings == []
    path = saved / "config.json"
    fields = json.loads(path.read_text())
    assert fields["code_version"] == modeling_insnext.__version__
    path.write_text(json.dumps({**fields, "code_version": "0.0.1"}))
    for _ in range(2):
        AutoModelForCausalLM.from_pretrained(saved)
    (message,) = warnings
    assert (
        str(saved) in message and "version 0.0.1" in message and f"version {modeling_insnext.__version__}" in message
    )


def test_a_folder_of_before_the_field_loads_in_silence(saved, warnings):
    path = saved / "config.json"
    fields = json.loads(path.read_text())
    del fields["code_version"]
    path.write_text(json.dumps(fields))
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert warnings == [] and model.config.code_version is None
    model.save_pretrained(saved)
    assert json.loads(path.read_text())["code_version"] == modeling_insnext.__version__
