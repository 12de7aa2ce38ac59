"""Configuration of DRT, a left-to-right language model that retrieves chunks of its own past.

Source: Hu et al., "Efficient Length-Generalizable Attention via Causal Retrieval for Long-Context Language Modeling"
(ICML 2025). What the paper and its code leave open, or do in several ways, is a field of :class:`DrtConfig`.
"""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .grid import ChunkGrid
from .peft_targets import register_adapter_targets
from .rope import check_rope


# of the code that stands beside a checkpoint: the version of the package
CODE_VERSION = "0.1.0"

LANDMARK_SOURCES = ("token", "cls", "mean")
LANDMARK_SLOTS = ("off_by_one", "dropped")
RESIDUALS = ("bypass", "stream")
FUSIONS = ("gca", "cca")
RETRIEVERS = ("learned", "random", "fixed")
RETRIEVAL_BY = ("chunk", "token")
SELF_ATTENTIONS = ("window", "landmark")
POSITION_ENCODINGS = ("alibi", "rope", "learned")
NORMS = ("rmsnorm", "layernorm")
# scalings whose frequencies do not depend on how much has been read: a cache keeps keys as they were turned

# smallest values of what must be an integer
SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_lower_layers": 0,
    "num_encoder_layers": 1,
    "num_sink_tokens": 0,
    "chunk_size": 1,
    "num_retrieved_chunks": 1,
}

_SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_lower_layers": 6}
_MEDIUM = {"hidden_size": 1024, "intermediate_size": 2730, "num_attention_heads": 16, "num_lower_layers": 10}
_LARGE = {"hidden_size": 1280, "intermediate_size": 3413, "num_attention_heads": 20, "num_lower_layers": 16}

PRESETS = {
    "small-x1": {**_SMALL, "retrieval_groups": [6]},
    "small-x2": {**_SMALL, "retrieval_groups": [3, 3]},
    "medium-x1": {**_MEDIUM, "retrieval_groups": [12]},
    "medium-x2": {**_MEDIUM, "retrieval_groups": [6, 6]},
    "large-x1": {**_LARGE, "retrieval_groups": [18]},
    "large-x2": {**_LARGE, "retrieval_groups": [9, 9]},
    "large-x3": {**_LARGE, "retrieval_groups": [6, 6, 6]},
}


def _is_integer(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class DrtConfig(PreTrainedConfig):
    """Shape and choices of a DRT model.

    Args:
        vocab_size: Number of token ids; ids are in `[0, vocab_size)`. Landmarks are no ids: they have a vector of
            their own.
        hidden_size: Width D of the residual stream.
        intermediate_size: Width of the feed-forward.
        num_attention_heads: Number of query heads H.
        head_dim: Width of a head; `None` means `hidden_size / num_attention_heads`.
        num_key_value_heads: Heads G of keys and values, of the window and of the chunk memory; `None` means
            `num_attention_heads`.
        num_lower_layers: Layers below the chunk encoder.
        retrieval_groups: Numbers of upper layers that share one retrieval: `[6]` retrieves once a chunk (x1), `[3, 3]`
            twice (x2). `[]` is the sliding-window model without retrieval.
        num_encoder_layers: Bidirectional layers of the chunk encoder.
        chunk_size: Tokens S a chunk, landmark not counted.
        num_retrieved_chunks: Number k of chunks that a retrieval returns.
        sliding_window: Number of keys a token sees in self-attention, itself and landmarks included; `None`: all.
        num_sink_tokens: How many first tokens of a text stay visible to every window, at their own positions: the
            attention sinks that a pretrained source leans on. At most `chunk_size`; not with ALiBi, under which a far
            token weighs nothing, and not without a window.
        landmark_source: What stands for a chunk. `"token"`: a landmark put into the text after every chunk; its
            encoder output is the key, its hidden state the query. `"cls"`: a vector appended in the chunk encoder.
            `"mean"`: the mean of the encoder outputs. Without landmarks in the text the last token asks.
        landmark_slot: What the landmark leaves in the chunk's softmax: `"off_by_one"` (one more in the denominator)
            or `"dropped"` (nothing).
        residual: `"bypass"`: what was retrieved enters the feed-forward only; `"stream"`: also the residual stream.
        fusion: `"gca"`: a softmax inside each chunk, chunks weighted by their retrieval scores; `"cca"`: one softmax
            over the concatenated chunks, scores unused (as in RETRO, arXiv:2112.04426).
        retrieval_by: Who asks: `"chunk"`, with the state at its end and for the next one, or `"token"`: every token
            for itself, among the chunks before its own (as in HSA, arXiv:2504.16795, with these weights; not with
            `retriever="fixed"` or the Triton kernels). It searches for every token.
        cross_attention_layers: How many layers of each group, its first ones, attend to what was retrieved; `None`:
            all.
        keys_per_layer: Whether each of these layers has keys and values of its own in the chunk memory, which grows by
            as much, or all read the same ones.
        gated_retrieval: Whether the heads of cross-attention have a factor each, 1 in a new model. A model converted
            with a memory starts with 0 there.
        retriever: `"learned"` end to end; `"random"`: any chunks, equal weights; `"fixed"`: cosine of frozen
            bag-of-tokens vectors (which of several chunks of the same tokens is chosen, is left open).
        self_attention: `"window"`, or `"landmark"`: the grouped softmax of Landmark Attention (arXiv:2305.16300), a
            baseline; it needs `sliding_window=None`, `retrieval_groups=[]` and `landmark_source="token"`.
        position_encoding: Positions of self-attention: `"alibi"`, `"rope"`, or `"learned"` vectors added to the
            embeddings. Positions count a row's own slots, landmarks in the text included.
        rope_parameters: For `"rope"`, as in Transformers: `{"rope_type": "default", "rope_theta": 10000.0}`, or
            another type of `ROPE_TYPES` with what it needs.
        max_position_embeddings: For `"learned"`, how many positions there are: no text is longer. Otherwise the
            length that the weights were trained for, if known; nothing is cut there. With llama3 and
            YaRN it is what they stretch to. A configuration without it has no such attribute: to other libraries
            `None` would be a number that is missing.
        qk_norm: Whether every head's queries and keys pass an RMSNorm before they are turned.
        attention_bias: Whether the projections to queries, keys and values of self-attention have biases.
        attention_output_bias: Whether the output projection of self-attention has one.
        norm: Kind of the decoder's norms, in its layers and before the head: `"rmsnorm"` or `"layernorm"`. What serves
            retrieval (chunk encoder, cross-attention, queries) has RMSNorms and, but for `mlp_bias`, no biases.
        gated_mlp: Whether the feed-forward is down(act(gate(x)) * up(x)) or down(act(up(x))).
        hidden_act: Its activation, by the name Transformers gives it.
        mlp_bias: Whether its projections have biases.
        encoder_rope_theta: Base of the rotary positions inside the chunk encoder.
        attention_dropout: Dropout probability on window attention weights in training.
        initializer_range: Standard deviation of the normal initialisation.
        rms_norm_eps: Epsilon of the decoder's norms.
        encoder_rms_norm_eps: Epsilon of the encoder's RMSNorms.
        tie_word_embeddings: Whether the head reuses the input embedding.
        code_version: Version of the code that saved the checkpoint; `save_pretrained` of a model writes it.
        num_hidden_layers: May be given as a check: what `num_lower_layers` and `retrieval_groups` must add up to.

    Raises:
        ValueError: If a field is out of its range; the message names the rule and the value.
    """

    model_type = "drt"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_lower_layers: int = 6
    retrieval_groups: list[int] | tuple[int, ...] = (6,)
    num_encoder_layers: int = 2
    chunk_size: int = 64
    num_retrieved_chunks: int = 8
    sliding_window: int | None = 512
    num_sink_tokens: int = 0
    landmark_source: str = "token"
    landmark_slot: str = "off_by_one"
    residual: str = "bypass"
    cross_attention_layers: int | None = None
    keys_per_layer: bool = False
    gated_retrieval: bool = False
    fusion: str = "gca"
    retriever: str = "learned"
    retrieval_by: str = "chunk"
    self_attention: str = "window"
    position_encoding: str = "alibi"
    rope_parameters: dict | None = None
    qk_norm: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    norm: str = "rmsnorm"
    gated_mlp: bool = True
    hidden_act: str = "silu"
    mlp_bias: bool = False
    encoder_rope_theta: float = 10000.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    encoder_rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    use_cache: bool = True
    code_version: str | None = None

    def __post_init__(
        self, num_hidden_layers: int | None = None, max_position_embeddings: int | None = None, **kwargs
    ):
        if max_position_embeddings is not None:
            self.max_position_embeddings = max_position_embeddings
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_sizes()
        self.retrieval_groups = list(self.retrieval_groups)
        self._check_shape(num_hidden_layers)
        self._check_choices()
        self._check_sinks()
        self._check_numbers()
        self._check_positions()
        super().__post_init__(**kwargs)
        if self.position_encoding != "rope":
            # the base class fills every field of this name
            self.rope_parameters = None

    def _check_sizes(self):
        for name, least in SIZES.items():
            value = getattr(self, name)
            if not _is_integer(value, least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.sliding_window is not None and not _is_integer(self.sliding_window, 1):
            raise ValueError(f"sliding_window must be an integer of at least 1 or None, got {self.sliding_window!r}")
        crossing = self.cross_attention_layers
        if crossing is not None and not _is_integer(crossing, 1):
            raise ValueError(f"cross_attention_layers must be an integer of at least 1 or None, got {crossing!r}")
        groups = self.retrieval_groups
        if not isinstance(groups, (list, tuple)) or not all(_is_integer(n, 1) for n in groups):
            raise ValueError(f"retrieval_groups must be a list of numbers of layers, each at least 1, got {groups!r}")

    def _check_shape(self, num_hidden_layers: int | None):
        layers = f"num_lower_layers={self.num_lower_layers} and retrieval_groups={self.retrieval_groups}"
        if self.num_hidden_layers < 1:
            raise ValueError(f"there must be at least one layer, got {layers}")
        if num_hidden_layers not in (None, self.num_hidden_layers):
            raise ValueError(f"layers must add up to num_hidden_layers={num_hidden_layers}, got {layers}")
        wholes = [("num_attention_heads", "num_key_value_heads")]
        if self.head_dim is None:
            wholes.insert(0, ("hidden_size", "num_attention_heads"))
        for whole, part in wholes:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} must be a multiple of {part}, got {getattr(self, whole)} and {getattr(self, part)}"
                )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not _is_integer(self.head_dim, 1) or self.head_dim % 2:
            raise ValueError(f"the head width must be even (rotary positions of the encoder), got {self.head_dim}")
        window = self.sliding_window
        if self.retrieval_groups and window is not None and window <= self.chunk_length:
            raise ValueError(
                f"sliding_window must be larger than a chunk, so that a landmark sees its chunk and no token is lost "
                f"between window and memory: got sliding_window={window}, a chunk of {self.chunk_length} positions "
                f"(chunk_size={self.chunk_size}, landmark_source={self.landmark_source!r})"
            )

    def _check_sinks(self):
        n, window, kind = self.num_sink_tokens, self.sliding_window, self.position_encoding
        if n and (n > self.chunk_size or window is None or n > window or kind == "alibi"):
            raise ValueError(
                f"num_sink_tokens must be at most chunk_size={self.chunk_size} and sliding_window={window}, and 0 "
                f"without a window or with ALiBi, got {n} and position_encoding={kind!r}"
            )

    def _check_choices(self):
        for name, choices in (
            ("landmark_source", LANDMARK_SOURCES),
            ("landmark_slot", LANDMARK_SLOTS),
            ("residual", RESIDUALS),
            ("fusion", FUSIONS),
            ("retriever", RETRIEVERS),
            ("retrieval_by", RETRIEVAL_BY),
            ("self_attention", SELF_ATTENTIONS),
            ("position_encoding", POSITION_ENCODINGS),
            ("norm", NORMS),
            ("hidden_act", tuple(ACT2FN)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.retrieval_by == "token" and self.retriever == "fixed":
            raise ValueError('retrieval_by="token" needs a query a token, and chunks have one: got retriever="fixed"')
        if self.self_attention == "landmark" and (
            self.sliding_window is not None or self.retrieval_groups or self.landmark_source != "token"
        ):
            raise ValueError(
                'self_attention="landmark" needs sliding_window=None, retrieval_groups=[] and landmark_source="token"'
                f", got {self.sliding_window}, {self.retrieval_groups} and {self.landmark_source!r}"
            )

    def _check_numbers(self):
        for name in ("encoder_rope_theta", "initializer_range", "rms_norm_eps", "encoder_rms_norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must be in [0, 1), got {self.attention_dropout}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            tokens = getattr(self, name)
            for token in tokens if isinstance(tokens, (list, tuple)) else [tokens]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} must be in [0, {self.vocab_size}), got {token}")

    def _check_positions(self):
        kind, given = self.position_encoding, self.rope_parameters
        longest = getattr(self, "max_position_embeddings", None)
        if given is not None and kind != "rope":
            raise ValueError(f'rope_parameters need position_encoding="rope", got {kind!r}')
        if kind == "rope":
            check_rope(given or {})
            rope_type = (given or {}).get("rope_type", "default")
            if longest is None and rope_type in ("llama3", "yarn"):
                if "original_max_position_embeddings" not in given:
                    raise ValueError(f"rope_type={rope_type!r} needs original_max_position_embeddings, got {given}")
                # what the scaling stretches to, which Transformers wants to know
                longest = int(given["original_max_position_embeddings"] * given.get("factor", 1))
                self.max_position_embeddings = longest
        if (longest is not None or kind == "learned") and not _is_integer(longest, 1):
            raise ValueError(
                f"max_position_embeddings must be an integer of at least 1 (position_encoding={kind!r}), "
                f"got {longest!r}"
            )

    def to_dict(self) -> dict:
        """Return the fields; PEFT asks for them before it looks up target modules by model type."""
        register_adapter_targets(self.model_type)
        return super().to_dict()

    @property
    def num_hidden_layers(self) -> int:
        return self.num_lower_layers + sum(self.retrieval_groups)

    @property
    def cross_layers(self) -> list[int]:
        """Numbers of the layers that attend to chunks."""
        found, first = [], self.num_lower_layers
        for count in self.retrieval_groups:
            found += range(first, first + min(count, self.cross_attention_layers or count))
            first += count
        return found

    @property
    def memory_heads(self) -> int:
        """Heads of keys and values in the chunk memory, those of all layers that have their own."""
        return self.num_key_value_heads * (len(self.cross_layers) if self.keys_per_layer else 1)

    @property
    def has_landmark_tokens(self) -> bool:
        """Whether landmarks stand in the text that the decoder reads."""
        return self.landmark_source == "token" and (bool(self.retrieval_groups) or self.self_attention == "landmark")

    @property
    def grid(self) -> ChunkGrid:
        """Where chunks begin and end in the decoder."""
        return ChunkGrid(self.chunk_size, self.has_landmark_tokens)

    @property
    def chunk_length(self) -> int:
        """Positions P that a chunk takes in the decoder: its tokens, and its landmark if it stands in the text."""
        return self.grid.length

    @classmethod
    def preset(cls, name: str, **overrides) -> "DrtConfig":
        """Return the configuration of a published size; x1, x2, x3 is the number of retrievals a chunk.

        Args:
            name: `"small-x1"`, `"small-x2"` (the paper's 128M), `"medium-x1"`, `"medium-x2"` (355M), `"large-x1"`,
                `"large-x2"`, `"large-x3"` (775M). The paper prints no feed-forward widths for the last two sizes; 8/3
                of the hidden size is assumed. Its names do not count the chunk encoder.
            **overrides: Fields to change.

        Raises:
            ValueError: If there is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})

    def baseline(self, name: str) -> "DrtConfig":
        """Return the configuration of a baseline of the same width and depth.

        Args:
            name: `"sliding_window"` (no retrieval), `"sliding_window+2"` (two layers more, which pay for the chunk
                encoder), `"full_attention"`, `"random_retriever"`, `"fixed_retriever"`, `"cca"`,
                `"landmark_attention"`.

        Raises:
            ValueError: If there is no baseline of that name.
        """
        plain = {"num_lower_layers": self.num_hidden_layers, "retrieval_groups": []}
        changes = {
            "sliding_window": plain,
            "sliding_window+2": {**plain, "num_lower_layers": self.num_hidden_layers + 2},
            "full_attention": {**plain, "sliding_window": None},
            "random_retriever": {"retriever": "random"},
            "fixed_retriever": {"retriever": "fixed"},
            "cca": {"fusion": "cca"},
            "landmark_attention": {
                **plain,
                "sliding_window": None,
                "self_attention": "landmark",
                "landmark_source": "token",
            },
        }
        if name not in changes:
            raise ValueError(f"baseline must be one of {sorted(changes)}, got {name!r}")
        return type(self)(**{**self.to_dict(), **changes[name]})


__all__ = ["CODE_VERSION", "DrtConfig"]
