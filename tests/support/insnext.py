"""The one maker of tiny InsNeXt models, and random ids for them."""

from functools import partial

import torch

from modeling_insnext import InsNextConfig, InsNextForInsertionLM


PAD, BOS, EOS = 0, 1, 2
TINY = {
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def tiny_config(**changes) -> InsNextConfig:
    return InsNextConfig(**{**TINY, **changes})


def tiny_model(model_class=InsNextForInsertionLM, dtype=torch.float64, seed=0, attn="eager", **changes):
    """Return a model in evaluation mode whose outputs are far from uniform; `attn=None` takes what the config says."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(**changes)).eval().to(dtype)
    if attn is not None:
        model.set_attn_implementation(attn)
    return model


# as users meet it: float32, the attention that Transformers picks, ids for `tiny_tokenizer`
SHIPPED_VOCAB = 60
shipped_model = partial(tiny_model, dtype=torch.float32, attn=None, vocab_size=SHIPPED_VOCAB)


def random_ids(rows: int, length: int, seed: int = 0, vocab_size: int = SHIPPED_VOCAB) -> torch.Tensor:
    """Return ids without special tokens, but for BOS in front."""
    ids = torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids
