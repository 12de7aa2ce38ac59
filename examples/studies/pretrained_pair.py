"""SmolLM2 twice: as an insertion model under an adapter, and as the causal model that it was made of."""

import sys
from pathlib import Path

import torch
from left_to_right_perplexity import load
from transformers import AutoTokenizer

from modeling_insnext import InsNextForInsertionLM


# conversion is a tool of the clone and not installed
sys.path.append(str(Path(__file__).parents[2]))
from conversion.smollm2 import adapted, base, hub_folder, packaged_file  # isort: skip


ADAPTER = "examples/checkpoints/insnext-smol"


def load_pair(adapter: str):
    """Return the insertion model, its source and the tokenizer of both, in float32 for evaluation.

    Raises:
        ImportError, OSError, ValueError: See :func:`conversion.smollm2.adapted`.
    """
    folder = adapted(adapter)
    model = InsNextForInsertionLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, load(str(packaged_file() or hub_folder()), torch.float32), AutoTokenizer.from_pretrained(folder)


__all__ = ["ADAPTER", "base", "load_pair"]
