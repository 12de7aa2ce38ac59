"""GGUF files of llama.cpp as sources: Transformers reads them and multiplies their weights out, to float32.

They hold configuration, tensors and tokenizer in one file. Needs the package `gguf`.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .folders import refusing


# fields that say by how much, whatever the architecture in front of them
SCALED = (".rope.scaling.factor", ".rope.scale_linear")


def is_gguf(source) -> bool:
    """Return whether a path names a GGUF file.

    Raises:
        ImportError: If it does and `gguf` is not installed.
    """
    path = Path(source)
    if path.suffix != ".gguf" or not path.is_file():
        return False
    if find_spec("gguf") is None:
        raise ImportError(f"{path.name} needs the package gguf: pip install gguf")
    return True


def check_positions(path: Path) -> None:
    """Raise a `ValueError` if rotary positions are scaled, which Transformers would pass over."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} must be a GGUF file, got {error}") from error
    fields = {name for name in reader.fields if name.endswith(SCALED) and reader.fields[name].contents() != 1.0}
    tensors = {tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")}
    if fields | tensors:
        raise ValueError(
            f"rotary positions in {path} must have no scaling, which Transformers does not read from GGUF files, got "
            f"{', '.join(sorted(fields | tensors))}: convert the model's folder"
        )


def read_gguf_config(source) -> PreTrainedConfig:
    """Return the configuration, without a word of how the weights were packed: what is read of them is plain.

    Raises:
        ValueError: If Transformers cannot read it, or rotary positions are scaled.
    """
    path = Path(source)
    check_positions(path)
    with refusing(f"{source} must be a GGUF file of a model that Transformers knows"):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def read_gguf_tensors(source) -> dict[str, torch.Tensor]:
    """Return all tensors by the names of Transformers, float32; a tied head counts once.

    Raises:
        ValueError: If Transformers cannot read them.
    """
    path = Path(source)
    with refusing(f"{source} must be a GGUF file of a model that Transformers knows"):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        )
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def read_gguf_tokenizer(source) -> PreTrainedTokenizerBase:
    """Return the tokenizer."""
    path = Path(source)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
