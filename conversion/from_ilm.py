"""Insertion Language Models (arXiv:2505.05755; repositories dhruvdcoder/ILM and xlm-core) into InsNeXt.

    python -m conversion.from_ilm SRC DST --to insnext [--bos_token_id 4 --eos_token_id 5]

SRC is a folder with `config.json` (the arguments of the model's class, as `PyTorchModelHubMixin` writes them:
num_embeddings, d_model, num_layers, nhead, ...) and the weights: `model.safetensors`, or one file `.pt` or `.ckpt`.
Rotary models are read; the GPT-2 ones are refused, by the names of their tensors. That configuration names no ids of
beginning and end.

The same layers, not the same function: embeddings, projections, LayerNorms, feed-forward and the untied head are taken
over; rotary positions give way to the offsets of insertion. Where ILM scores all pairs of place and token at once and
asks the state of its first token whether to stop, InsNeXt has a slot head, which is new, and which a final norm
precedes, also new if the source has none (`final_layer_without_normalization`). With both position schemes taken out,
the states behind the last layer of a text that sees all of itself are equal.
"""

from pathlib import Path

from transformers import PreTrainedConfig

from .checkpoint import named
from .convert import NEW, Family, main
from .folders import read_fields, refusing
from .tables import split


TABLE = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "encoder.{}.norm1.weight": "model.layers.{}.input_layernorm.weight",
    "encoder.{}.norm1.bias": "model.layers.{}.input_layernorm.bias",
    "encoder.{}.attn_qkv.weight": split(*(f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkv")),
    "encoder.{}.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "encoder.{}.norm2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "encoder.{}.norm2.bias": "model.layers.{}.post_attention_layernorm.bias",
    "encoder.{}.mlp.0.weight": "model.layers.{}.mlp.up_proj.weight",
    "encoder.{}.mlp.0.bias": "model.layers.{}.mlp.up_proj.bias",
    "encoder.{}.mlp.2.weight": "model.layers.{}.mlp.down_proj.weight",
    "encoder.{}.mlp.2.bias": "model.layers.{}.mlp.down_proj.bias",
    "output_layer.norm_final.weight": "model.norm.weight",
    "output_layer.norm_final.bias": "model.norm.bias",
    "output_layer.linear.weight": "lm_head.weight",
    # rotary frequencies and their tables: InsNeXt's positions are offsets
    "encoder.{}.rotary_emb.inv_freq": None,
    "encoder.{}.rotary_emb.sin": None,
    "encoder.{}.rotary_emb.cos": None,
    # whether to stop (or how much is missing), asked of the first token: InsNeXt's STOP stands among the slots
    "length_output_layer.norm_final.weight": None,
    "length_output_layer.norm_final.bias": None,
    # `{}` is the number in mlp.0 and mlp.2
    "length_output_layer.mlp.{}.weight": None,
    "length_output_layer.mlp.{}.bias": None,
    "length_output_layer.linear.weight": None,
}

# their "gelu" is the tanh approximation
ACTIVATIONS = {"relu": "relu", "gelu": "gelu_pytorch_tanh"}


class IlmConfig(PreTrainedConfig):
    """The arguments of an ILM's class, as they are."""

    model_type = "ilm"

    dim_feedforward: int | None = None
    padding_idx: int = 0
    dropout: float = 0.1
    activation: str = "relu"
    layer_norm_eps: float = 1e-5
    max_length: int = 1024
    final_layer_without_normalization: bool = True


def read(folder) -> IlmConfig:
    """Return the configuration of a folder.

    Raises:
        ValueError: If it is none of a rotary ILM's.
    """
    path = Path(folder) / "config.json"
    given = read_fields(path)
    if missing := {"num_embeddings", "d_model", "num_layers", "nhead"} - set(given):
        raise ValueError(f"{path} must hold the arguments of an ILM, got none with {named(missing)}")
    with refusing(f"{path} must hold the arguments of an ILM"):
        return IlmConfig(**given)


def fields(config, target: str) -> dict:
    """Return the fields of InsNextConfig.

    Raises:
        ValueError: If the activation is none of ILM's.
    """
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {config.activation!r}")
    return {
        "vocab_size": config.num_embeddings,
        "hidden_size": config.d_model,
        "intermediate_size": config.dim_feedforward or 4 * config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.nhead,
        "max_position_embeddings": config.max_length,
        "norm": "layernorm",
        "rms_norm_eps": config.layer_norm_eps,
        "gated_mlp": False,
        "hidden_act": ACTIVATIONS[config.activation],
        "mlp_bias": True,
        "attention_dropout": config.dropout,
        "pad_token_id": config.padding_idx,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }


def new(config, target: str) -> tuple[str, ...]:
    return (*NEW[target], "model.norm.*") if config.final_layer_without_normalization else NEW[target]


def rename(name: str, config) -> str:
    """Strip what trainers and compilers put in front of a name."""
    return name.removeprefix("model.").removeprefix("_orig_mod.")


def weights(folder) -> str:
    """Return the file of weights, or the folder if it has the usual names.

    Raises:
        ValueError: If there are several files of weights.
    """
    files = [path for suffix in ("*.pt", "*.ckpt") for path in sorted(Path(folder).glob(suffix))]
    if len(files) > 1:
        raise ValueError(f"{folder} must hold one file of weights, got {named(path.name for path in files)}")
    return str(files[0] if files else folder)


FAMILY = Family(
    "ILM", (IlmConfig.model_type,), ("insnext",), TABLE, fields, new=new, rename=rename, read=read, weights=weights
)


if __name__ == "__main__":
    main(FAMILY, "conversion.from_ilm", __doc__)
