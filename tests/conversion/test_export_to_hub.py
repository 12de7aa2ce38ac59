"""Folders made for the Hub load by themselves, and faulty ones are refused with nothing half written."""

import ast
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file

from conversion.publishing import export as export_to_hub
from conversion.publishing.card import CardFacts, model_card, read_results
from conversion.publishing.export import export, main, read
from conversion.publishing.verification import VerificationError, probe_ids, verify
from modeling_insnext import (
    DrtConfig,
    DrtForSequenceClassification,
    InsNextForMultipleChoice,
    InsNextForTokenClassification,
)
from tests.support.saved import MAKERS, save_adapter, save_model
from tests.support.tokenizers import tiny_tokenizer


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


@pytest.fixture(params=MAKERS)
def architecture(request):
    return request.param


def refusal(capsys, *arguments) -> str:
    """Return what a command line says that is refused."""
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, arguments)])
    return capsys.readouterr().err


@pytest.mark.usefixtures("real_processes")
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
    assert not {"is_local", "local_files_only"} & set(json.loads((target / "tokenizer_config.json").read_text()))
    text = (target / "README.md").read_text()
    assert '= AutoTokenizer.from_pretrained("OWNER/tiny")' in text and "# tiny\n" in text
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
    (tmp_path / "card.md").write_text(f"\ufeff\n---\nlicense: apache-2.0\nbase_model: {BASE}\n---\n")
    options = {"insnext": ["--license", "apache-2.0", "--base_model", BASE], "drt": ["--card", tmp_path / "card.md"]}
    main([str(source), str(target), *map(str, options[architecture])])
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    assert not list(target.glob("*.py")) and (target / "tokenizer.json").exists()
    assert str(tmp_path) not in "".join(path.read_text() for path in target.glob("*.[jm][sd]*"))
    data = ModelCard.load(target / "README.md").data
    assert (data.library_name, data.base_model, data.license) == ("peft", BASE, "apache-2.0")
    count = sum(tensor.numel() for tensor in load_file(target / "adapter_model.safetensors").values())
    assert (
        "lora" in data.tags
        and f"An adapter (lora) of {BASE}, {count:,} parameters." in (target / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ia3", IA3Config(task_type="CAUSAL_LM")),
        ("lora", LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])),
    ],
)
def test_the_card_of_an_adapter_counts_what_is_saved_and_names_its_kind(kind, config, tmp_path):
    exported = read(save_adapter("insnext", tmp_path, config))
    export_to_hub.write(exported, tmp_path / "out", CardFacts("tester/tiny", license="mit", base_model=BASE))
    count = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert f"An adapter ({kind}) of {BASE}, {count:,} parameters." in card.text and kind in card.data.tags


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
def test_a_faulty_tensor_is_named_and_nothing_is_written(architecture, kind, fault, message, tmp_path, capsys):
    source = (save_model if kind == "model" else save_adapter)(architecture, tmp_path / "source")
    path = source / ("model.safetensors" if kind == "model" else "adapter_model.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    fault(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    said = refusal(capsys, source, tmp_path / "tiny", "--license", "mit", "--base_model", BASE)
    assert message + name in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_says_something_else_or_lacks_code_is_noticed(architecture, tmp_path):
    folder = save_model(architecture, tmp_path / "source")
    tokenizer = tiny_tokenizer()
    with pytest.raises(VerificationError, match="with other logits, tokens$"):
        verify(MAKERS[architecture](seed=1), tokenizer, "AutoModelForCausalLM", folder)
    (folder / f"configuration_{architecture}.py").unlink()
    with pytest.raises(VerificationError, match=f"does not load(.|\n)*configuration_{architecture}.py"):
        verify(MAKERS[architecture](), tokenizer, "AutoModelForCausalLM", folder)


def test_a_folder_that_fails_the_verification_is_not_left_behind(tmp_path, monkeypatch):
    exported = read(save_model("insnext", tmp_path / "source"))
    write = export_to_hub.write

    def forgetful(exported, folder, facts):
        write(exported, folder, facts)
        (folder / "slots.py").unlink()

    monkeypatch.setattr(export_to_hub, "write", forgetful)
    with pytest.raises(VerificationError, match="slots.py"):
        export(exported, tmp_path / "out" / "tiny", FACTS)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_probe_reaches_behind_the_window_where_drt_retrieves():
    config = DrtConfig.preset("small-x1")
    assert probe_ids(config).shape[1] > config.sliding_window + config.chunk_length
    short = MAKERS["insnext"](max_position_embeddings=20).config
    assert probe_ids(short).shape[1] + 8 <= short.max_position_embeddings
    assert probe_ids(short).min() > 2


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "a card needs a license, got none"),
        ({"text": "# Mine\n"}, "a card needs a license, got none"),
        ({"text": "---\nlicense: [mit\n---\n"}, "must begin with metadata in YAML, or none, got ParserError"),
        (
            {"license": "mit", "base_model": "/models/mine"},
            "base_model must be a name on the Hub, got '/models",
        ),
        ({"license": "mit", "base_model": "tests/conversion"}, "a place on this machine: tests/conversion"),
    ],
)
def test_a_card_without_a_license_or_with_a_base_model_elsewhere_is_refused(facts, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(ValueError, match=message):
        CardFacts("tester/tiny", **facts)


def test_odd_names_and_texts_do_not_break_the_card():
    rows = [{**RESULT, "dataset_name": "a|b\nc"}]
    facts = CardFacts('me/we"ird\nname', license="mit", training_command="a\n```\n# b\n```", results=rows)
    text = model_card(facts, "drt", "AutoModelForCausalLM", None, 7).text
    assert '# we"ird name\n' in text and "| a\\|b c | validation | BLEU | 5.58 |" in text
    assert "\n````\na\n```\n# b\n```\n````\n" in text
    python = text.split("```python\n")[1].split("```")[0]
    assert {node.value for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Constant)} >= {facts.name}


def test_a_card_of_ones_own_keeps_its_text_and_metadata(tmp_path):
    exported = read(save_model("insnext", tmp_path / "source"))
    text = "\ufeff\n---\nlicense: mit\nlanguage: en\ntags:\n- mine\n---\n\n# Mine\n\nWords.\n"
    export_to_hub.write(exported, tmp_path / "out", CardFacts("tester/tiny", text=text, datasets=["a/b"]))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.text.strip() == "# Mine\n\nWords."
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["a/b"])
    assert {"mine", "insnext"} <= set(card.data.tags)


WRONG_RESULTS = [
    ([{**RESULT, "metrc": 1}], "fields of huggingface_hub.EvalResult: .*metrc"),
    ([{**RESULT, "source_name": "me"}], "source_url"),
    ([{**RESULT, "metric_value": float("nan")}], "metric_value must be a finite number or a text"),
    ([{**RESULT, "metric_value": [1]}], "metric_value must be a finite number or a text"),
    ([{**RESULT, "dataset_name": None}], "must have words in dataset_name"),
    (
        [RESULT, {**RESULT, "dataset_name": "other"}],
        "must agree in task_name, dataset_name.* give each a dataset_config",
    ),
    ({"a": 1}, "must hold a list of results, an object each"),
    (["a"], "must hold a list of results, an object each"),
    (None, "must hold a list of results, an object each"),
]


@pytest.mark.parametrize(("rows", "message"), WRONG_RESULTS)
def test_wrong_results_are_refused(rows, message, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "results.json")


def test_results_of_several_data_sets_and_metrics_are_kept_apart(tmp_path):
    rows = [RESULT, {**RESULT, "metric_type": "f1"}, {**RESULT, "dataset_name": "other", "dataset_config": "other"}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    facts = CardFacts("me/tiny", license="mit", results=read_results(tmp_path / "results.json"))
    (index,) = model_card(facts, "drt", "AutoModelForCausalLM", None, 7).data.to_dict()["model-index"]
    found = [(entry["dataset"]["name"], len(entry["metrics"])) for entry in index["results"]]
    assert (index["name"], found) == ("tiny", [("CommonGen", 2), ("other", 1)])


def test_a_command_line_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_to_hub, "read", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "results.json").write_text("{")
    for options, message in (
        (["full", "--license", "mit"], "must be a new or an empty folder, got one that holds something"),
        (["new"], "a card needs a license, got none"),
        (["new", "--license", "mit", "--push", "a/b/c"], "--push must be a name on the Hub, got 'a/b/c'"),
        (["new", "--license", "mit", "--push", ""], "--push must be a name on the Hub, got ''"),
        (["new", "--license", "mit", "--push", "tiny"], "--push must be OWNER/NAME, got tiny"),
        (["new", "--license", "mit", "--base_model", "/models/mine"], "'/models/mine'"),
        (["new", "--license", "mit", "--card", "absent.md"], "No such file or directory: 'absent.md'"),
        (["new", "--license", "mit", "--results", tmp_path / "results.json"], "results.json must hold JSON"),
    ):
        assert message in refusal(capsys, tmp_path, tmp_path / options[0], *options[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "results.json"]


def test_what_cannot_be_exported_is_refused(tmp_path, capsys):
    source = save_model("insnext", tmp_path / "source")
    (source / "sub").mkdir()
    (source / "sub" / "config.json").touch()
    for name, message in (
        ("absent.png", "missing: ['absent.png']"),
        ("sub/config.json", "must stand beside the model and be named without folders, got ['sub/config.json']"),
        ("../source/notes.txt", "must stand beside the model and be named without folders"),
        ("config.json", "must have other names than what is written, got config.json"),
    ):
        assert message in refusal(capsys, source, tmp_path / "tiny", "--license", "mit", "--include", name)
        assert not (tmp_path / "tiny").exists()
    small = save_model("insnext", tmp_path / "small", vocab_size=40)
    with pytest.raises(ValueError, match="the model has 40 ids, fewer than its tokenizer's"):
        read(small)
    adapter = save_adapter("insnext", tmp_path / "adapter")
    for facts in (FACTS, CardFacts("tester/tiny", text=f"---\nlicense: mit\nbase_model: [{BASE}, {BASE}]\n---\n")):
        with pytest.raises(ValueError, match="an adapter needs the name of its base model"):
            export(read(adapter), tmp_path / "out" / "tiny", facts)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "SEQ_CLS"}))
    with pytest.raises(ValueError, match='task_type="CAUSAL_LM", got .SEQ_CLS'):
        read(adapter)
    path.write_text(json.dumps({"peft_type": "WHAT"}))
    with pytest.raises(ValueError, match="adapter_config.json must be a configuration of PEFT"):
        read(adapter)


@pytest.mark.parametrize(
    "fields", [{"architectures": ["pipeline"], "model_type": "llama"}, {"architectures": ["LlamaForCausalLM"]}]
)
def test_a_model_of_another_class_is_refused(fields, tmp_path):
    source = save_model("insnext", tmp_path / "source")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=f"must hold a model of this package, got .*{fields['architectures'][0]}"):
        read(source)
