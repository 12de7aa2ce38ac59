"""Tiny float32 models and a tiny tokenizer for the tests of everything around the model."""

import torch
from helpers_drt import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_insnext import DrtForCausalLM


SENTENCES = ["the old man and the sea", "a quick brown fox jumps over the lazy dog"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 50 ids: padding, beginning and end are 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=50, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )


def small_model(model_class=DrtForCausalLM, seed: int = 0, **changes):
    """Return an evaluation-mode float32 model."""
    torch.manual_seed(seed)
    return model_class(tiny_config(**changes)).eval()
