"""Byte-level tokenizers of a few ids, trained on a few sentences."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


SENTENCES = ["the old man and the sea", "a quick brown fox jumps over the lazy dog"]


def byte_tokenizer(
    vocab_size: int, bos_in_front: bool = True, padding_side: str = "right", texts=tuple(SENTENCES * 3), alphabet=()
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: padding, beginning and end are 0, 1 and 2; `alphabet` has ids in any case."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    options = {"special_tokens": special, "initial_alphabet": list(alphabet), "show_progress": False}
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
