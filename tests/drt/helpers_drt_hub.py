"""Tiny float32 models and a tiny tokenizer for the tests of everything around the model."""

import torch
from helpers_drt import tiny_config
from tiny_tokenizers import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_insnext import DrtForCausalLM


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 50 ids that pads on the left."""
    return byte_tokenizer(50, bos_in_front=False, padding_side="left")


def small_model(model_class=DrtForCausalLM, seed: int = 0, **changes):
    """Return an evaluation-mode float32 model."""
    torch.manual_seed(seed)
    return model_class(tiny_config(**changes)).eval()
