"""Tiny models of both architectures with a tokenizer, for tests of folders that are exported, pushed and loaded."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextConfig, InsNextForInsertionLM


SENTENCES = ["the old man and the sea", "a quick brown fox jumps over the lazy dog"]
VOCAB_SIZE = 60
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
ARCHITECTURES = {
    "insnext": (InsNextForInsertionLM, InsNextConfig, {"num_hidden_layers": 2, "max_position_embeddings": 64}),
    "drt": (
        DrtForCausalLM,
        DrtConfig,
        {
            "num_lower_layers": 1,
            "retrieval_groups": [1],
            "num_encoder_layers": 1,
            "chunk_size": 4,
            "num_retrieved_chunks": 2,
            "sliding_window": 8,
        },
    ),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 60 ids: padding, beginning and end are 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_model(architecture: str, seed: int = 0, model_class=None, **changes):
    """Return a model in evaluation mode, a language model unless another class is given."""
    language_model, config_class, shape = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    return (model_class or language_model)(config_class(**{**SIZES, **shape, **changes})).eval()


def save_model(architecture: str, folder: Path, model_class=None, **changes) -> Path:
    """Save a model, its tokenizer and a file of notes, and return the folder."""
    tiny_model(architecture, model_class=model_class, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "notes.txt").write_text("of one run")
    return folder


def save_adapter(architecture: str, folder: Path) -> Path:
    """Save a base model and, beside it, an adapter that changes what it says; return the adapter's folder."""
    save_model(architecture, folder / "base")
    model = tiny_model(architecture)
    model.name_or_path = str(folder / "base")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    return folder / "adapter"
