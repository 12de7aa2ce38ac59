"""A trained memory, kept without its source, makes with it the model that was trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conversion import from_llama, smol_memory
from conversion.convert import convert_folder
from modeling_insnext import DrtForCausalLM
from tests.support.drt import random_ids
from tests.support.equality import same_bits, within_rounding
from tests.support.tokenizers import tiny_tokenizer


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
OPTIONS = {"memory": "copy", "retrieval_groups": [3], "cross_attention_layers": 2, "chunk_size": 8}
OPTIONS |= {"sliding_window": 12, "num_retrieved_chunks": 2}


@pytest.fixture
def trained(tmp_path):
    """A source, a memory of it, and the model that they are together."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, initializer_range=0.3, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    tiny_tokenizer(50, bos_in_front=False).save_pretrained(tmp_path / "source")
    convert_folder(from_llama.FAMILY, str(tmp_path / "source"), str(tmp_path / "converted"), "drt", **OPTIONS)
    model = DrtForCausalLM.from_pretrained(tmp_path / "converted").eval()
    new = {
        n: x for n, x in model.named_parameters() if any(part in n for part in ("cross_attn", "encoder", "query_n"))
    }
    for x in new.values():
        x.data = torch.randn_like(x).mul(0.3).bfloat16().float()
    write(tmp_path / "memory", {n: x.detach().bfloat16() for n, x in new.items()}, tmp_path / "converted")
    return tmp_path, model


def write(folder, tensors, converted):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / smol_memory.WEIGHTS)
    fields = {"options": OPTIONS, "source_sha256": smol_memory.source_digest(converted)}
    (folder / smol_memory.FIELDS).write_text(json.dumps(fields))
    return tensors


def put_together(folder, name="whole"):
    return smol_memory.remembering(folder / "memory", folder / name, str(folder / "source"))


@pytest.mark.filterwarnings("error::UserWarning")
def test_source_and_memory_are_the_model_that_was_trained_bit_by_bit(trained):
    folder, model = trained
    loaded = AutoModelForCausalLM.from_pretrained(put_together(folder)).eval()
    for name, weight in model.named_parameters():
        assert same_bits(loaded.get_parameter(name), weight), name
    ids = random_ids(2, 60)
    assert within_rounding(loaded(ids).logits, model(ids).logits)
    # control: without its memory it says something else
    assert not within_rounding(
        DrtForCausalLM.from_pretrained(folder / "converted").eval()(ids).logits, model(ids).logits
    )


def test_other_weights_than_those_it_was_trained_on_are_told(trained):
    folder, _ = trained
    other = LlamaForCausalLM.from_pretrained(folder / "source")
    other.model.norm.weight.data += 1
    other.save_pretrained(folder / "source")
    with pytest.warns(UserWarning, match="memory was trained on other weights than those that it is put on"):
        put_together(folder)


def test_what_is_no_memory_of_this_model_is_refused_and_nothing_written(trained):
    folder, _ = trained
    tensors = smol_memory.load_file(folder / "memory" / smol_memory.WEIGHTS)
    gate = next(name for name in tensors if name.endswith("attn.gate"))
    for wrong, message in (
        ({n: x for n, x in tensors.items() if n != gate}, rf"must have the tensors of its model, not so \['{gate}'\]"),
        ({**tensors, gate: tensors[gate][:1].clone()}, rf"{gate} must be \[4\], got \[1\]"),
    ):
        write(folder / "memory", wrong, folder / "converted")
        with pytest.raises(ValueError, match=message):
            put_together(folder)
        assert not (folder / "whole").exists()
    (folder / "memory" / smol_memory.FIELDS).write_text("{}")
    with pytest.raises(ValueError, match=r"must say options and source_sha256, got \[\]"):
        put_together(folder)
    (folder / "memory" / smol_memory.FIELDS).unlink()
    with pytest.raises(ValueError, match="a memory must have memory.json, got none"):
        put_together(folder)


def test_the_shipped_memory_is_small_finite_and_says_what_it_fits():
    folder = Path(__file__).parents[2] / "examples" / "checkpoints" / "drt-smol"
    tensors, fields = (
        load_file(folder / smol_memory.WEIGHTS),
        json.loads((folder / smol_memory.FIELDS).read_text(encoding="utf-8")),
    )
    assert (folder / smol_memory.WEIGHTS).stat().st_size < 24e6 and len(fields["source_sha256"]) == 64
    assert all(x.dtype == torch.bfloat16 and bool(x.isfinite().all()) for x in tensors.values())
    # four layers read, each with a gate of its own, and none of them is of the source
    assert fields["options"]["cross_attention_layers"] == sum(name.endswith("attn.gate") for name in tensors) == 4
