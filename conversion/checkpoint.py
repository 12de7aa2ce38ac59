"""Checkpoint folders: read them, check every tensor by name, write them whole or not at all.

Only safetensors and `torch.load(weights_only=True)`: reading a checkpoint runs none of its code.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import modeling_insnext

from .folders import appearing, read_fields, refusing, save_tokenizer
from .gguf import is_gguf, read_gguf_config, read_gguf_tensors, read_gguf_tokenizer


SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# what may stand around the tensors in a pickled file
WRAPPERS = ("state_dict", "model")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def named(names: Iterable[str], limit: int = 5) -> str:
    """Return the first names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_tensors(source: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint by name, on the CPU.

    Args:
        source: A folder as `save_pretrained` writes it (one file, or shards with an index), one file of tensors, or a
            GGUF file.

    Raises:
        ValueError: If there are no weights, the index and its shards differ, or a file is no file of tensors.
    """
    source = Path(source)
    if is_gguf(source):
        return read_gguf_tensors(source)
    if source.is_file():
        return _read_file(source)
    for index in (source / name for name in INDEX_FILES):
        if index.is_file():
            return _read_shards(index)
    for file in (source / name for name in SINGLE_FILES):
        if file.is_file():
            return _read_file(file)
    raise ValueError(f"{source} must be a file of tensors or hold one of {(*INDEX_FILES, *SINGLE_FILES)}, got none")


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    promised = read_fields(index).get("weight_map")
    if not isinstance(promised, dict) or not all(isinstance(shard, str) for shard in promised.values()):
        raise ValueError(f"{index} must map tensors to files in its weight_map, got {str(promised)[:80]}")
    tensors, places = {}, {}
    for shard in sorted(set(promised.values())):
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise ValueError(f"{index} must name shards that stand beside it, got {shard}, which does not")
        for name, tensor in _read_file(index.parent / shard).items():
            tensors[name], places[name] = tensor, shard
    wrong = [name for name in {*promised, *places} if promised.get(name) != places.get(name)]
    if wrong:
        raise ValueError(f"{index} and its shards must hold the same tensors, they differ in {named(wrong)}")
    return tensors


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} must be a whole safetensors file: {error}") from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:
        # garbage raises errors of every kind; of a pickle that runs code, PyTorch says how to run it all the same
        raise ValueError(f"{file} must be a whole file of tensors and nothing that runs") from None
    for key in WRAPPERS:
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{file} must hold tensors by name, got something else")
    return dict(tensors)


def not_plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return what the tensors are that hold something else than one of `DTYPES` at each place, by name."""
    return {
        name: f"{name} ({tensor.dtype}, {tensor.layout}, {tensor.device})"
        for name, tensor in tensors.items()
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided or tensor.is_meta
    }


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors with an infinite entry or one that is no number."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check what tensors hold, before anything is made of them.

    Raises:
        ValueError: If one is none of `DTYPES`, or not finite, or they are not all of one; the message has the names.
    """
    if wrong := not_plain(tensors):
        kinds = ", ".join(map(str, DTYPES))
        raise ValueError(f"tensors must be dense and of {kinds}, got {len(wrong)} others: {named(wrong.values())}")
    if wrong := not_finite(tensors):
        raise ValueError(f"tensors must be finite, got {len(wrong)} that are not: {named(wrong)}")
    kinds = {}
    for name, tensor in tensors.items():
        kinds.setdefault(tensor.dtype, []).append(name)
    if len(kinds) > 1:
        rarest = sorted(kinds.items(), key=lambda kind: len(kind[1]))
        listed = "; ".join(f"{len(names)} {dtype}: {named(names)}" for dtype, names in rarest)
        raise ValueError(f"tensors must be of one dtype, got {listed}")


def check_tensors(found: Mapping[str, torch.Tensor], expected_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check names, shapes and values.

    Raises:
        ValueError: If a tensor is missing, extra, mis-shaped, none of `DTYPES` or not finite; all of them are counted,
            the first named.
    """
    strange = not_plain(found)
    faults = {
        "missing": set(expected_shapes) - set(found),
        "extra": set(found) - set(expected_shapes),
        "mis-shaped": {
            f"{name} ({list(found[name].shape)}, should be {list(shape)})"
            for name, shape in expected_shapes.items()
            if name in found and tuple(found[name].shape) != tuple(shape)
        },
        "not dense floating point": strange.values(),
        "not finite": not_finite({name: tensor for name, tensor in found.items() if name not in strange}),
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {kind}: {named(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"the tensors must be those of the model, got {listed}")


def model_class(config: PreTrainedConfig):
    """Return the class that a configuration names, of this package or of Transformers; by default the one with a head
    that writes text."""
    for name in config.architectures or ():
        for module in (modeling_insnext, transformers):
            found = getattr(module, str(name), None)
            if isinstance(found, type) and issubclass(found, PreTrainedModel):
                return found
    return AutoModelForCausalLM._model_mapping[type(config)]


def skeleton(config: PreTrainedConfig):
    """Return the model of a configuration without memory for its weights."""
    with torch.device("meta"):
        return model_class(config)._from_config(config)


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a saved model of this configuration holds; tied ones count once."""
    model = skeleton(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def read_config(folder: str | os.PathLike) -> PreTrainedConfig:
    """Return the configuration of a folder or a GGUF file, by a class of this package or of Transformers.

    Raises:
        ValueError: If there is none, no class for it, or one that its class refuses.
    """
    if is_gguf(folder):
        return read_gguf_config(folder)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} must be a folder with a config.json, got none")
    with refusing(f"{folder}/config.json must be a configuration of Transformers"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def read_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a folder or a GGUF file, `None` if a folder has none."""
    if is_gguf(source):
        return read_gguf_tokenizer(source)
    if not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)


def read_generation_config(folder: str | os.PathLike) -> GenerationConfig | None:
    """Return a folder's options of generation, but for the kind of cache, which is each architecture's own.

    Raises:
        ValueError: If they are none that Transformers reads.
    """
    if not (Path(folder) / "generation_config.json").is_file():
        return None
    with refusing(f"{folder}/generation_config.json must be a configuration of Transformers"):
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if found.cache_implementation is not None:
        found.cache_implementation = None
    return found


def check_folder(folder: str | os.PathLike) -> PreTrainedConfig:
    """Check that a folder holds the tensors that its configuration demands, and return the configuration.

    Raises:
        ValueError: If one is missing, extra, mis-shaped or not finite, or there is nothing to check.
    """
    config = read_config(folder)
    check_tensors(read_tensors(folder), expected_shapes(config))
    return config


def write_checkpoint(
    folder: str | os.PathLike,
    config: PreTrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
) -> None:
    """Write a folder that `from_pretrained` loads, whole or not at all.

    Args:
        folder: New folder.
        config: Configuration of the model.
        tensors: Every tensor of it, under the names of :func:`expected_shapes`.
        tokenizer: Saved beside it.
        generation_config: Options of generation in the place of those that follow from the configuration.

    Raises:
        ValueError: If the folder holds something, or the tensors are not those of the model.
    """
    check_tensors(tensors, expected_shapes(config))
    model = skeleton(config)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = generation_config or model.generation_config
    with appearing(folder) as made:
        model.save_pretrained(made)
        if tokenizer is not None:
            save_tokenizer(tokenizer, made)
        check_folder(made)
