"""State dicts of the public DRT code and of ILM, laid out by their names."""

import torch

from conversion.from_upstream_drt import FAMILY as UPSTREAM
from conversion.tables import apply_back
from modeling_insnext import DrtConfig, DrtForCausalLM
from tests.support.sources import shaken


UPSTREAM_CONFIG = {
    "model_type": "llama",
    "pad_id": 46,
    "bos_id": 45,
    "chunk_id": 49,
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": -1,
    "max_position_embeddings": -1,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "chunk_topk": 2,
    "slide_window": 80,
    "encoder_layers": 1,
    "decoder_layers": [1, 2, 1],
    "enc_chunk_size": 63,
    "enable_alibi": True,
}


def our_drt(chunk_size=63):
    torch.manual_seed(0)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    slot = "off_by_one" if chunk_size == 63 else "dropped"
    config = DrtConfig(
        **{name: UPSTREAM_CONFIG[name] for name in same},
        num_lower_layers=1,
        retrieval_groups=[2, 1],
        num_encoder_layers=1,
        chunk_size=chunk_size,
        num_retrieved_chunks=2,
        sliding_window=81,
        landmark_slot=slot,
    )
    return shaken(DrtForCausalLM(config))


def laid_out(model) -> dict:
    """Return the model's weights under the names and in the shapes of the public code."""
    state = model.state_dict()
    landmark = state.pop("model.landmark")
    state["model.embed_tokens.weight"][49] = landmark
    names = {"model.layers.0.": "model.lower_layers.0.", "model.layers.1.": "model.upper_layers.0.0."}
    names |= {"model.layers.2.": "model.upper_layers.0.1.", "model.layers.3.": "model.upper_layers.1.0."}
    table = {name: entry for name, entry in UPSTREAM.table.items() if entry != "model.landmark"}
    found = {}
    for name, tensor in apply_back(table, state).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs) if name.startswith(ours) else name
        found[f"module.{name}"] = tensor
    for layer in names.values():
        found[f"module.{layer}self_attn.m"] = torch.tensor([2.0**-4, 2.0**-8])[:, None, None]
    return found


ILM_CONFIG = {
    "num_embeddings": 50,
    "d_model": 16,
    "num_layers": 2,
    "nhead": 2,
    "dim_feedforward": 24,
    "max_length": 64,
}


def ilm_tensors(normed: bool) -> dict:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens.weight": (50, 16), "output_layer.linear.weight": (50, 16)}
    for layer in range(2):
        for name, shape in (
            ("norm1.weight", (16,)),
            ("norm1.bias", (16,)),
            ("attn_qkv.weight", (48, 16)),
            ("o_proj.weight", (16, 16)),
            ("norm2.weight", (16,)),
            ("norm2.bias", (16,)),
            ("mlp.0.weight", (24, 16)),
            ("mlp.0.bias", (24,)),
            ("mlp.2.weight", (16, 24)),
            ("mlp.2.bias", (16,)),
            ("rotary_emb.inv_freq", (4,)),
        ):
            shapes[f"encoder.{layer}.{name}"] = shape
    if normed:
        shapes |= {"output_layer.norm_final.weight": (16,), "output_layer.norm_final.bias": (16,)}
    for name, shape in (("mlp.0.weight", (32, 16)), ("mlp.0.bias", (32,)), ("linear.weight", (2, 16))):
        shapes[f"length_output_layer.{name}"] = shape
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
