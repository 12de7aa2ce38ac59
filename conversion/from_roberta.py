"""RoBERTa into InsNeXt.

    python -m conversion.from_roberta SRC DST --to insnext

The same layers, not the same function: embeddings with their norm, projections, norms after the residual sums and the
plain feed-forward are taken over, biases included; learned positions give way to the offsets of insertion, the slot
head is new. With both position schemes taken out, the hidden states of a text that sees all of itself are equal.

The one vector of token types is added to all embeddings. The head shares them, where it moves the logits of all tokens
alike and so no probability. The head of the masked language model (a layer, a norm, a bias) is left out: InsNeXt
predicts from slots. Dropout of embeddings and residuals has no counterpart; that of attention is kept.
"""

from .checkpoint import check_values
from .convert import Family, main


TABLE = {
    "embeddings.word_embeddings.weight": "model.embed_tokens.weight",
    "embeddings.LayerNorm.weight": "model.embed_norm.weight",
    "embeddings.LayerNorm.bias": "model.embed_norm.bias",
    "encoder.layer.{}.attention.self.query.weight": "model.layers.{}.self_attn.q_proj.weight",
    "encoder.layer.{}.attention.self.query.bias": "model.layers.{}.self_attn.q_proj.bias",
    "encoder.layer.{}.attention.self.key.weight": "model.layers.{}.self_attn.k_proj.weight",
    "encoder.layer.{}.attention.self.key.bias": "model.layers.{}.self_attn.k_proj.bias",
    "encoder.layer.{}.attention.self.value.weight": "model.layers.{}.self_attn.v_proj.weight",
    "encoder.layer.{}.attention.self.value.bias": "model.layers.{}.self_attn.v_proj.bias",
    "encoder.layer.{}.attention.output.dense.weight": "model.layers.{}.self_attn.o_proj.weight",
    "encoder.layer.{}.attention.output.dense.bias": "model.layers.{}.self_attn.o_proj.bias",
    "encoder.layer.{}.attention.output.LayerNorm.weight": "model.layers.{}.input_layernorm.weight",
    "encoder.layer.{}.attention.output.LayerNorm.bias": "model.layers.{}.input_layernorm.bias",
    "encoder.layer.{}.intermediate.dense.weight": "model.layers.{}.mlp.up_proj.weight",
    "encoder.layer.{}.intermediate.dense.bias": "model.layers.{}.mlp.up_proj.bias",
    "encoder.layer.{}.output.dense.weight": "model.layers.{}.mlp.down_proj.weight",
    "encoder.layer.{}.output.dense.bias": "model.layers.{}.mlp.down_proj.bias",
    "encoder.layer.{}.output.LayerNorm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "encoder.layer.{}.output.LayerNorm.bias": "model.layers.{}.post_attention_layernorm.bias",
    # InsNeXt's positions are offsets between the tokens of a text that grows
    "embeddings.position_embeddings.weight": None,
    # numbers of positions, a buffer of old checkpoints
    "embeddings.position_ids": None,
    # `prepare` adds it to the words
    "embeddings.token_type_embeddings.weight": None,
    # heads of other tasks: the masked language model's, of which the decoder is the tied embedding, and the pooler's
    "lm_head.dense.weight": None,
    "lm_head.dense.bias": None,
    "lm_head.layer_norm.weight": None,
    "lm_head.layer_norm.bias": None,
    "lm_head.bias": None,
    "lm_head.decoder.weight": None,
    "lm_head.decoder.bias": None,
    "pooler.dense.weight": None,
    "pooler.dense.bias": None,
}


def fields(config, target: str) -> dict:
    """Return the fields of InsNextConfig.

    Raises:
        ValueError: If it is a decoder, has more token types than one, a head that is not the embedding, or no
            padding.
    """
    for name, value in (("is_decoder", False), ("type_vocab_size", 1), ("tie_word_embeddings", True)):
        if getattr(config, name, value) != value:
            raise ValueError(f"{name} must be {value}, got {getattr(config, name)}")
    if config.pad_token_id is None:
        raise ValueError("pad_token_id must be an id, behind which RoBERTa's positions are counted, got None")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        # the first position after padding is pad_token_id + 1
        "max_position_embeddings": config.max_position_embeddings - config.pad_token_id - 1,
        "norm": "post_layernorm",
        "embedding_norm": True,
        "rms_norm_eps": config.layer_norm_eps,
        "attention_bias": True,
        "attention_output_bias": True,
        "gated_mlp": False,
        "hidden_act": config.hidden_act,
        "mlp_bias": True,
        "attention_dropout": config.attention_probs_dropout_prob,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def rename(name: str, config) -> str:
    """Return the name that a tensor of a model with a head has without it."""
    return name.removeprefix("roberta.")


def prepare(tensors: dict, config) -> dict:
    """Add the token type to the words; words that are no words of the configuration are left to be refused.

    Raises:
        ValueError: If the token type is missing, mis-shaped, of another dtype than the words or not finite.
    """
    words, kind = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
    if kind not in tensors or tensors[kind].shape != (1, config.hidden_size):
        got = f"mis-shaped ({list(tensors[kind].shape)})" if kind in tensors else "missing"
        raise ValueError(f"the source's tensors must be those of its configuration, got {kind} {got}")
    if words not in tensors or tensors[words].shape[-1:] != (config.hidden_size,):
        return tensors
    check_values({name: tensors[name] for name in (words, kind)})
    return {**tensors, words: tensors[words] + tensors[kind][0]}


FAMILY = Family("RoBERTa", ("roberta",), ("insnext",), TABLE, fields, rename=rename, prepare=prepare)


if __name__ == "__main__":
    main(FAMILY, "conversion.from_roberta", __doc__)
