"""The one maker of byte-level tokenizers of a few ids, trained on a few sentences."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


SENTENCES = ["the old man and the sea", "a quick brown fox jumps over the lazy dog"]


def tiny_tokenizer(
    vocab_size: int = 60,
    bos_in_front: bool = True,
    padding_side: str = "right",
    texts=tuple(SENTENCES * 3),
    all_bytes: bool = False,
    add_prefix_space: bool = True,
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: padding, beginning and end are 0, 1 and 2; `all_bytes` gives each byte an id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if all_bytes else []
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    if bos_in_front:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        padding_side=padding_side,
    )
