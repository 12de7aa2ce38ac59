"""Tiny random sources in float64, made by transformers itself, and what takes their positions and roundings out."""

import types

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)


SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
DECODERS = {
    "llama": LlamaConfig(**SMALL),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama_biased": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-2),
    "llama3_scaling": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "yarn": LlamaConfig(**SMALL, rope_parameters=YARN, head_dim=16),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True, bos_token_id=1, eos_token_id=[2, 3]),
    "qwen3": Qwen3Config(**SMALL, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
    "qwen2_window": Qwen2Config(**SMALL, **WINDOW, bos_token_id=1, eos_token_id=2),
    "qwen3_window": Qwen3Config(**SMALL, **WINDOW, head_dim=10, attention_bias=True),
    "mistral": MistralConfig(**SMALL, sliding_window=9),
    "gpt2": GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2, attn_pdrop=0.0
    ),
}
CHUNKS = {"chunk_size": 5, "num_retrieved_chunks": 2, "num_encoder_layers": 1}
SMALL_ENCODER = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
}
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
MODERN = {**SMALL_ENCODER, **SPECIAL, "cls_token_id": 0, "sep_token_id": 2, "local_attention": 40, "norm_bias": False}
ENCODERS = {
    "roberta": RobertaConfig(**SMALL_ENCODER, **SPECIAL, type_vocab_size=1),
    "modernbert": ModernBertConfig(**MODERN),
    "modernbert_biased": ModernBertConfig(**{**MODERN, "norm_bias": True}, attention_bias=True, mlp_bias=True),
}


def shaken(model, seed: int = 0):
    """Return the model in float64 with every weight random: new norms are ones and new biases zero, and would hide."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.add_(0.3 * noise if weight.ndim == 1 else 0.15 * noise)
    return model


def source_model(name: str):
    torch.manual_seed(0)
    return shaken(AutoModelForCausalLM.from_config(DECODERS[name]))


def encoder(name):
    torch.manual_seed(0)
    return shaken(AutoModelForMaskedLM.from_config(ENCODERS[name]))


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def _norm(self, x):
    return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def _table(self, x, position_ids, *args):
    angle = position_ids[..., None].double() * self.inv_freq.double().repeat(2)
    return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def exact(model):
    """Take two roundings out of a source: its RMSNorms and rotary tables are float32 even in a float64 model."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = types.MethodType(_table, module)
    return model
