"""Configuration of InsNeXt, an insertion language model.

Sources: InsNet (arXiv:2102.11008) and InsNeXt (OpenReview moqBBpMZ8w). Both leave sizes and formulae open; every
choice made here in their place is a field of :class:`InsNextConfig`.
"""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .peft_targets import register_adapter_targets
from .rope import check_rope


# of the code that stands beside a checkpoint: the version of the package
CODE_VERSION = "0.1.0"

POSITION_ENCODINGS = ("alibi", "sinusoidal", "rotary")
NORMS = ("rmsnorm", "deepnorm", "layernorm", "post_layernorm")
POST_NORMS = ("deepnorm", "post_layernorm")
SLOT_NORMS = ("rmsnorm", "rmsclip")
BLOCK_ATTENTIONS = ("bidirectional", "causal")
POOLINGS = ("mean", "last")

PRESETS = {
    "base": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 16,
        "intermediate_size": 2048,
    },
    "advanced": {
        "hidden_size": 1152,
        "num_attention_heads": 18,
        "num_hidden_layers": 32,
        "intermediate_size": 3072,
    },
}


class InsNextConfig(PreTrainedConfig):
    """Shape and choices of an InsNeXt model.

    Args:
        vocab_size: Number of token ids; ids are in `[0, vocab_size)`.
        hidden_size: Width D of the residual stream.
        intermediate_size: Width of the feed-forward.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of query heads H.
        num_key_value_heads: Heads of keys and values (grouped query attention); `None` means `num_attention_heads`.
        head_dim: Width of a head; `None` means `hidden_size / num_attention_heads`.
        max_position_embeddings: Longest text in tokens, given and written ones together.
        position_encoding: `"alibi"` (direction-aware insertion ALiBi) or `"sinusoidal"` (the InsNet baseline: XLNet's
            relative sinusoids with their own projection, on the same offsets) or `"rotary"` (RoPE on the same offsets:
            left to right it is that of Llama); all but ALiBi with `eager` and `sdpa` attention only.
        rope_parameters: For `"rotary"`, as in Transformers: `{"rope_type": "default", "rope_theta": 10000.0}`, or
            another type of `ROPE_TYPES` with what it needs.
        block_attention: What tokens that are encoded together (a given text, or one that is re-encoded) see of one
            another: `"bidirectional"`, everything, or `"causal"`, what stands left of them in the text, and the last
            one everything. So a text that is given is read as the causal model reads it that a model was made of.
        alibi_slope_ratio: Factor on even heads' left and odd heads' right slope. 1 is the symmetric form, which cannot
            tell left from right.
        norm: `"rmsnorm"` or `"layernorm"` (pre-norm), `"deepnorm"` (post-norm with DeepNorm's scales,
            arXiv:2203.00555) or `"post_layernorm"` (post-norm as in BERT); formulae: layers.
        norm_bias: Whether LayerNorms have biases.
        embedding_norm: Whether the embeddings pass a norm; a pre-norm model then has none before its first attention.
        qk_norm: Whether every head's queries and keys pass an RMSNorm.
        attention_bias: Whether the projections to queries, keys and values have biases.
        attention_output_bias: Whether the output projection of attention has one.
        gated_mlp: Whether the feed-forward is down(act(gate(x)) * up(x)) or down(act(up(x))).
        hidden_act: Its activation, by the name Transformers gives it.
        mlp_bias: Whether its projections have biases.
        slot_norm: What a slot's token is read off through: `"rmsnorm"`, w x / rms(x), or `"rmsclip"`,
            w x / max(1, rms(x)), which leaves what passed an RMSNorm as it is. So a converted model is its source.
        position_logit_cap: Soft cap c of the slot logits, `c * tanh(z / c)`.
        attention_dropout: Dropout probability on attention weights in training.
        initializer_range: Standard deviation of the normal initialisation.
        rms_norm_eps: Epsilon of every norm.
        tie_word_embeddings: Whether the token head reuses the input embedding.
        classifier_pooling: What the heads for sequence classification and multiple choice read: `"mean"`, the mean
            over the text's states, or `"last"`, the state of its last token; each has read the whole text.
        code_version: Version of the code that saved the checkpoint; `save_pretrained` of a model writes it.

    Raises:
        ValueError: If a field is out of its range; the message names the rule and the value.
    """

    model_type = "insnext"
    keys_to_ignore_at_inference = ["past_key_values", "position_loss", "token_loss"]

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    position_encoding: str = "alibi"
    rope_parameters: dict | None = None
    block_attention: str = "bidirectional"
    alibi_slope_ratio: float = 4.0
    norm: str = "rmsnorm"
    norm_bias: bool = True
    embedding_norm: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    gated_mlp: bool = True
    hidden_act: str = "silu"
    mlp_bias: bool = False
    slot_norm: str = "rmsnorm"
    position_logit_cap: float = 30.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    use_cache: bool = True
    classifier_pooling: str = "mean"
    code_version: str | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check()
        self._check_positions()
        super().__post_init__(**kwargs)
        if self.position_encoding != "rotary":
            # the base class fills every field of this name
            self.rope_parameters = None

    def _check(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {self.num_attention_heads} and "
                f"{self.num_key_value_heads}"
            )
        for name, choices in (
            ("position_encoding", POSITION_ENCODINGS),
            ("block_attention", BLOCK_ATTENTIONS),
            ("norm", NORMS),
            ("slot_norm", SLOT_NORMS),
            ("classifier_pooling", POOLINGS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}")
        for name in ("alibi_slope_ratio", "position_logit_cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must be in [0, 1), got {self.attention_dropout}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} must be in [0, {self.vocab_size}), got {token}")

    def _check_positions(self):
        kind, given = self.position_encoding, self.rope_parameters
        if given is not None and kind != "rotary":
            raise ValueError(f'rope_parameters need position_encoding="rotary", got {kind!r}')
        if kind != "rotary":
            return
        check_rope(given or {})
        if self.head_dim % 2:
            raise ValueError(f'position_encoding="rotary" needs an even head_dim, got {self.head_dim}')

    def to_dict(self) -> dict:
        """Return the fields; PEFT asks for them before it looks up target modules by model type."""
        register_adapter_targets(self.model_type)
        return super().to_dict()

    @property
    def never_inserted(self) -> list[int]:
        """Ids that are structure, not text: padding, beginning and end have probability 0 as inserted tokens."""
        return sorted({t for t in (self.pad_token_id, self.bos_token_id, self.eos_token_id) if t is not None})

    @classmethod
    def preset(cls, name: str, **overrides) -> "InsNextConfig":
        """Return the configuration of a published size, "ours, size-matched": the paper prints no shapes.

        Args:
            name: `"base"` (155M) or `"advanced"` (574M).
            **overrides: Fields to change.

        Raises:
            ValueError: If there is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["CODE_VERSION", "InsNextConfig"]
