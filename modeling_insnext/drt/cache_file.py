"""A cache as a file: one safetensors file that says what model it belongs to.

    8 bytes, header                 padded with spaces so that the data begin at a multiple of 4096
    memory.chunks [N, 2, G, S, D]   keys and values of the chunks that rows refer to, each once
    memory.landmarks [N, W]         memory.table [B, chunks of the longest row]: places in the above
    keys.L, values.L                the window of layer L; states, found.g.chunks, found.g.weights, recent

The header's `__metadata__` has `format`, `version`, and as JSON `model` (the configuration fields in
`FINGERPRINT_FIELDS`, the data type, a SHA-256 of the weights) and `state` (lengths of rows, what is valid of each
window). The file is written and read in pieces; as a chunk memory on disk it is mapped where it lies. A changed
header, another size and places that do not exist are noticed, a flipped bit of the data is not.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .memory import PIECE, claim_space, map_chunks


FORMAT = "drt-chunk-memory"
VERSION = "1"
ALIGNMENT = 4096
LARGEST_HEADER = 100_000_000
STATE = {"seen", "columns", "crop_margin", "chunks", "valid"}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# every field that changes what a cache holds or how it goes on
FINGERPRINT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_lower_layers",
    "retrieval_groups",
    "num_encoder_layers",
    "chunk_size",
    "num_retrieved_chunks",
    "sliding_window",
    "landmark_source",
    "landmark_slot",
    "residual",
    "fusion",
    "retriever",
    "self_attention",
    "encoder_rope_theta",
    "rms_norm_eps",
    "encoder_rms_norm_eps",
)
# younger than the first files: what a file that does not name them means
YOUNGER_FIELDS = {
    "position_encoding": "alibi",
    "rope_parameters": None,
    "qk_norm": False,
    "norm": "rmsnorm",
    "gated_mlp": True,
    "hidden_act": "silu",
}


class Entry(NamedTuple):
    """A tensor in a file; `begin` counts from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


def decoder_of(model):
    """Return the `DrtModel` in a model, whatever wraps it."""
    for module in model.modules():
        # by name: as remote code the class is another one
        if type(module).__name__ == "DrtModel":
            return module
    raise ValueError(f"model must hold a DrtModel, got {type(model).__name__}")


def weights_digest(decoder) -> str:
    """Return a SHA-256 over names, types, shapes and bytes of all weights below the head."""
    digest = hashlib.sha256()
    for name, weight in decoder.state_dict().items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        for piece in _bytes_of(weight):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(decoder) -> dict:
    """Return what a file and a model must have in common."""
    fields = {name: getattr(decoder.config, name) for name in (*FINGERPRINT_FIELDS, *YOUNGER_FIELDS)}
    return {**fields, "dtype": str(decoder.dtype), "weights": weights_digest(decoder)}


def _bytes_of(tensor: torch.Tensor) -> Iterator[np.ndarray]:
    """Return the bytes of a tensor, some megabytes at a time."""
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(PIECE // flat.element_size()):
        yield piece.cpu().contiguous().view(torch.uint8).numpy()


def save_cache(cache, path: str | os.PathLike, model) -> None:
    """Write a cache to `path`, first under a temporary name next to it.

    Raises:
        ValueError: If the cache has read nothing.
        OSError: If it does not fit on the disk: what lay at `path` lies there still, and nothing else is left.
    """
    if not cache.columns:
        raise ValueError("the cache must have read something before it is saved, got 0 tokens")
    model_facts = fingerprint(decoder_of(model))
    memory, tensors, shapes = cache.memory, {}, {}
    if memory.slab is not None:
        kept_N, landmarks_ND, table_BN = memory.compact()
        shapes["memory.chunks"] = (memory.slab.dtype, [len(kept_N), *memory.slab.chunk_shape])
        tensors |= {"memory.landmarks": landmarks_ND, "memory.table": table_BN}
    tails = cache.named_tails()
    tensors |= {name: tail.tensor for name, tail in tails.items() if tail.tensor is not None}
    # chunks first, then wide types before narrow ones: everything is aligned
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    shapes |= {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    state = {
        "seen": cache.seen,
        "columns": cache.columns,
        "crop_margin": cache.crop_margin,
        "chunks": memory.counts,
        "valid": {name: tail.valid for name, tail in tails.items()},
    }
    header, size = _header(shapes, {"model": model_facts, "state": state})
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            claim_space(file, size, f"the chunk memory {path}")
            file.write(header)
            if memory.slab is not None:
                for chunks in memory.pieces(kept_N):
                    for piece in _bytes_of(chunks):
                        file.write(piece)
            for tensor in tensors.values():
                for piece in _bytes_of(tensor):
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(shapes: dict, facts: dict) -> tuple[bytes, int]:
    """Return the header's bytes, its length in front, and the size of the whole file."""
    metadata = {"format": FORMAT, "version": VERSION, **{name: json.dumps(fact) for name, fact in facts.items()}}
    entries, begin = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in shapes.items():
        end = begin + int(np.prod(shape)) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + begin


def read_header(path: str | os.PathLike) -> tuple[dict, dict[str, Entry]]:
    """Return the metadata and the tensors that a file of :func:`save_cache` announces.

    Raises:
        ValueError: If it is no such file, of another version, or not of the size that its header demands.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 2 <= length <= min(size - 8, LARGEST_HEADER) else None
            metadata = header.pop("__metadata__")
            found = metadata["format"], metadata["version"]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be a saved chunk memory, got a file without its header") from error
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} must be of format {FORMAT} version {VERSION}, got {' version '.join(found)}")
    try:
        entries, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, begin = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0]
            entries[name] = Entry(dtype, shape, 8 + length + begin)
            if begin != end or entry["data_offsets"][1] != begin + int(np.prod(shape)) * dtype.itemsize:
                raise ValueError(name)
            end = entry["data_offsets"][1]
        facts = {name: json.loads(metadata[name]) for name in ("model", "state")}
        if set(facts["state"]) != STATE:
            raise KeyError("state")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} has a damaged header: {error}") from error
    if size != 8 + length + end:
        raise ValueError(f"{path} is truncated or damaged: its header demands {8 + length + end} bytes, got {size}")
    return facts, entries


def load_cache(cls, path: str | os.PathLike, model, location: str, folder: str | os.PathLike | None, search: str):
    """Return the cache that :func:`save_cache` wrote; `crop_margin` is that of the saved one.

    A cache on disk maps the chunks where they lie and takes new ones to a file of its own, so a book opens at once,
    whatever its length. The saved file is never written; it must not be shortened while it is in use.

    Raises:
        ValueError: If the file is no memory of this model, in this data type, or is truncated; the message names what
            differs.
    """
    decoder = decoder_of(model)
    facts, entries = read_header(path)
    _check_model(path, facts["model"], decoder)
    state = facts["state"]
    cache = cls(decoder.config, location, folder, search, state["crop_margin"])
    _check_state(path, state, entries, cache, decoder)
    cache.seen, cache.columns = state["seen"], state["columns"]
    for name, tail in cache.named_tails().items():
        tail.valid = state["valid"][name]
        if name in entries:
            tail.tensor = _read(path, entries[name]).to("cpu" if name == "recent" else decoder.device)
    if "memory.chunks" in entries:
        _fill_memory(cache.memory, path, entries, state["chunks"], decoder)
    return cache


def _fill_memory(memory, path, entries: dict[str, Entry], counts: list[int], decoder) -> None:
    chunks, landmarks = entries["memory.chunks"], entries["memory.landmarks"]
    places, table_BN = chunks.shape[0], _read(path, entries["memory.table"])
    if table_BN.numel() and not 0 <= int(table_BN.min()) <= int(table_BN.max()) < places:
        raise ValueError(f"{path} is damaged: its table names places outside of the {places} chunks it has")
    memory.begin(len(counts), chunks.shape[1:], landmarks.shape[1], chunks.dtype, decoder.device)
    pieces = []
    if places and memory.location == "disk":
        memory.slab.map_saved(path, chunks.begin, places)
    elif places:
        memory.slab.reserve(places)
        mapped = map_chunks(path, chunks.begin, chunks.shape, chunks.dtype, mode="r")
        pieces = mapped.split(max(PIECE // mapped[0].nbytes, 1))
    memory.fill(pieces, _read(path, landmarks), table_BN, counts)


def _read(path, entry: Entry) -> torch.Tensor:
    if 0 in entry.shape:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return map_chunks(path, entry.begin, entry.shape, entry.dtype, mode="r").clone()


def _check_model(path, saved: dict, decoder) -> None:
    for name in (*FINGERPRINT_FIELDS, *YOUNGER_FIELDS):
        held, wanted = saved.get(name, YOUNGER_FIELDS.get(name)), getattr(decoder.config, name)
        if held != wanted:
            raise ValueError(f"{path} is a memory of another model: {name} is {held!r} in it, {wanted!r} in the model")
    if saved.get("dtype") != str(decoder.dtype):
        raise ValueError(
            f"{path} is a memory of the model in {saved.get('dtype')}, got the model in {decoder.dtype}: load the "
            f"model in the type in which it read the text"
        )
    digest = weights_digest(decoder)
    if saved.get("weights") != digest:
        raise ValueError(
            f"{path} is a memory of another model: the weights differ (SHA-256 {str(saved.get('weights'))[:12]} in "
            f"it, {digest[:12]} of the model)"
        )


def _check_state(path, state: dict, entries: dict[str, Entry], cache, decoder) -> None:
    """Check that every tensor has the type and shape that the model and the lengths of the rows demand."""
    config, dtype = decoder.config, decoder.dtype
    complete = [config.grid.positions(n) // config.chunk_length for n in state["seen"]]
    complete = complete if config.retrieval_groups else []
    B, K, N = len(state["seen"]), config.num_retrieved_chunks, entries.get("memory.chunks", ((), (0,)))[1][0]
    G, S, d = config.num_key_value_heads, config.chunk_size, config.head_dim
    window = (dtype, (B, G, None, d))
    kinds = {
        "keys": window,
        "values": window,
        "states": (dtype, (B, None, None)),
        "recent": (torch.bool, (B, None)),
        "found.chunks": (torch.int64, (B, None, K)),
        "found.weights": (torch.promote_types(dtype, torch.float32), (B, None, K)),
        "memory.chunks": (dtype, (N, 2, G, S, d)),
        "memory.landmarks": (dtype, (N, None)),
        "memory.table": (torch.int64, (B, max(complete, default=0))),
    }
    tails = cache.named_tails()
    allowed = {*tails, *(["memory.chunks", "memory.landmarks", "memory.table"] if complete else [])}
    fits = state["chunks"] == complete and set(state["valid"]) == set(tails) and set(entries) <= allowed
    fits &= set(entries) - set(tails) == allowed - set(tails)
    for name, entry in entries.items() if fits else ():
        kind, shape = kinds[".".join(part for part in name.split(".") if not part.isdigit())]
        fits &= entry.dtype == kind and len(entry.shape) == len(shape)
        fits &= all(wanted in (None, held) for wanted, held in zip(shape, entry.shape, strict=False))
        fits &= name not in tails or len(state["valid"][name]) == B
    if not fits:
        raise ValueError(f"{path} is damaged: what it holds does not fit the {state['seen']} tokens it should be of")
