"""The layers of DRT: self-attention over a window, attention to retrieved chunks, the chunk encoder.

Shape suffixes as in modeling_drt: B rows, L slots, C chunks, K chunks found, N chunks encoded at once, S tokens a
chunk, P positions a chunk, D width. Sources: DRT (ICML 2025, PMLR 267:24727), RoPE (arXiv:2104.09864).
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Window, WindowBackend
from .attention_triton import BACKENDS
from .cache import ChunkMemoryCache
from .configuration_drt import DrtConfig
from .landmark_attention import LANDMARK_BACKEND
from .layout import Layout, first_slots, shift_rows
from .positions import rotate
from .retrieval import FUSED, Served
from .rope import turn


class Pass(NamedTuple):
    """What a forward pass carries through its layers; `prepared` is what the attention backend made of `window`.

    `served` is `None` in lower layers.
    """

    layout: Layout
    past: ChunkMemoryCache | None
    window: Window
    prepared: object
    served: Served | None = None


def window_backend(config: DrtConfig) -> WindowBackend:
    """Return what computes self-attention for `config._attn_implementation`.

    Raises:
        ValueError: If DRT has no such implementation.
    """
    name, backends = config._attn_implementation, BACKENDS
    if config.self_attention == "landmark":
        # dense either way; `sdpa` is what Transformers chooses where nobody did
        backends = {"eager": LANDMARK_BACKEND, "sdpa": LANDMARK_BACKEND}
    if name not in backends:
        raise ValueError(
            f"attn_implementation must be one of {sorted(backends)} for DRT with "
            f"self_attention={config.self_attention!r}, got {name!r}"
        )
    return backends[name]


def decoder_norm(config: DrtConfig) -> nn.Module:
    """Return a norm over the decoder's width, of the kind that `config.norm` names."""
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.rms_norm_eps)


class DrtAttention(nn.Module):
    """Self-attention over a window."""

    def __init__(self, config: DrtConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        D, q_width = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(D, q_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_width, D, bias=config.attention_output_bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(self, hidden_BLD: torch.Tensor, carried: Pass) -> torch.Tensor:
        window, past = carried.window, carried.past
        heads = (*hidden_BLD.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_BLD).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_BLD).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_BLD).view(heads).transpose(1, 2)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if window.rotary is not None:
            query, key = turn(query, *window.rotary), turn(key, *window.rotary)
        sinks = self._sinks(key, value, carried).unbind(1) if window.sinks else ()
        if past is not None:
            key, value = past.append(self.layer_idx, key, value, carried.layout.lengths)
        if sinks:
            key, value = (torch.cat(pair, 2) for pair in zip(sinks, (key, value), strict=True))
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = window_backend(self.config).attend
        scaling = self.head_dim**-0.5
        out_BHLD = attend(query, key, value, carried.prepared, window, scaling=scaling, dropout=dropout)
        return self.o_proj(out_BHLD.transpose(1, 2).flatten(2))

    def _sinks(self, key_BGLD, value_BGLD, carried: Pass) -> torch.Tensor:
        """Return keys and values of the first positions of each row, `[B, 2, G, sinks, D]`."""
        tail = carried.past.sinks[self.layer_idx] if carried.past is not None else None
        held, first, count = tail and tail.tensor, carried.layout.first, carried.window.sinks
        if held is not None and min(first) >= count:
            return held
        sinks = first_slots(held, torch.stack([key_BGLD, value_BGLD], 1), first, count, dim=3)
        if tail is not None:
            # a view would keep all of a long input alive
            tail.tensor, tail.valid = sinks.clone(), [count] * sinks.shape[0]
        return sinks


class DrtCrossAttention(nn.Module):
    """Attention to retrieved chunks. Queries of its own; keys and values come from the chunk memory.

    They are those of the memory's heads `first_head` to `first_head` + G - 1.
    """

    def __init__(self, config: DrtConfig, first_head: int = 0):
        super().__init__()
        self.config = config
        self.heads = slice(first_head, first_head + config.num_key_value_heads)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        if config.gated_retrieval:
            self.gate = nn.Parameter(torch.ones(config.num_attention_heads))

    def forward(self, hidden_BLD: torch.Tensor, served: Served) -> torch.Tensor:
        key, value, weights_BCK, indices_BCK, phases = served
        key, value = key[:, self.heads], value[:, self.heads]
        B, L = hidden_BLD.shape[:2]
        query_BHLD = self.q_proj(self.norm(hidden_BLD)).view(B, L, -1, self.config.head_dim).transpose(1, 2)
        if phases is not None:
            aligned = indices_BCK.shape[1] * self.config.chunk_length
            query_BHLD = shift_rows(query_BHLD, [-phase for phase in phases], aligned, dim=2)
        grouped = window_backend(self.config).grouped if self.config.fusion == "gca" else None
        if grouped is not None and self.config.retrieval_by == "token":
            raise ValueError(
                f'retrieval_by="token" needs eager, sdpa or flex_attention, got {self.config._attn_implementation}'
            )
        attend = grouped or FUSED[self.config.fusion]
        off_by_one = self.config.landmark_slot == "off_by_one"
        out_BHLD = attend(query_BHLD, key, value, indices_BCK, weights_BCK.to(query_BHLD.dtype), off_by_one=off_by_one)
        if phases is not None:
            out_BHLD = shift_rows(out_BHLD, phases, L, dim=2)
        if self.config.gated_retrieval:
            out_BHLD = out_BHLD * self.gate[:, None, None]
        return self.o_proj(out_BHLD.transpose(1, 2).flatten(2))


class DrtMLP(nn.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

    def __init__(self, config: DrtConfig):
        super().__init__()
        D, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, width, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(D, width, bias=bias)
        self.down_proj = nn.Linear(width, D, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(hidden)))
        return self.down_proj(self.act(self.gate_proj(hidden)) * self.up_proj(hidden))


class DrtLayer(GradientCheckpointingLayer):
    """One layer; one of `config.cross_layers` also attends to chunks."""

    def __init__(self, config: DrtConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DrtAttention(config, layer_idx)
        self.cross_attn = None
        if layer_idx in config.cross_layers:
            place = config.cross_layers.index(layer_idx) if config.keys_per_layer else 0
            self.cross_attn = DrtCrossAttention(config, place * config.num_key_value_heads)
        self.mlp = DrtMLP(config)
        self.input_layernorm = decoder_norm(config)
        self.post_attention_layernorm = decoder_norm(config)
        self.bypass = config.residual == "bypass"

    # reentrant checkpointing sees gradients of positional tensors only: those that upper layers read come apart
    def forward(self, hidden, carried: Pass, key=None, value=None, weights=None):
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), carried)
        if self.cross_attn is None:
            return hidden + self.mlp(self.post_attention_layernorm(hidden))
        served = carried.served._replace(key_BGNSD=key, value_BGNSD=value, weights_BCK=weights)
        fused = hidden + self.cross_attn(hidden, served)
        residual = hidden if self.bypass else fused
        return residual + self.mlp(self.post_attention_layernorm(fused))


class DrtEncoderLayer(nn.Module):
    """A bidirectional layer over one chunk, with rotary positions."""

    def __init__(self, config: DrtConfig):
        super().__init__()
        D, width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.head_dim, self.theta = config.head_dim, config.encoder_rope_theta
        self.q_proj = nn.Linear(D, width, bias=False)
        self.k_proj = nn.Linear(D, width, bias=False)
        self.v_proj = nn.Linear(D, width, bias=False)
        self.o_proj = nn.Linear(width, D, bias=False)
        self.mlp = DrtMLP(config)
        self.input_layernorm = nn.RMSNorm(D, eps=config.encoder_rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=config.encoder_rms_norm_eps)

    def forward(self, hidden_BCPD):
        # the linear maps see one entry a row, for which adapters may differ; attention sees one a chunk
        normed = self.input_layernorm(hidden_BCPD)
        query, key, value = (
            proj(normed).flatten(0, 1).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(rotate(query, self.theta), rotate(key, self.theta), value)
        out = out.transpose(1, 2).flatten(2).unflatten(0, hidden_BCPD.shape[:2])
        hidden_BCPD = hidden_BCPD + self.o_proj(out)
        return hidden_BCPD + self.mlp(self.post_attention_layernorm(hidden_BCPD))


class DrtChunkEncoder(nn.Module):
    """What stays of a chunk: a landmark, and keys and values for the layers that attend to it."""

    def __init__(self, config: DrtConfig):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.input_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([DrtEncoderLayer(config) for _ in range(config.num_encoder_layers)])
        self.norm = nn.RMSNorm(D, eps=config.encoder_rms_norm_eps)
        self.k_proj = nn.Linear(D, config.memory_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(D, config.memory_heads * config.head_dim, bias=False)
        if config.landmark_source == "cls":
            self.cls = nn.Parameter(torch.zeros(D))

    def forward(self, states_BCPD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return landmarks `[B, C, D]` and keys and values `[B, C, 2, G, S, d]` of chunks of lower states."""
        hidden = self.input_norm(states_BCPD)
        if self.config.landmark_source == "cls":
            cls = self.cls.to(hidden.dtype).expand(*hidden.shape[:2], 1, -1)
            hidden = torch.cat([hidden, cls], dim=2)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        S, source = self.config.chunk_size, self.config.landmark_source
        tokens = hidden[:, :, :S]
        landmarks = tokens.mean(2) if source == "mean" else hidden[:, :, S]
        keys_values = torch.stack([self.k_proj(tokens), self.v_proj(tokens)], dim=2)
        return landmarks, keys_values.unflatten(-1, (-1, self.config.head_dim)).transpose(3, 4)


__all__ = ["DrtChunkEncoder", "DrtCrossAttention", "DrtLayer", "Pass", "decoder_norm", "window_backend"]
