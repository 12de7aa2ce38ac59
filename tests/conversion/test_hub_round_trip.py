"""Pushed to a local stub of the Hub and loaded from it by a clean process: the same output, or an error."""

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load, save

from conversion.publishing.card import CardFacts
from conversion.publishing.export import main, push, read, write
from conversion.publishing.verification import VerificationError, verify
from tests.support.hub_stub import HubStub
from tests.support.saved import MAKERS, save_adapter, save_model
from tests.support.tokenizers import tiny_tokenizer


PUSH = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import modeling_insnext

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("tester/plain")
AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("tester/plain")
if len(sys.argv) > 2:
    from peft import PeftModel

    PeftModel.from_pretrained(model, sys.argv[2]).push_to_hub("tester/adapter")
    AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("tester/adapter")
"""


@pytest.fixture
def reach(monkeypatch, tmp_path):
    """Return a function that points this process and its children at a stub."""

    def point(hub):
        for name, value in {**hub.environment, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    return point


@pytest.mark.parametrize("architecture", MAKERS)
def test_an_export_arrives_whole_and_says_the_same(architecture, tmp_path, reach, capsys):
    source = save_model(architecture, tmp_path / "source")
    adapter = save_adapter(architecture, tmp_path / "lora")
    with HubStub() as hub:
        reach(hub)
        main([str(source), str(tmp_path / "tiny"), "--license", "mit", "--push", "tester/base"])
        main([str(adapter), str(tmp_path / "other"), "--license", "mit", "--base_model", "tester/base",
              "--push", "tester/lora"])  # fmt: skip
        out = capsys.readouterr().out
        for folder, name in (("tiny", "tester/base"), ("other", "tester/lora")):
            sha, files = hub.files(name)
            assert files == {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
            assert f"pushed and verified: {hub.url}/{name}/commit/{sha}" in out
            # one commit, and the weights did not go inside it
            assert len(hub.repositories[name]) == 1
            assert any(call == f"POST /{name}.git/info/lfs/objects/batch" for call in hub.calls)
            assert f"GET /{name}/resolve/{sha}/README.md" not in hub.calls
            assert any(call.startswith(f"GET /{name}/resolve/{sha}/") and "safetensors" in call for call in hub.calls)


@pytest.mark.parametrize("architecture", MAKERS)
def test_push_to_hub_of_transformers_and_peft_arrives_too(architecture, tmp_path, reach, run_python):
    source = save_model(architecture, tmp_path / "source")
    adapter = save_adapter(architecture, tmp_path / "lora")
    with HubStub() as hub:
        reach(hub)
        done = run_python("-c", PUSH, source, adapter, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        model, tokenizer = MAKERS[architecture](), tiny_tokenizer()
        verify(model, tokenizer, "AutoModelForCausalLM", "tester/plain", offline=False)
        adapted = PeftModel.from_pretrained(MAKERS[architecture](), adapter).eval()
        verify(adapted, tokenizer, "AutoModelForCausalLM", "tester/adapter", base="tester/plain", offline=False)
        # control: without the adapter it says something else
        with pytest.raises(VerificationError, match="with other logits"):
            verify(model, tokenizer, "AutoModelForCausalLM", "tester/adapter", base="tester/plain", offline=False)


def lose_a_tensor(path, content):
    if path != "model.safetensors":
        return content
    tensors = load(content)
    del tensors["model.norm.weight"]
    return save(tensors, metadata={"format": "pt"})


def change_a_number(path, content):
    if path != "model.safetensors":
        return content
    tensors = load(content)
    tensors["model.norm.weight"] += torch.eye(len(tensors["model.norm.weight"]))[0]
    return save(tensors, metadata={"format": "pt"})


def lose_a_file(path, content):
    return None if path == "checkpoint.py" else content


def lose_the_tokenizer(path, content):
    return None if path.startswith("tokenizer") else content


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lose_a_tensor, "missing model.norm.weight"),
        (change_a_number, "with other logits"),
        (lose_a_file, "checkpoint.py"),
        (lose_the_tokenizer, "does not load in a clean process"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_arrives_damaged_fails_the_verification(tamper, message, tmp_path, reach):
    exported, facts = read(save_model("drt", tmp_path / "source")), CardFacts("tester/base", license="mit")
    write(exported, tmp_path / "tiny", facts)
    with HubStub(tamper) as hub:
        reach(hub)
        with pytest.raises(VerificationError, match=f"was pushed and is faulty(.|\n)*{message}"):
            push(exported, tmp_path / "tiny", facts)
