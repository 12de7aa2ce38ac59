"""The one maker of tiny DRT models: chunks of five tokens, a window of nine positions, two chunks retrieved."""

from functools import partial

import torch

from modeling_insnext import DrtConfig, DrtForCausalLM

from .tokenizers import tiny_tokenizer


TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_lower_layers": 2,
    "retrieval_groups": [1, 1],
    "num_encoder_layers": 1,
    "chunk_size": 5,
    "num_retrieved_chunks": 2,
    "sliding_window": 9,
    "initializer_range": 0.3,
}

# the forms of decoder that other families have: Llama's positions, Qwen3's heads, GPT-2
ROPE = {"position_encoding": "rope"}
QWEN = {**ROPE, "qk_norm": True, "head_dim": 6, "attention_bias": True, "rope_parameters": {"rope_theta": 50.0}}
GPT2 = {
    "position_encoding": "learned",
    "max_position_embeddings": 150,
    "norm": "layernorm",
    "attention_bias": True,
    "attention_output_bias": True,
    "gated_mlp": False,
    "hidden_act": "gelu",
    "mlp_bias": True,
}
# what a model converted with a memory has: layers that attend to chunks among others, each with its own keys, gated
MEMORY = {
    **ROPE,
    "landmark_source": "mean",
    "num_sink_tokens": 1,
    "residual": "stream",
    "retrieval_groups": [2, 2],
    "num_lower_layers": 1,
    "cross_attention_layers": 1,
    "keys_per_layer": True,
    "gated_retrieval": True,
}
FORMS = {"rope": ROPE, "qwen": QWEN, "gpt2": {**GPT2, "landmark_source": "mean"}, "gpt2_landmarks": GPT2}


def tiny_config(**changes) -> DrtConfig:
    return DrtConfig(**{**TINY, **changes})


def tiny_model(model_class=DrtForCausalLM, dtype=torch.float64, seed: int = 0, **changes):
    """Return a model in evaluation mode whose config is `TINY` with `changes`."""
    torch.manual_seed(seed)
    return model_class(tiny_config(**changes)).to(dtype).eval()


# as users meet it
shipped_model = partial(tiny_model, dtype=torch.float32)


def random_ids(rows: int, length: int, seed: int = 0, vocab_size: int = 50) -> torch.Tensor:
    """Return `[rows, length]` token ids, special ones (0 to 2) left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (rows, length), generator=generator)


def drt_tokenizer():
    """Return a tokenizer of the tiny models' 50 ids that pads on the left."""
    return tiny_tokenizer(50, bos_in_front=False, padding_side="left")


@torch.no_grad()
def read(model, ids: torch.Tensor, past, step: int = 1, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Feed `ids` to the model behind `past`, `step` columns at a time, and return all logits; `mask` covers both."""
    start, logits = past.columns, []
    for column in range(0, ids.shape[1], step):
        some = ids[:, column : column + step]
        seen = None if mask is None else mask[:, : start + column + some.shape[1]]
        logits.append(model(some, seen, past_key_values=past).logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def whole(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of one parallel forward pass."""
    return model(ids, mask, use_cache=False).logits


def padded(ids: torch.Tensor, lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `lengths[b]` tokens of each row, padded to the longest, and the mask."""
    T = max(lengths)
    out, mask = torch.zeros(len(lengths), T, dtype=torch.long), torch.zeros(len(lengths), T, dtype=torch.long)
    for row, n in enumerate(lengths):
        place = slice(T - n, T) if side == "left" else slice(0, n)
        out[row, place], mask[row, place] = ids[row, :n], 1
    return out, mask
