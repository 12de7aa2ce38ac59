"""ModernBERT into InsNeXt.

    python -m conversion.from_modernbert SRC DST --to insnext

The same layers, not the same function: embeddings with their norm, projections, LayerNorms and the gated feed-forward
are taken over; rotary positions give way to the offsets of insertion, and layers that see half a window to either side
see the whole text. The slot head is new. With both position schemes taken out, the hidden states of a text no longer
than half the window are equal.

The head of the masked language model (a layer, a norm, a bias) is left out: InsNeXt predicts from slots.
"""

from .convert import Family, main
from .tables import split


QKV = tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv")

TABLE = {
    "embeddings.tok_embeddings.weight": "model.embed_tokens.weight",
    "embeddings.norm.weight": "model.embed_norm.weight",
    "embeddings.norm.bias": "model.embed_norm.bias",
    # the first layer has none: its input is the normed embedding
    "layers.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attn_norm.bias": "model.layers.{}.input_layernorm.bias",
    "layers.{}.attn.Wqkv.weight": split(*(f"{part}.weight" for part in QKV)),
    "layers.{}.attn.Wqkv.bias": split(*(f"{part}.bias" for part in QKV)),
    "layers.{}.attn.Wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.attn.Wo.bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp_norm.bias": "model.layers.{}.post_attention_layernorm.bias",
    # the half that passes the activation, then the other
    "layers.{}.mlp.Wi.weight": split("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
    "layers.{}.mlp.Wi.bias": split("model.layers.{}.mlp.gate_proj.bias", "model.layers.{}.mlp.up_proj.bias"),
    "layers.{}.mlp.Wo.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.mlp.Wo.bias": "model.layers.{}.mlp.down_proj.bias",
    "final_norm.weight": "model.norm.weight",
    "final_norm.bias": "model.norm.bias",
    # the masked language model's head, of which the decoder's matrix is the tied embedding
    "head.dense.weight": None,
    "head.dense.bias": None,
    "head.norm.weight": None,
    "head.norm.bias": None,
    "decoder.weight": None,
    "decoder.bias": None,
}


def fields(config, target: str) -> dict:
    """Return the fields of InsNextConfig.

    Raises:
        ValueError: If the head is not the embedding.
    """
    if not config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings must be True, got False")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "norm": "layernorm",
        "norm_bias": config.norm_bias,
        "embedding_norm": True,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "hidden_act": config.hidden_activation,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id if config.bos_token_id is not None else config.cls_token_id,
        "eos_token_id": config.eos_token_id if config.eos_token_id is not None else config.sep_token_id,
    }


def rename(name: str, config) -> str:
    """Return the name that a tensor of a model with a head has without it."""
    return name.removeprefix("model.")


FAMILY = Family("ModernBERT", ("modernbert",), ("insnext",), TABLE, fields, rename=rename)


if __name__ == "__main__":
    main(FAMILY, "conversion.from_modernbert", __doc__)
