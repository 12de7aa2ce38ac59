"""Folders made for the Hub load by themselves, and faulty ones are refused with nothing half written."""

import json

import pytest
import torch
from helpers_export import ARCHITECTURES, save_adapter, save_model, tiny_model, tiny_tokenizer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from conversion import export_to_hub
from conversion.export_to_hub import export, main, read
from conversion.model_card import CardFacts, read_results
from conversion.verification import VerificationError, probe_ids, verify
from modeling_insnext import (
    DrtConfig,
    DrtForSequenceClassification,
    InsNextForMultipleChoice,
    InsNextForTokenClassification,
)


FACTS = CardFacts("tester/tiny", license="apache-2.0")
RESULT = {
    "task_type": "text-generation",
    "dataset_type": "allenai/common_gen",
    "dataset_name": "CommonGen",
    "dataset_split": "validation",
    "metric_type": "bleu",
    "metric_name": "BLEU",
    "metric_value": 5.58,
}
BASE = "tester/base"


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def test_a_model_becomes_a_folder_with_everything(architecture, tmp_path, capsys):
    source, target = save_model(architecture, tmp_path / "source"), tmp_path / "new" / "tiny"
    (tmp_path / "results.json").write_text(json.dumps([RESULT]))
    options = ["--license", "apache-2.0", "--datasets", "allenai/common_gen", "--language", "en"]
    options += ["--training_command", "python train.py --seed 0", "--results", str(tmp_path / "results.json")]
    main([str(source), str(target), *options, "--base_model", BASE, "--include", "notes.txt"])
    assert "loads by itself, same logits, tokens and ids" in capsys.readouterr().out
    names = {path.name for path in target.iterdir()}
    needed = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "notes.txt"}
    assert needed | {f"modeling_{architecture}.py", f"configuration_{architecture}.py"} <= names
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]
    data = ModelCard.load(target / "README.md").data.to_dict()
    assert {**data, "tags": None, "model-index": None} == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": BASE,
        "datasets": ["allenai/common_gen"],
        "language": ["en"],
        "tags": None,
        "model-index": None,
    }
    assert {architecture, "custom_code"} <= set(data["tags"])
    (index,) = data["model-index"]
    (entry,) = index["results"]
    assert index["name"] == "tiny" and entry["dataset"]["split"] == "validation"
    assert entry["metrics"] == [{"type": "bleu", "value": 5.58, "name": "BLEU"}]
    text = (target / "README.md").read_text()
    assert "python train.py --seed 0" in text and "| CommonGen | validation | BLEU | 5.58 |" in text


@pytest.mark.parametrize(
    ("name", "model_class", "tag"),
    [
        ("drt", DrtForSequenceClassification, "text-classification"),
        ("insnext", InsNextForMultipleChoice, "multiple-choice"),
        ("insnext", InsNextForTokenClassification, "token-classification"),
    ],
)
def test_a_model_with_another_head_is_exported_for_its_task(name, model_class, tag, tmp_path):
    exported = read(save_model(name, tmp_path / "source", model_class))
    target = export(exported, tmp_path / "tiny", FACTS)
    assert ModelCard.load(target / "README.md").data.pipeline_tag == tag
    assert exported.auto_class in (target / "README.md").read_text()


def test_an_adapter_becomes_a_folder_that_names_its_base_on_the_hub(architecture, tmp_path):
    source = save_adapter(architecture, tmp_path)
    target = tmp_path / "tiny"
    main([str(source), str(target), "--license", "apache-2.0", "--base_model", BASE])
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    assert not list(target.glob("*.py")) and (target / "tokenizer.json").exists()
    assert str(tmp_path) not in "".join(path.read_text() for path in target.glob("*.[jm][sd]*"))
    data = ModelCard.load(target / "README.md").data
    assert (data.library_name, data.base_model, data.license) == ("peft", BASE, "apache-2.0")


def drop(tensors, name):
    del tensors[name]


def add(tensors, name):
    tensors[f"{name}.surplus"] = torch.ones(3)


def reshape(tensors, name):
    tensors[name] = torch.ones(7)


def spoil(tensors, name):
    tensors[name].view(-1)[3] = torch.inf


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [(drop, "1 missing: "), (add, "1 extra: "), (reshape, "1 mis-shaped: "), (spoil, "1 not finite: ")],
)
def test_a_faulty_tensor_is_named_and_nothing_is_written(architecture, kind, fault, message, tmp_path):
    source = (save_model if kind == "model" else save_adapter)(architecture, tmp_path / "source")
    path = source / ("model.safetensors" if kind == "model" else "adapter_model.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    fault(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message + name):
        main([str(source), str(tmp_path / "tiny"), "--license", "mit", "--base_model", BASE])
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_says_something_else_or_lacks_code_is_noticed(architecture, tmp_path):
    folder = save_model(architecture, tmp_path / "source")
    tokenizer = tiny_tokenizer()
    with pytest.raises(VerificationError, match="with other logits, tokens$"):
        verify(tiny_model(architecture, seed=1), tokenizer, "AutoModelForCausalLM", folder)
    (folder / f"configuration_{architecture}.py").unlink()
    with pytest.raises(VerificationError, match=f"does not load(.|\n)*configuration_{architecture}.py"):
        verify(tiny_model(architecture), tokenizer, "AutoModelForCausalLM", folder)


def test_a_folder_that_fails_the_verification_is_not_left_behind(tmp_path, monkeypatch):
    exported = read(save_model("insnext", tmp_path / "source"))
    write = export_to_hub.write

    def forgetful(exported, folder, facts):
        write(exported, folder, facts)
        (folder / "slots_insnext.py").unlink()

    monkeypatch.setattr(export_to_hub, "write", forgetful)
    with pytest.raises(VerificationError, match="slots_insnext.py"):
        export(exported, tmp_path / "out" / "tiny", FACTS)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_probe_reaches_behind_the_window_where_drt_retrieves():
    config = DrtConfig.preset("small-x1")
    assert probe_ids(config).shape[1] > config.sliding_window + config.chunk_length
    short = tiny_model("insnext", max_position_embeddings=20).config
    assert probe_ids(short).shape[1] + 8 <= short.max_position_embeddings
    assert probe_ids(short).min() > 2


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (CardFacts("tester/tiny"), "a card needs a license, got none"),
        (CardFacts("tester/tiny", text="# Mine\n"), "a card needs a license, got none"),
    ],
)
def test_a_card_without_a_license_is_refused(facts, message, tmp_path):
    exported = read(save_model("insnext", tmp_path / "source"))
    with pytest.raises(ValueError, match=message):
        export(exported, tmp_path / "out" / "tiny", facts)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_card_of_ones_own_keeps_its_text_and_metadata(tmp_path):
    exported = read(save_model("insnext", tmp_path / "source"))
    text = "---\nlicense: mit\nlanguage: en\ntags:\n- mine\n---\n\n# Mine\n\nWords.\n"
    export_to_hub.write(exported, tmp_path / "out", CardFacts("tester/tiny", text=text, datasets=["a/b"]))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.text.strip() == "# Mine\n\nWords."
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["a/b"])
    assert {"mine", "insnext"} <= set(card.data.tags)


def test_what_cannot_be_exported_is_refused(tmp_path):
    source = save_model("insnext", tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="must not exist or be an empty folder"):
        export(read(source), tmp_path / "full", FACTS)
    with pytest.raises(ValueError, match="missing: .'absent.png'"):
        read(source, include=["absent.png"])
    (tmp_path / "results.json").write_text(json.dumps([{**RESULT, "metrc": 1}]))
    with pytest.raises(ValueError, match="fields of huggingface_hub.EvalResult(.|\n)*metrc"):
        read_results(tmp_path / "results.json")
    small = save_model("insnext", tmp_path / "small", vocab_size=40)
    with pytest.raises(ValueError, match="the model has 40 ids, fewer than its tokenizer's"):
        read(small)
    adapter = save_adapter("insnext", tmp_path / "adapter")
    with pytest.raises(ValueError, match="an adapter needs the name of its base model"):
        export(read(adapter), tmp_path / "out" / "tiny", FACTS)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "SEQ_CLS"}))
    with pytest.raises(ValueError, match='task_type="CAUSAL_LM", got .SEQ_CLS'):
        read(adapter)
