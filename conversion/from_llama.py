"""Llama, Qwen2, Qwen3, Mistral and SmolLM (whose checkpoints are Llamas) into DRT or InsNeXt, and DRT back.

    python -m conversion.from_llama SRC DST --to drt|insnext
    python -m conversion.from_llama OURS DST --to llama|qwen2|qwen3|mistral

DRT: the same function. Rotary positions (any scaling whose frequencies are fixed), biases, norms of queries and keys
and Mistral's window are taken over; what retrieves is new and at first adds nothing, since the output projection of
its cross-attention is zero. Where the source has no window, the DRT's is the source's `max_position_embeddings`;
`--sliding_window` makes it shorter, and then the function is the same up to there. `--memory` is how to give a real
model a memory: 512 tokens and the first one by self-attention, everything else by retrieval in every fifth layer of
the upper half (memory.py).

InsNeXt: the same function from left to right. Rotary positions turn by the offsets of insertion, which there are the
distances of Llama, and a slot is its left neighbour at first: log p(token | the text goes on) is the source's
log p(token), without the ids that frame a text. Where to write and when to stop is new, and has to be learned. Layers
with a window of their own (Mistral) see the whole text; up to the window it is the same function.
"""

import dataclasses

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from .convert import NEW, Family, main
from .decoders import retrieving
from .memory import remembering


CONFIGS = {config.model_type: config for config in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)}

TABLE = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.{}.input_layernorm.weight": "model.layers.{}.input_layernorm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "model.layers.{}.self_attn.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "model.layers.{}.self_attn.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "model.layers.{}.self_attn.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "model.layers.{}.self_attn.q_proj.bias": "model.layers.{}.self_attn.q_proj.bias",
    "model.layers.{}.self_attn.k_proj.bias": "model.layers.{}.self_attn.k_proj.bias",
    "model.layers.{}.self_attn.v_proj.bias": "model.layers.{}.self_attn.v_proj.bias",
    "model.layers.{}.self_attn.o_proj.bias": "model.layers.{}.self_attn.o_proj.bias",
    "model.layers.{}.self_attn.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "model.layers.{}.mlp.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "model.layers.{}.mlp.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "model.layers.{}.mlp.gate_proj.bias": "model.layers.{}.mlp.gate_proj.bias",
    "model.layers.{}.mlp.up_proj.bias": "model.layers.{}.mlp.up_proj.bias",
    "model.layers.{}.mlp.down_proj.bias": "model.layers.{}.mlp.down_proj.bias",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    # computed from rope_parameters; old checkpoints still hold it
    "model.layers.{}.self_attn.rotary_emb.inv_freq": None,
}

# fields that mean the same in ours
SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "attention_dropout",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "tie_word_embeddings",
)


def declared(config, name: str):
    """Return a field, or `None` if the type has none of this name and so ignores what stands there."""
    return getattr(config, name) if name in {field.name for field in dataclasses.fields(config)} else None


def reach(config) -> int | None:
    """Return how many tokens every layer sees, itself included; `None`: all.

    Raises:
        ValueError: If layers differ, or see a window of no size.
    """
    kinds, window = set(declared(config, "layer_types") or ()), declared(config, "sliding_window")
    if len(kinds) > 1:
        raise ValueError(f"all layers must see equally far, got layer_types with {sorted(kinds)}")
    if kinds == {"sliding_attention"} and window is None:
        raise ValueError("layers of sliding_attention need a sliding_window, got none")
    return None if kinds == {"full_attention"} else window


def fields(config, target: str) -> dict:
    """Return the fields of our configuration.

    Raises:
        ValueError: If layers differ in how far they see.
    """
    same = {name: getattr(config, name) for name in SAME}
    qwen2 = config.model_type == "qwen2"
    bias = qwen2 or bool(declared(config, "attention_bias"))
    eos = config.eos_token_id
    common = {
        **same,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "attention_bias": bias,
        "attention_output_bias": bias and not qwen2,
        "qk_norm": config.model_type == "qwen3",
        "mlp_bias": bool(declared(config, "mlp_bias")),
    }
    rope = dict(config.rope_parameters)
    if target == "insnext":
        # an insertion model has one STOP, and any of several ends of text names it
        eos = eos[0] if isinstance(eos, list) else eos
        reads = {
            "position_encoding": "rotary",
            "rope_parameters": rope,
            "slot_norm": "rmsclip",
            "block_attention": "causal",
        }
        return {**common, **reads, "eos_token_id": eos, "num_hidden_layers": config.num_hidden_layers}
    window = reach(config)
    return {
        **common,
        "eos_token_id": eos,
        "position_encoding": "rope",
        "rope_parameters": rope,
        **retrieving(config.num_hidden_layers, window or config.max_position_embeddings, rolls=window is not None),
    }


def memory(config, begin: str) -> dict:
    """Return the fields of a DRT with a memory; see :func:`memory.remembering`."""
    window = reach(config)
    return remembering(config.num_hidden_layers, window or config.max_position_embeddings, window is not None, begin)


def rename(name: str, config) -> str:
    """Return the name that a tensor of a model without its head has with it."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def new(config, target: str) -> tuple[str, ...]:
    """Return patterns of what the source does not have; its last norm is the one behind a slot."""
    if target != "insnext":
        return NEW[target]
    places = ("query_proj.*", "key_proj.*", "edge", "stop_key")
    sides = ("left_proj.*", "right_proj.*", "state_proj.*")
    return (*(f"slot_head.{name}" for name in (*sides, *places)), "model.norm.*")


def backward(config, model_type: str):
    """Return the source's configuration of a model of ours of its shape; whether it is one, the caller checks."""
    same = {name: getattr(config, name) for name in (*SAME, "eos_token_id", "head_dim", "rope_parameters")}
    if model_type in ("llama", "qwen3"):
        same["attention_bias"] = config.attention_bias
    if model_type == "llama":
        same["mlp_bias"] = config.mlp_bias
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and window < config.max_position_embeddings
    if model_type != "llama":
        same["sliding_window"] = window if windowed else None
    if model_type in ("qwen2", "qwen3") and windowed:
        same |= {"use_sliding_window": True, "max_window_layers": 0}
    source = CONFIGS[model_type](**same, num_hidden_layers=config.num_hidden_layers)
    source.architectures = [f"{type(source).__name__.removesuffix('Config')}ForCausalLM"]
    return source


FAMILY = Family(
    "Llama",
    tuple(CONFIGS),
    ("drt", "insnext"),
    TABLE,
    fields,
    memory=memory,
    moved={"insnext": {"model.norm.weight": "slot_head.norm.weight"}},
    new=new,
    rename=rename,
    backward=backward,
    returns=("drt", "insnext"),
)


if __name__ == "__main__":
    main(FAMILY, "conversion.from_llama", __doc__)
