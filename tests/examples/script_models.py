"""Tiny models, a tokenizer and rows for the scripts, and what a run of one leaves behind."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_tokenizers import byte_tokenizer
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextConfig, InsNextForInsertionLM


WORDS = "the a old young man woman dog cat sea ball runs sleeps sees finds big red house and".split()
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.2}
SHAPES = {
    "insnext": {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 128},
    "drt": {
        **SIZES,
        "num_lower_layers": 1,
        "retrieval_groups": [1],
        "num_encoder_layers": 1,
        "chunk_size": 4,
        "num_retrieved_chunks": 2,
        "sliding_window": 8,
    },
}
CLASSES = {"insnext": (InsNextConfig, InsNextForInsertionLM), "drt": (DrtConfig, DrtForCausalLM)}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(320, texts=[" ".join(WORDS)] * 9, alphabet=pre_tokenizers.ByteLevel.alphabet())


def tiny_model(model_type: str, vocab_size: int = 320):
    torch.manual_seed(0)
    config_class, model_class = CLASSES[model_type]
    return model_class(config_class(**SHAPES[model_type], vocab_size=vocab_size)).eval()


def save_tiny_model(model_type: str, folder: Path) -> None:
    """Write a checkpoint and its tokenizer."""
    tokenizer = tiny_tokenizer()
    tiny_model(model_type, len(tokenizer)).save_pretrained(folder)
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
