"""GPT-2 (and its like: DistilGPT2) into DRT or InsNeXt, and DRT back.

    python -m conversion.from_gpt2 SRC DST --to drt|insnext
    python -m conversion.from_gpt2 DRT DST --to gpt2

DRT: the same function: learned positions, LayerNorm, biases and the plain feed-forward are taken over; what retrieves
is new and at first adds nothing. There are as many positions as GPT-2 has, so a text cannot be longer.

InsNeXt: the same layers, not the same function: learned positions give way to the offsets of insertion, the slot head
is new. With both taken out, the hidden states of text read left to right are equal.

Dropout of embeddings and residuals, which acts in training alone, has no counterpart; that of attention is kept.
"""

from transformers import GPT2Config

from .convert import Family, main
from .decoders import retrieving
from .tables import split, transposed


LAYER = "model.layers.{}."
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

TABLE = {
    "wte.weight": "model.embed_tokens.weight",
    "wpe.weight": "model.embed_positions.weight",
    "h.{}.ln_1.weight": "model.layers.{}.input_layernorm.weight",
    "h.{}.ln_1.bias": "model.layers.{}.input_layernorm.bias",
    "h.{}.attn.c_attn.weight": split(*(f"{LAYER}{part}.weight" for part in QKV), transpose=True),
    "h.{}.attn.c_attn.bias": split(*(f"{LAYER}{part}.bias" for part in QKV)),
    "h.{}.attn.c_proj.weight": transposed("model.layers.{}.self_attn.o_proj.weight"),
    "h.{}.attn.c_proj.bias": "model.layers.{}.self_attn.o_proj.bias",
    "h.{}.ln_2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "h.{}.ln_2.bias": "model.layers.{}.post_attention_layernorm.bias",
    "h.{}.mlp.c_fc.weight": transposed("model.layers.{}.mlp.up_proj.weight"),
    "h.{}.mlp.c_fc.bias": "model.layers.{}.mlp.up_proj.bias",
    "h.{}.mlp.c_proj.weight": transposed("model.layers.{}.mlp.down_proj.weight"),
    "h.{}.mlp.c_proj.bias": "model.layers.{}.mlp.down_proj.bias",
    "ln_f.weight": "model.norm.weight",
    "ln_f.bias": "model.norm.bias",
    "lm_head.weight": "lm_head.weight",
    # the causal mask and what it puts on hidden keys; old checkpoints still hold them
    "h.{}.attn.bias": None,
    "h.{}.attn.masked_bias": None,
}

# InsNeXt's positions are offsets between the tokens of a text that grows
WITHOUT = {"insnext": ("wpe.weight",)}


def fields(config, target: str) -> dict:
    """Return the fields of our configuration.

    Raises:
        ValueError: If attention is scaled otherwise than by the head's width, or there is an encoder to attend to.
    """
    for name, value in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if getattr(config, name) != value:
            raise ValueError(f"{name} must be {value}, got {getattr(config, name)}")
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_positions,
        "norm": "layernorm",
        "rms_norm_eps": config.layer_norm_epsilon,
        "attention_bias": True,
        "attention_output_bias": True,
        "gated_mlp": False,
        "hidden_act": config.activation_function,
        "mlp_bias": True,
        "attention_dropout": config.attn_pdrop,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if target == "insnext":
        return {**common, "num_hidden_layers": config.n_layer}
    return {**common, "position_encoding": "learned", **retrieving(config.n_layer, config.n_positions)}


def rename(name: str, config) -> str:
    """Return the name that a tensor of a model with its head has without it."""
    return name.removeprefix("transformer.")


def backward(config, model_type: str) -> GPT2Config:
    """Return the GPT-2 of a DRT's shape; whether it is one, the caller checks."""
    source = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_inner=config.intermediate_size,
        activation_function=config.hidden_act,
        attn_pdrop=config.attention_dropout,
        layer_norm_epsilon=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    source.architectures = ["GPT2LMHeadModel"]
    return source


FAMILY = Family(
    "GPT-2", ("gpt2",), ("drt", "insnext"), TABLE, fields, without=WITHOUT, rename=rename, backward=backward
)


if __name__ == "__main__":
    main(FAMILY, "conversion.from_gpt2", __doc__)
