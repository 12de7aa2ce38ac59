"""Tiny models of both architectures with a tokenizer, for tests of folders that are exported, pushed and loaded."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny_tokenizers import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextConfig, InsNextForInsertionLM


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
    return byte_tokenizer(VOCAB_SIZE)


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


def save_adapter(architecture: str, folder: Path, config: PeftConfig | None = None) -> Path:
    """Save a base model and, beside it, an adapter that changes what it says; return the adapter's folder."""
    save_model(architecture, folder / "base")
    model = tiny_model(architecture)
    model.name_or_path = str(folder / "base")
    config = config or LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    return folder / "adapter"
