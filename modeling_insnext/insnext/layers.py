"""The blocks of InsNeXt. By default h + Attention(RMSNorm(h)), then h + SwiGLU(RMSNorm(h)), without biases.

    norm             a block of h with f = attention, then f = feed-forward
    rmsnorm          h + f(RMSNorm(h))
    layernorm        h + f(LayerNorm(h))
    deepnorm         RMSNorm(a h + f(h)), a = (2 layers)^(1/4)
    post_layernorm   LayerNorm(h + f(h)), and no norm behind the last block

Shape suffixes as in modeling_insnext. Sources: DeepNorm (arXiv:2203.00555), XLNet's relative sinusoids
(arXiv:1906.08237). What else can be chosen lets the layers of other families be taken over.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import interval_backend
from .configuration_insnext import POST_NORMS, InsNextConfig


def block_norm(config: InsNextConfig) -> nn.Module:
    """Return a norm over the model's width, of the kind that `config.norm` names."""
    if config.norm in ("rmsnorm", "deepnorm"):
        return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps, bias=config.norm_bias)


class InsNextAttention(nn.Module):
    """Grouped-query attention over intervals.

    With `sinusoidal` it adds (q + v) . W_r R(offset), the InsNet form; with `rotary` keys are kept unturned, and
    turned by where they stand when they are read (see rotary).
    """

    def __init__(self, config: InsNextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        D, q_width = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(D, q_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_width, D, bias=config.attention_output_bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        if config.position_encoding == "sinusoidal":
            self.r_proj = nn.Linear(D, q_width, bias=False)
            self.content_bias = nn.Parameter(torch.zeros(config.num_attention_heads, 1, self.head_dim))
            self.offset_bias = nn.Parameter(torch.zeros(config.num_attention_heads, 1, self.head_dim))

    def forward(self, hidden_states, attention_mask, past_key_values: Cache | None = None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if self.config.position_encoding == "sinusoidal":
            attention_mask = self.offset_scores(query + self.offset_bias, *attention_mask)
            query = query + self.content_bias
        dropout = self.config.attention_dropout if self.training else 0.0
        if self.config.position_encoding == "rotary":
            out, weights = attention_mask.attend(self, query, key, value, dropout)
            return self.o_proj(out.flatten(2)), weights
        implementation = self.config._attn_implementation
        attend = interval_backend(implementation).attend or ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=dropout,
        )
        return self.o_proj(out.flatten(2)), weights

    def offset_scores(self, query_BHQD, offsets_BQK, visible_BQK):
        """Return the additive mask (q . W_r R(offset)) / sqrt(D), `-inf` on invisible keys."""
        K, D = offsets_BQK.shape[-1], self.config.hidden_size
        wide = {"device": query_BHQD.device, "dtype": torch.promote_types(query_BHQD.dtype, torch.float32)}
        distance = torch.arange(-K, K + 1, **wide)
        rate = 10000 ** (-torch.arange(0, D, 2, **wide) / D)
        angle = distance[:, None] * rate
        table = torch.cat([angle.sin(), angle.cos()], 1)[:, :D].to(query_BHQD.dtype)
        table = self.r_proj(table).view(2 * K + 1, -1, self.head_dim).permute(1, 2, 0)
        scores = query_BHQD @ table * self.scaling
        index = (offsets_BQK + K)[:, None].expand(-1, scores.shape[1], -1, -1)
        return scores.gather(3, index).masked_fill(~visible_BQK[:, None], -torch.inf)


class InsNextMLP(nn.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

    def __init__(self, config: InsNextConfig):
        super().__init__()
        D, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, width, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(D, width, bias=bias)
        self.down_proj = nn.Linear(width, D, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(hidden_states)))
        return self.down_proj(self.act(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class InsNextBlock(GradientCheckpointingLayer):
    def __init__(self, config: InsNextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = InsNextAttention(config, layer_idx)
        self.mlp = InsNextMLP(config)
        self.post_norm = config.norm in POST_NORMS
        # embeddings that have their norm need no other one before the first attention
        normed = config.embedding_norm and layer_idx == 0 and not self.post_norm
        self.input_layernorm = nn.Identity() if normed else block_norm(config)
        self.post_attention_layernorm = block_norm(config)
        self.residual_scale = (2 * config.num_hidden_layers) ** 0.25 if config.norm == "deepnorm" else 1.0

    def forward(self, hidden_states, attention_mask, past_key_values=None, **kwargs):
        if self.post_norm:
            attended, _ = self.self_attn(hidden_states, attention_mask, past_key_values)
            hidden_states = self.input_layernorm(self.residual_scale * hidden_states + attended)
            return self.post_attention_layernorm(self.residual_scale * hidden_states + self.mlp(hidden_states))
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask, past_key_values)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


__all__ = ["InsNextAttention", "InsNextBlock", "InsNextMLP", "block_norm"]
