"""What is said of an adapted model beside its source: equal before training, and told apart after it."""

import gzip
import json
import re

import adapted_losses
import commongen_tuned
import prepare_concepts
import pretrained_pair
import pytest
import ship_adapter
import story_infilling
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.trainer import TRAINER_STATE_NAME

from conversion.convert import convert_folder
from conversion.from_llama import FAMILY
from modeling_insnext import InsertionGenerationConfig, InsNextForInsertionLM
from tests.support.gguf_files import gguf_tokenizer
from tests.support.sources import SMALL


STORY = "The old man sat. The sea was still. A fox came by. It ran to him. They sat by the sea."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random Llama and what it becomes."""
    source, made = (tmp_path_factory.mktemp(name) for name in ("source", "converted"))
    torch.manual_seed(0)
    rope, sizes = {"rope_type": "default", "rope_theta": 77.0}, {"vocab_size": 60, "max_position_embeddings": 2048}
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **sizes}, pad_token_id=0, rope_parameters=rope))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.2)
    model.save_pretrained(source)
    gguf_tokenizer().save_pretrained(source)
    convert_folder(FAMILY, str(source), str(made / "model"), "insnext")
    return source, made / "model"


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "stories").mkdir()
    (tmp_path / "lm").mkdir()
    rows = [{"text": STORY}, {"text": "The fox ran. It sat."}, {"text": STORY.replace("fox", "dog")}]
    (tmp_path / "stories" / "roc_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(tmp_path / "lm" / "wikitext2_valid.txt.gz", "wt") as file:
        file.write("the old man and the sea a quick brown fox jumps over the lazy dog " * 80)
    return tmp_path


@pytest.fixture
def pair(folders, monkeypatch):
    """The converted model in the place of an adapted one, which a test may change."""
    source, made = folders
    model = InsNextForInsertionLM.from_pretrained(made).eval()
    found = model, LlamaForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(made)
    for study in (adapted_losses, story_infilling):
        monkeypatch.setattr(study, "load_pair", lambda adapter: found)
    monkeypatch.setattr(adapted_losses, "base", lambda: made)
    return found


def test_from_left_to_right_source_and_converted_model_are_one_and_an_adapted_one_is_another(pair, data_dir):
    torch.nn.init.normal_(pair[0].model.layers[0].mlp.up_proj.weight)
    output = data_dir / "table"
    options = ["--data_dir", str(data_dir), "--tokens", "1024", "--output", str(output)]
    source, converted, adapted = adapted_losses.main(options)["results"]
    assert abs(source["perplexity"] / converted["perplexity"] - 1) < 1e-4
    assert abs(source["left"]["token"]["mean"] - converted["left"]["token"]["mean"]) < 1e-4
    assert abs(adapted["perplexity"] / converted["perplexity"] - 1) > 1e-2
    assert converted["both"]["place"]["n"] == 2 and "both" not in source
    text = output.with_suffix(".md").read_text()
    assert "| source |" in text and "DATA" in text and str(data_dir) not in text


def test_nobody_sees_the_missing_sentences_and_stories_of_other_lengths_are_left_out(pair, data_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(story_infilling, "ROOM", dict.fromkeys(story_infilling.MISSING, 4))
    canvas = pair[0].canvas
    monkeypatch.setattr(story_infilling, "LEAST", dict.fromkeys(story_infilling.MISSING, 3))
    monkeypatch.setattr(pair[0], "canvas", lambda *args, **bounds: asked.append(args[1]) or canvas(*args, **bounds))
    output = str(data_dir / "table")
    report = story_infilling.main(["--data_dir", str(data_dir), "--output", output])
    assert asked[0][0] == "The old man sat. The sea was still. ___ It ran to him. They sat by the sea."
    assert asked[2][1] == "The old man sat. ___ They sat by the sea."
    rows = {(row["missing"], row["model"]): row for row in report["results"]}
    assert len(rows) == 8 and all(row["n"] == 2 for row in rows.values())
    assert rows["1 of 5", "the story itself"]["rougeL"] == 100
    assert all(
        len(text.split()) <= 4 for row in rows.values() if "story" not in row["model"] for text in row["examples"]
    )


def test_a_source_goes_on_behind_bos_and_is_cut_after_its_sentences(pair):
    _, source, tokenizer = pair
    sides = [("The old man sat.", ""), ("A fox", "")]
    together = story_infilling.write_after(source, tokenizer, sides, 6, 1)
    assert together == [story_infilling.write_after(source, tokenizer, [side], 6, 1)[0] for side in sides]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("A fox", add_special_tokens=False)["input_ids"]]])
    out = source.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert " ".join(text.split()).startswith(together[1])


def test_concepts_behind_their_prompt_stand_in_the_sentence_which_is_told_from_the_prompt(pair, tmp_path):
    model, source, tokenizer = pair
    rows = [{"prompt": f"{words} =", "completion": f" The {words}."} for words in ("fox sea", "dog", "fox sea")]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = commongen_tuned.valid_sets(tmp_path / "valid.jsonl", 9)
    assert sets[0] == {"concepts": ["fox", "sea"], "references": ["The fox sea."] * 2} and len(sets) == 2
    for keep, pattern in (("pending", r"\b{}(es|s|ed|ing)?\b"), ("given", r"\b{}\b"), ("nothing", ""), (None, "")):
        reader = source if keep is None else model
        texts = commongen_tuned.write(reader, tokenizer, sets, 2, keep, do_sample=False)
        for row, text in zip(sets, texts, strict=True):
            assert text and not text.startswith(row["concepts"][0] + " =")
            assert all(re.search(pattern.format(word), text) for word in row["concepts"]), (keep, text)


def test_captions_become_sentences_and_held_out_sets_stay_out_of_training(tmp_path):
    (tmp_path / "commongen").mkdir()
    captions = ["a dog runs to the sea ,", "Two dogs run along the sea .", "actor with his dog at sea", "dog at sea"]
    with gzip.open(tmp_path / "commongen" / "train.jsonl.gz", "wt") as file:
        for index in range(6):
            file.write(json.dumps({"id": str(index), "concepts": ["dog", "sea"], "references": captions}) + "\n")
    arguments = prepare_concepts.Arguments(str(tmp_path), str(tmp_path), valid_sets=2)
    prepare_concepts.main(arguments)
    train, valid = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "valid")
    )
    assert {row["completion"] for row in train} == {" A dog runs to the sea.", " Two dogs run along the sea."}
    assert {row["prompt"] for row in train} == {"dog sea ="} and len(train) + len(valid) == 12
    assert valid and not {row["id"] for row in train} & {row["id"] for row in valid}


def test_an_adapter_is_shipped_in_bfloat16_with_its_history_and_without_paths(folders, tmp_path):
    model = InsNextForInsertionLM.from_pretrained(folders[1])
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    checkpoints = [tmp_path / "first", tmp_path / "second"]
    for folder, steps in zip(checkpoints, (3, 5), strict=True):
        get_peft_model(model, config).save_pretrained(folder)
        history = [{"step": steps, "loss": 1.0, "position_loss": 0.5, "token_loss": 0.5}]
        (folder / TRAINER_STATE_NAME).write_text(json.dumps({"global_step": steps, "log_history": history}))
    target = tmp_path / "shipped"
    names = [*map(str, checkpoints), "--output_dir", str(target), "--base_model", "OWNER/BASE"]
    with pytest.raises(SystemExit):
        ship_adapter.main([str(tmp_path), *names])
    with pytest.raises(SystemExit):
        ship_adapter.main([*names, "--generation", '{"ebrr": true}'])
    assert not target.exists()
    ship_adapter.main([*names, "--generation", '{"ebr": true}'])
    ours, theirs = (load_file(folder / ship_adapter.WEIGHTS) for folder in (target, checkpoints[1]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].to(torch.bfloat16)) for name in ours)
    assert [row["step"] for row in json.loads((target / "history.json").read_text())] == [3, 8]
    assert json.loads((target / ship_adapter.CONFIG).read_text())["base_model_name_or_path"] == "OWNER/BASE"
    assert InsertionGenerationConfig.from_pretrained(target).ebr is True
    assert (target / "loss.png").is_file()


def test_a_pair_is_the_merged_adapter_and_its_source(folders, monkeypatch):
    source, made = folders
    monkeypatch.setattr(pretrained_pair, "adapted", lambda adapter: made)
    monkeypatch.setattr(pretrained_pair, "packaged_file", lambda: None)
    monkeypatch.setattr(pretrained_pair, "hub_folder", lambda: source)
    model, causal, tokenizer = pretrained_pair.load_pair("any")
    assert isinstance(model, InsNextForInsertionLM) and isinstance(causal, LlamaForCausalLM)
    assert not model.training and tokenizer.bos_token_id == model.config.bos_token_id
