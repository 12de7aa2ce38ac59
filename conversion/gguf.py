"""GGUF files of llama.cpp as sources: Transformers reads them and multiplies their weights out, to float32.

They hold configuration, tensors and tokenizer in one file. Needs the package `gguf`.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .folders import refusing


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


def read_gguf_config(source) -> PreTrainedConfig:
    """Return the configuration, without a word of how the weights were packed: what is read of them is plain.

    Raises:
        ValueError: If Transformers cannot read it.
    """
    path = Path(source)
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
