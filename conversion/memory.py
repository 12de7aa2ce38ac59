"""A memory for a pretrained decoder: how its layers are shared out, and how what retrieves begins.

    layers below the middle     as they are; the chunk encoder reads what leaves them
    the others                  groups of about five; the first layer of each attends to the chunks the group retrieved

So of SmolLM2's 30 layers 15 are lower and layers 15, 20 and 25 read from the memory: every fifth, as others adapt
models with every fourth (HiLS). Self-attention sees 512 tokens and the first one; chunks have 64, a retrieval brings
8. The source within its window is untouched, since what was read adds nothing at first, for one of two reasons:

    fresh   cross-attention is drawn, its output projection zero; all layers share one set of keys and values
    copy    cross-attention is the layer's own self-attention, which matches and copies already, without positions
            and behind gates of zero. The chunk encoder passes lower states on (its layers add nothing), so each
            layer's keys and values are those of its self-attention of them: for the first layer exactly those that
            it made when it read the text, for the others of states some layers younger.

A copied head reads for the residual stream, so there `residual="stream"`, and each layer has its keys: three times the
memory of `fresh` in SmolLM2, 2,304 bytes a token in bfloat16.
"""

import torch

from modeling_insnext import DrtConfig


BEGINNINGS = ("copy", "fresh")
WINDOW = 512
# layers of a group, about
SPACING = 5


def remembering(num_layers: int, reach: int, rolls: bool, begin: str) -> dict:
    """Return the fields of a DRT that gives a source a memory.

    Args:
        num_layers: Layers of the source.
        reach: Tokens that it sees, itself included.
        rolls: Whether that is a window of its own, beyond which it was trained to go on.
        begin: One of `BEGINNINGS`.

    Raises:
        ValueError: If `begin` is none of them.
    """
    if begin not in BEGINNINGS:
        raise ValueError(f"memory must be one of {BEGINNINGS}, got {begin!r}")
    upper = num_layers - num_layers // 2
    groups = max(round(upper / SPACING), 1)
    window = min(WINDOW, reach)
    fields = {
        "num_lower_layers": num_layers - upper,
        "retrieval_groups": [upper // groups + (group < upper % groups) for group in range(groups)],
        "cross_attention_layers": 1,
        "num_encoder_layers": 1,
        "chunk_size": 64,
        "num_retrieved_chunks": 8,
        "sliding_window": window,
        "num_sink_tokens": int(window < reach or not rolls),
        "landmark_source": "mean",
    }
    if begin == "copy":
        fields |= {"keys_per_layer": True, "gated_retrieval": True, "residual": "stream"}
    return fields


def copied(config: DrtConfig, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return how what retrieves begins as a copy of self-attention.

    Args:
        config: Of the DRT.
        made: All tensors that come from the source.

    Raises:
        ValueError: If self-attention has what cross-attention lacks, or layers share keys.
    """
    _check_form(config)
    begun, keys, values = {}, [], []
    for layer in config.cross_layers:
        own, cross = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.cross_attn"
        norm = made[f"model.layers.{layer}.input_layernorm.weight"]
        begun |= {
            f"{cross}.norm.weight": norm.clone(),
            f"{cross}.q_proj.weight": made[f"{own}.q_proj.weight"].clone(),
            f"{cross}.o_proj.weight": made[f"{own}.o_proj.weight"].clone(),
            f"{cross}.gate": norm.new_zeros(config.num_attention_heads),
        }
        # the encoder's norm is everybody's, so the layer's own is multiplied in here
        keys.append(made[f"{own}.k_proj.weight"] * norm)
        values.append(made[f"{own}.v_proj.weight"] * norm)
    begun |= {"model.encoder.k_proj.weight": torch.cat(keys), "model.encoder.v_proj.weight": torch.cat(values)}
    D, q_width = config.hidden_size, config.num_attention_heads * config.head_dim
    for n in range(config.num_encoder_layers):
        begun[f"model.encoder.layers.{n}.o_proj.weight"] = keys[0].new_zeros(D, q_width)
        begun[f"model.encoder.layers.{n}.mlp.down_proj.weight"] = keys[0].new_zeros(D, config.intermediate_size)
        if config.mlp_bias:
            begun[f"model.encoder.layers.{n}.mlp.down_proj.bias"] = keys[0].new_zeros(D)
    return begun


def _check_form(config: DrtConfig) -> None:
    plain = {
        "qk_norm": False,
        "attention_bias": False,
        "attention_output_bias": False,
        "norm": "rmsnorm",
        "keys_per_layer": True,
        "gated_retrieval": True,
    }
    for name, must in plain.items():
        if getattr(config, name) != must:
            raise ValueError(
                f"memory=copy needs {name}={must!r}, since cross-attention begins as self-attention, "
                f"got {getattr(config, name)!r}: use memory=fresh"
            )
    if not config.cross_layers:
        raise ValueError(f"memory needs layers that retrieve, got retrieval_groups={config.retrieval_groups}")
