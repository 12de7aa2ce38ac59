"""Tiny models and a tiny tokenizer for the tests of everything around the model."""

import torch
from tiny_tokenizers import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_insnext import InsNextConfig


VOCAB_SIZE = 60


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(VOCAB_SIZE)


def tiny_config(**overrides) -> InsNextConfig:
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return InsNextConfig(**{**fields, **overrides})


def tiny_model(model_class, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    return model_class(tiny_config(**overrides)).eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return ids without special tokens, but for BOS in front."""
    ids = torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids
