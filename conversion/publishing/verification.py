"""Compares a model in memory with a folder or repository, loaded by a clean process with its own code."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from .clean_load import observe


CLEAN_LOAD = Path(__file__).with_name("clean_load.py")
TEXT = "The old man looked at the sea."
SHORT_TEXT = 24


class VerificationError(RuntimeError):
    """What was written does not load by itself, or does not say what the model in memory says."""


def probe_ids(config) -> torch.Tensor:
    """Return ids `[1, T]` that reach every part of the model: of DRT behind its window, where it retrieves."""
    T = SHORT_TEXT
    if config.model_type == "drt":
        T += (config.sliding_window or 0) + 2 * config.chunk_size
    T = min(T, (getattr(config, "max_position_embeddings", None) or T + SHORT_TEXT) - SHORT_TEXT // 2)
    special = {config.pad_token_id, config.bos_token_id}
    special |= set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
    plain = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    chosen = torch.randint(len(plain), (1, max(T, 1)), generator=torch.Generator().manual_seed(0))
    return plain[chosen]


def verify(
    model,
    tokenizer,
    auto_class: str,
    location: str | Path,
    base: str | Path | None = None,
    revision: str | None = None,
    offline: bool = True,
) -> None:
    """Load `location` in a clean process and compare logits, tokens and the tokenizer's ids, bit by bit.

    The process runs elsewhere, with an empty cache and without this package; only `HF_*` settings of the environment
    are kept if `offline` is false.

    Args:
        model: The model in memory, on the CPU, in evaluation mode.
        tokenizer: Its tokenizer.
        auto_class: Name of the Auto class to load with.
        location: Folder or repository of the model, or of the adapter if `base` is given.
        base: Folder or repository of the model under the adapter.
        revision: Revision of `location`.
        offline: Whether nothing may be fetched.

    Raises:
        VerificationError: If it does not load, or says something else.
    """
    ids = probe_ids(model.config)
    with tempfile.TemporaryDirectory() as elsewhere:
        job = {
            "auto_class": auto_class,
            "model": str(location if base is None else base),
            "adapter": None if base is None else str(location),
            "revision": revision,
            "ids": ids.tolist(),
            "text": TEXT,
            "threads": torch.get_num_threads(),
            "output": str(Path(elsewhere, "found.safetensors")),
        }
        environment = _environment(elsewhere, offline)
        command = [sys.executable, "-I", str(CLEAN_LOAD), json.dumps(job)]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise VerificationError(f"{location} does not load in a clean process:\n{done.stderr.strip()[-4000:]}")
        found = load_file(job["output"])
    expected = {**observe(model, ids), "text": torch.tensor(tokenizer(TEXT)["input_ids"])}
    other = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    if other:
        raise VerificationError(f"{location} loads in a clean process with other {', '.join(other)}")


def _environment(folder: str, offline: bool) -> dict[str, str]:
    dropped = ("HF_", "TRANSFORMERS_", "PYTHON") if offline else ("PYTHON",)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE"):
        environment.pop(name, None)
    return {**environment, "HF_HOME": str(Path(folder, "home")), "HF_HUB_OFFLINE": str(int(offline))}
