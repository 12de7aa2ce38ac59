"""Tiny models of both architectures with a tokenizer, for tests of folders that are exported, pushed and loaded."""

from functools import partial
from pathlib import Path

from peft import LoraConfig, PeftConfig, get_peft_model

from tests.support import drt, insnext
from tests.support.tokenizers import tiny_tokenizer


MAKERS = {"insnext": insnext.shipped_model, "drt": partial(drt.shipped_model, vocab_size=insnext.SHIPPED_VOCAB)}


def save_model(architecture: str, folder: Path, *model_class, **changes) -> Path:
    """Save a model, its tokenizer and a file of notes, and return the folder."""
    MAKERS[architecture](*model_class, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "notes.txt").write_text("of one run")
    return folder


def save_adapter(architecture: str, folder: Path, config: PeftConfig | None = None) -> Path:
    """Save a base model and, beside it, an adapter that changes what it says; return the adapter's folder."""
    save_model(architecture, folder / "base")
    model = MAKERS[architecture]()
    model.name_or_path = str(folder / "base")
    config = config or LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    return folder / "adapter"
