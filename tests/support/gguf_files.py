"""Tiny GGUF files of Llamas, as the converter of llama.cpp writes them."""

import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.support.tokenizers import tiny_tokenizer


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def file_name(name: str) -> str:
    """Return what a GGUF file calls a tensor."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection with rotary pairs side by side, as llama.cpp turns them; Llama has them a half apart."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that a GGUF file can hold: Transformers adds `<|endoftext|>` to one that lacks it."""
    plain = tiny_tokenizer(add_prefix_space=False)
    written = plain.backend_tokenizer.to_str().replace("</s>", "<|endoftext|>")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(written), **names)


def write_gguf(path: Path, model, packed: bool = False, scaling: float | None = None) -> Path:
    """Write a Llama with :func:`gguf_tokenizer`; `packed`: projections of four bits a weight."""
    config, tokenizer, writer = model.config, gguf_tokenizer(), GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if scaling is not None:
        writer.add_rope_scaling_factor(scaling)
    pieces = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(pieces["vocab"], key=pieces["vocab"].get))
    writer.add_token_types([3 if index in tokenizer.all_special_ids else 1 for index in range(len(tokenizer))])
    writer.add_token_merges([" ".join(merge) for merge in pieces["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        values = tensor.to(torch.float32).numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            values = interleaved(values, heads) if part in name else values
        if packed and "_proj" in name:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(file_name(name), quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(file_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
