"""The study of perplexity says the same of a source, as a GGUF file too, and of the insertion model made of it."""

import pytest
import torch
from left_to_right_perplexity import main
from transformers import LlamaConfig, LlamaForCausalLM

from conversion.convert import convert_folder
from conversion.from_llama import FAMILY
from modeling_insnext import InsNextForInsertionLM
from tests.support.gguf_files import gguf_tokenizer, write_gguf
from tests.support.sources import SMALL


def test_source_and_insertion_model_have_one_perplexity(tmp_path):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 77.0}
    source = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 60}, pad_token_id=0, rope_parameters=rope))
    for weight in source.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.2)
    file, made = str(write_gguf(tmp_path / "tiny.gguf", source)), str(tmp_path / "made")
    convert_folder(FAMILY, file, made, "insnext")
    text = tmp_path / "text.txt"
    text.write_text("the old man and the sea a quick brown fox jumps over the lazy dog " * 9)
    options = ["--data_file", str(text), "--tokens", "100", "--window", "24"]
    ours, theirs = main([file, made, *options])
    assert (ours["model"], theirs["model"], ours["tokens"], theirs["tokens"]) == (made, file, 92, 92)
    assert abs(ours["nats"] - theirs["nats"]) < 1e-4
    # control: an insertion model with other layers
    model = InsNextForInsertionLM.from_pretrained(made)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(made)
    assert abs(main([file, made, *options])[0]["nats"] - theirs["nats"]) > 1e-2
    with pytest.raises(ValueError, match="at least one window of 1024 tokens, got 254"):
        main([file, made, "--data_file", str(text)])
    source.save_pretrained(tmp_path / "source")
    gguf_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="must be an insertion model, got LlamaForCausalLM"):
        main([made, str(tmp_path / "source"), *options])
