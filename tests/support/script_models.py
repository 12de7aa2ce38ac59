"""Tiny models, a tokenizer and rows for the scripts, and what a run of one leaves behind."""

import json
import random
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tests.support import drt, insnext
from tests.support.tokenizers import tiny_tokenizer


WORDS = "the a old young man woman dog cat sea ball runs sleeps sees finds big red house and".split()
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.2}
SHAPES = {
    "insnext": {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 128},
    "drt": {
        **SIZES,
        "num_key_value_heads": 2,
        "num_lower_layers": 1,
        "retrieval_groups": [1],
        "num_encoder_layers": 1,
        "chunk_size": 4,
        "num_retrieved_chunks": 2,
        "sliding_window": 8,
    },
}
MAKERS = {
    "insnext": partial(insnext.shipped_model, **SHAPES["insnext"]),
    "drt": partial(drt.shipped_model, **SHAPES["drt"]),
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(320, texts=[" ".join(WORDS)] * 9, all_bytes=True)


def save_tiny_model(model_type: str, folder: Path) -> None:
    """Write a checkpoint and its tokenizer."""
    tokenizer = word_tokenizer()
    MAKERS[model_type](vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sentence(dice: random.Random, length: int = 6) -> str:
    return " ".join(dice.choices(WORDS, k=length)).capitalize() + "."


def row(dice: random.Random) -> dict:
    texts = [sentence(dice) for _ in range(3)]
    label = dice.randint(0, 1)
    return {
        "text": " ".join(texts),
        "texts": texts,
        "words": dice.sample(texts[0].rstrip(".").lower().split(), 2),
        "prompt": sentence(dice, 3),
        "completion": sentence(dice, 2),
        "label": label,
        "kind": ["no", "yes"][label],
        "query": sentence(dice, 3),
        "choices": ["the dog", "a cat", "red"],
        "gold": label,
    }


def losses(output_dir: Path) -> list[tuple]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in output_dir.glob("*.safetensors") for name, t in load_file(path).items()}
