"""A memory is trained with its source frozen: what is trained, what is saved, what rows hold, and that runs go on."""

import gzip
import json
import pydoc_data.topics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from conversion import convert, from_llama
from modeling_insnext import DrtForCausalLM
from tests.examples.test_drt_examples import ROOT, losses, run
from tests.support.drt import MEMORY, random_ids, tiny_config, tiny_model
from tests.support.equality import same_bits, within_rounding
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture
def recipes(monkeypatch):
    """The modules of examples/checkpoints, which find one another beside themselves."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "checkpoints"))
    import memory_training
    import train_drt

    yield SimpleNamespace(memory_training=memory_training, train_drt=train_drt)
    for name in ("memory_training", "train_drt", "small_checkpoint", "copying_init"):
        sys.modules.pop(name, None)


def memory_model():
    return tiny_model(dtype=torch.float32, **MEMORY)


def is_new(name):
    return ".encoder." in name or ".cross_attn." in name or ".query_norms." in name


def one_step(model):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model(input_ids=random_ids(1, 40), labels=random_ids(1, 40), use_cache=False).loss.backward()
    torch.optim.SGD(trained, lr=0.5).step()
    return {name for name, weight in model.named_parameters() if not same_bits(weight, before[name])}


def test_without_lora_what_retrieves_is_trained_and_nothing_else(recipes):
    model = recipes.memory_training.freeze_source(memory_model())
    names = {name for name, _ in model.named_parameters()}
    assert one_step(model) == {name for name in names if is_new(name)}
    # control: unfrozen, everything moves
    assert one_step(memory_model().train()) > {name for name in names if is_new(name)}


def test_with_lora_adapter_and_memory_are_saved_and_the_source_is_not(recipes, tmp_path):
    base = memory_model()
    state = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = recipes.memory_training.freeze_source(base, lora_r=2)
    moved = one_step(model)
    assert {"lora_" in name or ".modules_to_save." in name for name in moved} == {True}
    assert any("encoder" in name for name in moved) and any("query_norms" in name for name in moved)
    assert not any("lora_" in name and is_new(name) for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name or is_new(f"{name}.") for name in saved)
    assert {name for name in state if is_new(name)} <= {
        name.removeprefix("base_model.model.") for name in saved if "lora_" not in name
    }
    fresh = DrtForCausalLM(tiny_config(**MEMORY))
    fresh.load_state_dict(state)
    loaded, ids = PeftModel.from_pretrained(fresh, tmp_path).eval(), random_ids(2, 40, seed=3)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
        assert within_rounding(loaded(input_ids=ids, use_cache=False).logits, expected)
        assert not within_rounding(memory_model()(ids, use_cache=False).logits, expected)


def test_a_model_that_retrieves_nothing_has_no_memory_to_train(recipes):
    with pytest.raises(ValueError, match=r"a memory to train needs retrieval, got retrieval_groups=\[\]"):
        recipes.memory_training.freeze_source(tiny_model(retrieval_groups=[]))


WORDS = '{"passkey": [0.5, 1], "variable_tracking": [0.5, 1, {"hops": 1, "num_noise": 1}]}'


def arguments(recipes, folder, **changes):
    options = {"corpus": str(folder), "needles": "{}", "word_needles": WORDS, "length": 640, "shortest": 512}
    return recipes.train_drt.DrtArguments(**{**options, **changes})


def test_rows_are_books_and_needles_in_words_by_share_of_one_length_a_batch(recipes, tmp_path):
    tokenizer = tiny_tokenizer(300, bos_in_front=False, all_bytes=True, add_prefix_space=False)
    text = " ".join(pydoc_data.topics.topics.values())[:60_000]
    np.save(tmp_path / "train.npy", np.array(tokenizer.encode(text), dtype=np.uint16))
    rows = recipes.train_drt.BooksAndNeedles(arguments(recipes, tmp_path), tokenizer, batch_size=2, seed=0)
    lengths, asked = [], 0
    for index, row in zip(range(80), rows, strict=False):
        lengths.append(len(row["input_ids"]))
        needle = bool((row["labels"] == -100).any())
        asked += needle
        assert not needle or "Answer:" in tokenizer.decode(row["input_ids"])
        assert index % 2 == 0 or lengths[-1] == lengths[-2]
    assert set(lengths) == {512, 576, 640}
    # 0.7 of forty batches, within three standard deviations
    assert abs(asked / 80 - 0.7) < 3 * (0.7 * 0.3 / 40) ** 0.5
    again = next(iter(recipes.train_drt.BooksAndNeedles(arguments(recipes, tmp_path), tokenizer, 2, 0)))
    assert same_bits(again["input_ids"], next(iter(rows))["input_ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": "source"}, r"trained must be one of \('all', 'memory'\), got 'source'"),
        ({"lora_r": 4}, "lora_r needs trained=memory, got lora_r=4"),
        ({"trained": "memory", "lora_learning_rate": 1e-4}, "lora_learning_rate needs a lora_r of at least 1, got 0"),
        ({"shortest": 700}, r"shortest must be in 1..640, got 700"),
    ],
)
def test_options_that_cannot_be_are_refused(recipes, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(recipes, tmp_path, **changes)


@pytest.mark.slow
def test_a_llama_is_converted_and_its_memory_trained_and_goes_on(tmp_path):
    tokenizer = tiny_tokenizer(300, bos_in_front=False, all_bytes=True, add_prefix_space=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    small = ["--memory", "copy", "--chunk_size", "32", "--sliding_window", "48", "--num_retrieved_chunks", "3"]
    convert.main(
        from_llama.FAMILY, "from_llama", "", [str(tmp_path / "llama"), str(tmp_path / "drt"), "--to", "drt", *small]
    )
    (tmp_path / "books").mkdir()
    for name, part in (("train", slice(0, 12)), ("valid", slice(12, 16))):
        with gzip.open(tmp_path / "books" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            texts = list(pydoc_data.topics.topics.values())[part]
            file.writelines(json.dumps({"text": text, "children": False}) + "\n" for text in texts)
    prepare = ("--data_dir", str(tmp_path), "--output_dir", str(tmp_path), "--tokenizer", str(tmp_path / "llama"))
    run("checkpoints/prepare_books.py", *prepare)
    train = ["checkpoints/train_drt.py", "--corpus", str(tmp_path), "--model_name_or_path", str(tmp_path / "drt")]
    train += ["--trained", "memory", "--lora_r", "2", "--lora_learning_rate", "1e-3", "--length", "640"]
    train += ["--needles", "{}", "--word_needles", WORDS, "--evaluation_rows", "2", "--use_cpu", "--bf16"]
    train += "--report_to none --logging_steps 1 --per_device_train_batch_size 1 --max_steps 4".split()
    run(*train, "--output_dir", str(tmp_path / "whole"), "--save_steps", "4")
    run(*train, "--output_dir", str(tmp_path / "parts"), "--save_steps", "2")
    for name in ("checkpoint-4", "final"):
        (tmp_path / "parts" / name).rename(tmp_path / name)
    run(*train, "--output_dir", str(tmp_path / "parts"), "--save_steps", "2")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(set(losses(tmp_path / "whole"))) == 4
    history = json.loads((tmp_path / "whole" / "final" / "history.json").read_text())
    logged = [row for row in history if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and row["peak_gib"] > 0.1 for row in logged)
    assert not (tmp_path / "whole" / "final" / "model.safetensors").exists()
