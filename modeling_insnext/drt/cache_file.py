"""A cache as a file: one safetensors file that says what model it belongs to.

    8 bytes, header                 padded with spaces so that the data begin at a multiple of 4096
    memory.chunks [N, 2, G, S, D]   keys and values of the chunks that rows refer to, each once
    memory.landmarks [N, W]         memory.table [B, chunks of the longest row]: places in the above
    keys.L, values.L, sinks.L       the window of layer L; states, found.g.chunks, found.g.weights, recent

The header's `__metadata__` has `format`, `version`, and as JSON `model` (the configuration fields in
`FINGERPRINT_FIELDS`, the data type, a SHA-256 of the weights), `state` (lengths of rows, what is valid of each
window), `digests` of all tensors but the chunks, and `digest` of all this; `memory.checksums` [N] has eight bytes a
chunk. The file is written and read in pieces; as a chunk memory on disk it is mapped where it lies. Any flipped bit is
found: on loading, but for chunks on disk, each of which is compared when it is first read. Files of version 1 have no
digests and are read as they are.

A file is written under a temporary name that ends in `.part` and is locked meanwhile; what a killed process left of
that kind goes when the same path is saved again.
"""

import glob
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .memory import PIECE, chunk_checksums, claim_space, map_chunks


try:
    import fcntl
except ImportError:
    # not on Windows, where what a killed process left stays
    fcntl = None

FORMAT = "drt-chunk-memory"
VERSION = "2"
WITHOUT_DIGESTS = "1"
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
    "num_sink_tokens": 0,
    "cross_attention_layers": None,
    "keys_per_layer": False,
    "gated_retrieval": False,
    "retrieval_by": "chunk",
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
    memory, tensors, kept_N = cache.memory, {}, None
    if memory.slab is not None:
        kept_N, landmarks_ND, table_BN = memory.compact()
        tensors |= {"memory.landmarks": landmarks_ND, "memory.table": table_BN}
        # filled while the chunks are written
        tensors["memory.checksums"] = torch.zeros(len(kept_N), dtype=torch.int64)
    tails = cache.named_tails()
    tensors |= {name: tail.tensor for name, tail in tails.items() if tail.tensor is not None}
    # chunks first, then wide types before narrow ones: everything is aligned
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    state = {
        "seen": cache.seen,
        "columns": cache.columns,
        "crop_margin": cache.crop_margin,
        "chunks": memory.counts,
        "valid": {name: tail.valid for name, tail in tails.items()},
    }
    path = Path(path)
    _remove_leftovers(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            _lock(file)
            _write(file, memory, kept_N, tensors, {"model": model_facts, "state": state})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _lock(file) -> bool:
    """Lock an open file, if nobody else has; where there are no locks, nothing is anybody's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (AttributeError, OSError):
        return False
    return True


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that are no more left of saving to this path."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        with open(part, "rb") as file:
            if _lock(file):
                part.unlink(missing_ok=True)


def _write(file, memory, kept_N: torch.Tensor | None, tensors: dict, facts: dict) -> None:
    """Write the data, and in front of it the header, which holds their digests and has a size that is known before."""
    shapes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    if kept_N is not None:
        shapes = {"memory.chunks": (memory.slab.dtype, [len(kept_N), *memory.slab.chunk_shape]), **shapes}
    digests = dict.fromkeys(tensors, _digest().hexdigest())
    header, size = _header(shapes, {**facts, "digests": digests})
    claim_space(file, size, "the chunk memory")
    file.seek(len(header))
    place = 0
    for chunks in memory.pieces(kept_N) if kept_N is not None else ():
        tensors["memory.checksums"][place : place + len(chunks)] = chunk_checksums(chunks)
        place += len(chunks)
        for piece in _bytes_of(chunks):
            file.write(piece)
    for name, tensor in tensors.items():
        digest = _digest()
        for piece in _bytes_of(tensor):
            digest.update(piece)
            file.write(piece)
        digests[name] = digest.hexdigest()
    file.seek(0)
    file.write(_header(shapes, {**facts, "digests": digests})[0])


def _digest(data: bytes = b""):
    return hashlib.blake2b(data, digest_size=16)


def header_digest(facts: dict, shapes: dict) -> str:
    """Return the digest of what a header says: its facts, and the names, types and shapes of its tensors."""
    return _digest(json.dumps([facts, shapes], sort_keys=True).encode()).hexdigest()


def _header(shapes: dict, facts: dict) -> tuple[bytes, int]:
    """Return the header's bytes, its length in front, and the size of the whole file."""
    metadata = {"format": FORMAT, "version": VERSION, **{name: json.dumps(fact) for name, fact in facts.items()}}
    entries, begin = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in shapes.items():
        end = begin + int(np.prod(shape)) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    described = {name: [DTYPE_NAMES[dtype], shape] for name, (dtype, shape) in shapes.items()}
    metadata["digest"] = header_digest(facts, described)
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
    if found not in ((FORMAT, VERSION), (FORMAT, WITHOUT_DIGESTS)):
        raise ValueError(f"{path} must be of format {FORMAT} version {VERSION}, got {' version '.join(found)}")
    try:
        entries, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, begin = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0]
            entries[name] = Entry(dtype, shape, 8 + length + begin)
            if begin != end or entry["data_offsets"][1] != begin + int(np.prod(shape)) * dtype.itemsize:
                raise ValueError(name)
            end = entry["data_offsets"][1]
        names = ("model", "state") if found[1] == WITHOUT_DIGESTS else ("model", "state", "digests")
        facts = {name: json.loads(metadata[name]) for name in names}
        if set(facts["state"]) != STATE:
            raise KeyError("state")
        described = {name: [DTYPE_NAMES[entry.dtype], list(entry.shape)] for name, entry in entries.items()}
        if "digests" in facts and metadata["digest"] != header_digest(facts, described):
            raise ValueError("it does not say what was written")
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
    digests = facts.get("digests", {})
    held = {name: _read(path, name, entry, digests) for name, entry in entries.items() if name != "memory.chunks"}
    for name, tail in cache.named_tails().items():
        tail.valid = state["valid"][name]
        if name in held:
            tail.tensor = held[name].to("cpu" if name == "recent" else decoder.device)
    if "memory.chunks" in entries:
        _fill_memory(cache.memory, path, entries["memory.chunks"], held, state["chunks"], decoder.device)
    return cache


def _fill_memory(memory, path, chunks: Entry, held: dict[str, torch.Tensor], counts: list[int], device) -> None:
    landmarks_ND, table_BN, checksums_N = (held.get(f"memory.{n}") for n in ("landmarks", "table", "checksums"))
    places = chunks.shape[0]
    if table_BN.numel() and not 0 <= int(table_BN.min()) <= int(table_BN.max()) < places:
        raise ValueError(f"{path} is damaged: its table names places outside of the {places} chunks it has")
    memory.begin(len(counts), chunks.shape[1:], landmarks_ND.shape[1], chunks.dtype, device, places)
    pieces = []
    if places and memory.location == "disk":
        memory.slab.map_saved(path, chunks.begin, places, checksums_N)
    elif places:
        memory.slab.reserve(places)
        mapped = map_chunks(path, chunks.begin, chunks.shape, chunks.dtype, mode="r")
        pieces = _checked(path, mapped.split(max(PIECE // mapped[0].nbytes, 1)), checksums_N)
    memory.fill(pieces, landmarks_ND, table_BN, counts)


def _checked(path, pieces, checksums_N: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Return the chunks in pieces, each compared with its checksum."""
    place = 0
    for piece in pieces:
        if checksums_N is not None:
            wrong = (chunk_checksums(piece) != checksums_N[place : place + len(piece)]).nonzero()
            if len(wrong):
                raise ValueError(f"{path} is damaged: chunk {place + int(wrong[0])} is not what was written")
        place += len(piece)
        yield piece


def _read(path, name: str, entry: Entry, digests: dict[str, str]) -> torch.Tensor:
    if 0 in entry.shape:
        return torch.empty(entry.shape, dtype=entry.dtype)
    size = int(np.prod(entry.shape)) * entry.dtype.itemsize
    # bytes as they lie there: a copy of booleans would make them ones
    raw = map_chunks(path, entry.begin, (size,), torch.uint8, mode="r")
    digest = _digest()
    for piece in _bytes_of(raw):
        digest.update(piece)
    if digests.get(name, digest.hexdigest()) != digest.hexdigest():
        raise ValueError(f"{path} is damaged: {name} is not what was written")
    return raw.view(entry.dtype).view(entry.shape).clone()


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
        "sinks": (dtype, (B, 2, G, config.num_sink_tokens, d)),
        "states": (dtype, (B, None, None)),
        "recent": (torch.bool, (B, None)),
        "found.chunks": (torch.int64, (B, None, K)),
        "found.weights": (torch.promote_types(dtype, torch.float32), (B, None, K)),
        "memory.chunks": (dtype, (N, 2, config.memory_heads, S, d)),
        "memory.landmarks": (dtype, (N, None)),
        "memory.table": (torch.int64, (B, max(complete, default=0))),
        "memory.checksums": (torch.int64, (N,)),
    }
    tails = cache.named_tails()
    demanded = {"memory.chunks", "memory.landmarks", "memory.table"} if complete else set()
    demanded |= {"memory.checksums"} & set(entries) if complete else set()
    fits = state["chunks"] == complete and set(state["valid"]) == set(tails)
    fits &= set(entries) - set(tails) == demanded
    for name, entry in entries.items() if fits else ():
        kind, shape = kinds[".".join(part for part in name.split(".") if not part.isdigit())]
        fits &= entry.dtype == kind and len(entry.shape) == len(shape)
        fits &= all(wanted in (None, held) for wanted, held in zip(shape, entry.shape, strict=False))
        fits &= name not in tails or len(state["valid"][name]) == B
    if not fits:
        raise ValueError(f"{path} is damaged: what it holds does not fit the {state['seen']} tokens it should be of")
