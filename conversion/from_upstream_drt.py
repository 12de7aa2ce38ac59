"""State dicts of the public DRT code (May 2025 and later) into DRT.

    python -m conversion.from_upstream_drt SRC DST --to drt

SRC is a folder with that code's `config.json` and its `model.bin` (or model_best.bin, or the one model<k>_<step>.bin).
By its formulae the same function as the parallel form of that code; the two were not run beside each other, since that
code needs a GPU. Differences of the configuration: its window counts the keys before a token, ours also the token
itself; a landmark's embedding is one row of the table there and a vector of its own here. A landmark among a chunk's
keys is zeroed if chunk_size + 1 is a multiple of 64 (`landmark_slot="off_by_one"`), and dropped if that leaves a
remainder of 1.

Refused: state dicts of before the normed queries (with `lmk_q_proj` or `position_embeddings`), of groups with norms of
their own, and of its successor (`backbone.`).
"""

import re
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from .checkpoint import check_values, named
from .convert import Family, main
from .folders import read_fields, refusing


PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
WEIGHTS = ("model.bin", "model_best.bin")
LANDMARK = "model.landmark"

TABLE = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    # `prepare` makes it of the landmark's row of the table above
    LANDMARK: LANDMARK,
    # lower and upper layers, which `prepare` counts through
    **{
        f"model.layers.{{}}.{name}.weight": f"model.layers.{{}}.{name}.weight"
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{part}" for part in PARTS),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    },
    "model.layers.{}.gca.pre_norm.weight": "model.layers.{}.cross_attn.norm.weight",
    "model.layers.{}.gca.q_proj.weight": "model.layers.{}.cross_attn.q_proj.weight",
    "model.layers.{}.gca.o_proj.weight": "model.layers.{}.cross_attn.o_proj.weight",
    "model.lmk_norms.{}.weight": "model.query_norms.{}.weight",
    "model.enc_prenorm.weight": "model.encoder.input_norm.weight",
    **{
        f"model.encoder.layers.{{}}.{theirs}.weight": f"model.encoder.layers.{{}}.{ours}.weight"
        for theirs, ours in (
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
            *((f"self_attn.{part}", part) for part in PARTS),
            *((f"mlp.{part}_proj", f"mlp.{part}_proj") for part in ("gate", "up", "down")),
        )
    },
    "model.encoder.norm.weight": "model.encoder.norm.weight",
    "model.chunk_k_proj.weight": "model.encoder.k_proj.weight",
    "model.chunk_v_proj.weight": "model.encoder.v_proj.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    # ALiBi's slopes, a buffer: computed from the number of heads; `prepare` checks that they are these
    "model.layers.{}.self_attn.m": None,
    # the encoder's rotary frequencies, a buffer: computed from encoder_rope_theta
    "model.encoder.layers.{}.self_attn.rotary_emb.inv_freq": None,
    "model.encoder.rotary_emb.inv_freq": None,
}

OUTDATED = ("position_embeddings", "lmk_q_proj", "lmk_k_proj", "backbone.")


class UpstreamConfig(PreTrainedConfig):
    """The public code's `config.json`, which calls itself a Llama, as it is."""

    model_type = "drt-upstream"

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)


def read(folder) -> UpstreamConfig:
    """Return the configuration of a folder.

    Raises:
        ValueError: If it is none of the public code's.
    """
    path = Path(folder) / "config.json"
    given = read_fields(path)
    needed = {"enc_chunk_size", "chunk_topk", "slide_window", "decoder_layers", "encoder_layers", "chunk_id"}
    if missing := needed - set(given):
        raise ValueError(f"{path} must be a configuration of the public DRT code, got none with {named(missing)}")
    layers = given["decoder_layers"]
    if not isinstance(layers, list) or not layers or not all(isinstance(number, int) for number in layers):
        raise ValueError(f"{path} must hold numbers of layers in decoder_layers, got {layers!r}")
    with refusing(f"{path} must be a configuration of the public DRT code"):
        return UpstreamConfig(**given)


def slot_of(chunk_size: int) -> str:
    """Return what becomes of a landmark among its chunk's keys; see the docstring of this module.

    Raises:
        ValueError: If the public code has no rule for this size.
    """
    rest = (chunk_size + 1) % 64
    if rest not in (0, 1):
        raise ValueError(f"enc_chunk_size + 1 must leave a remainder of 0 or 1 divided by 64, got {chunk_size}")
    return "off_by_one" if rest == 0 else "dropped"


def fields(config, target: str) -> dict:
    """Return the fields of DrtConfig.

    Raises:
        ValueError: If positions are not ALiBi, or the size of a chunk has no rule.
    """
    if not getattr(config, "enable_alibi", True):
        raise ValueError(f"enable_alibi must be True, got {config.enable_alibi}")
    lower, *groups = config.decoder_layers
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "initializer_range")
    return {
        **{name: getattr(config, name) for name in same if hasattr(config, name)},
        "num_key_value_heads": getattr(config, "num_key_value_heads", None),
        "num_lower_layers": lower,
        "retrieval_groups": groups,
        "num_encoder_layers": config.encoder_layers,
        "chunk_size": config.enc_chunk_size,
        "num_retrieved_chunks": config.chunk_topk,
        "sliding_window": config.slide_window + 1,
        "landmark_slot": slot_of(config.enc_chunk_size),
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-5),
        "pad_token_id": getattr(config, "pad_id", None),
        # one id ends a text and begins the next
        "bos_token_id": getattr(config, "bos_id", None),
        "eos_token_id": getattr(config, "bos_id", None),
        "tie_word_embeddings": True,
    }


def rename(name: str, config) -> str:
    """Count the layers through.

    Raises:
        ValueError: If the tensor is of another version of the code, or of a layer that is not configured.
    """
    if any(part in name for part in OUTDATED):
        raise ValueError(f"the state dict must be of the code since 98cda5d (May 2025), got {name}")
    lower, *groups = config.decoder_layers

    def counted(match: re.Match) -> str:
        group, layer = int(match[1]), int(match[2])
        if group >= len(groups) or layer >= groups[group]:
            raise ValueError(f"upper layers must be those of decoder_layers={config.decoder_layers}, got {name}")
        return f"model.layers.{lower + sum(groups[:group]) + layer}."

    plain = name.removeprefix("module.").replace("model.lower_layers.", "model.layers.")
    return re.sub(r"^model\.upper_layers\.(\d+)\.(\d+)\.", counted, plain)


def prepare(tensors: dict, config) -> dict:
    """Take the landmark's embedding out of the table and check the slopes.

    Raises:
        ValueError: If the slopes are not ALiBi's, or there is no such row or already a landmark.
    """
    slopes = 2.0 ** (-8 * torch.arange(1, config.num_attention_heads + 1) / config.num_attention_heads)
    for name, tensor in tensors.items():
        if name.endswith("self_attn.m"):
            check_values({name: tensor})
            given = tensor.flatten().abs().float()
            if given.shape != slopes.shape or not torch.allclose(given, slopes):
                raise ValueError(f"{name} must be ALiBi's slopes, got others")
    if LANDMARK in tensors:
        raise ValueError(f"{LANDMARK} must be a row of the embedding, got a tensor of its own")
    table, row = tensors.get("model.embed_tokens.weight"), config.chunk_id
    if table is not None and (not isinstance(row, int) or not 0 <= row < len(table)):
        raise ValueError(f"chunk_id must be a row of the embedding [0, {len(table)}), got {row!r}")
    return tensors if table is None else {**tensors, LANDMARK: table[row].clone()}


def weights(folder) -> str:
    """Return the file of weights in a folder.

    Raises:
        ValueError: If there is none, or several might be meant.
    """
    files = [Path(folder) / name for name in WEIGHTS if (Path(folder) / name).is_file()]
    files = files[:1] or sorted(Path(folder).glob("model*_*.bin"))
    if len(files) != 1:
        raise ValueError(f"{folder} must hold {' or '.join(WEIGHTS)} or one model<k>_<step>.bin, got {len(files)}")
    return str(files[0])


FAMILY = Family(
    "upstream DRT",
    (UpstreamConfig.model_type,),
    ("drt",),
    TABLE,
    fields,
    new=lambda config, target: (),
    rename=rename,
    prepare=prepare,
    read=read,
    weights=weights,
)


if __name__ == "__main__":
    main(FAMILY, "conversion.from_upstream_drt", __doc__)
