"""PyTorch DRT: a left-to-right transformer whose upper layers read chunks of the past that it retrieves itself.

Shape suffixes: B rows, Q columns of the input, L slots (tokens and landmarks, layout), C chunks that ask, K chunks
found, N chunks in memory, H query heads, G key heads, S tokens a chunk, P positions a chunk, D width.

    tokens -> landmarks put in -> lower layers --+-- chunk encoder -> landmark l_i, keys K_i, values V_i of chunk i
                                                 |
                                                 +-- group 0: retrieve, its layers -- group 1: retrieve, ... -> head

A lower layer is h + Attention(RMSNorm(h)), then h + SwiGLU(RMSNorm(h)). A layer of group g has between them

    a = h + Attention(RMSNorm(h));  c = GCA(RMSNorm(a));  h' = a + SwiGLU(RMSNorm(a + c))

where GCA of a token in chunk t + 1 is sum_i w_i softmax(q K_i^T / sqrt(d)) V_i over the chunks that chunk t found:
r_i = <RMSNorm_g(h at the end of t), l_i> / sqrt(D) for i < t, the K best, w their softmax. K_i and V_i are shared by
all layers unless `keys_per_layer`. Sources: DRT (ICML 2025, PMLR 267:24727), ALiBi (arXiv:2108.12409), RoPE
(arXiv:2104.09864).
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .attention import Window
from .cache import ChunkMemoryCache
from .checkpoint import CheckedLoadingMixin
from .configuration_drt import CODE_VERSION, DrtConfig
from .generation_drt import DrtGenerationMixin
from .layers import DrtChunkEncoder, DrtCrossAttention, DrtLayer, Pass, decoder_norm, window_backend
from .layout import Layout, build_layout, put_in, shift_rows, take_out
from .memory import ParallelMemory
from .packing import BOUNDARIES, check_one_text
from .positions import slot_positions
from .retriever import RETRIEVERS
from .rope import rope_of


AUTO_MAP = {
    "AutoConfig": "configuration_drt.DrtConfig",
    "AutoModel": "modeling_drt.DrtModel",
    "AutoModelForCausalLM": "modeling_drt.DrtForCausalLM",
    "AutoModelForSequenceClassification": "modeling_drt.DrtForSequenceClassification",
}

# label smoothing of `Trainer` shifts the labels of the classes named here, and of no others
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["drt"] = "DrtForCausalLM"


class DrtPreTrainedModel(CheckedLoadingMixin, PreTrainedModel):
    config: DrtConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DrtLayer", "DrtChunkEncoder"]
    _skip_keys_device_placement = ["past_key_values", "past"]
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # decoder and head are taken from language models as well
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save weights, configuration and code: a folder for every Auto class with `trust_remote_code=True`."""
        self.config.auto_map = dict(AUTO_MAP)
        self.config.code_version = CODE_VERSION
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_encoder(self, modality: str | None = None):
        """Return the model itself, as decoders do: the encoder of chunks reads no text."""
        return self

    def _supports_default_dynamic_cache(self):
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, DrtCrossAttention) and self.config.gated_retrieval:
            init.ones_(module.gate)
        elif isinstance(module, DrtChunkEncoder) and self.config.landmark_source == "cls":
            init.normal_(module.cls, std=std)
        elif isinstance(module, DrtModel):
            if self.config.has_landmark_tokens:
                init.normal_(module.landmark, std=std)
            if module.retriever is not None:
                module.retriever.init_weights(module)


class DrtModel(DrtPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: DrtConfig):
        super().__init__(config)
        window_backend(config)
        D = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        if config.position_encoding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, D)
        self.rope = rope_of(config) if config.position_encoding == "rope" else None
        if config.has_landmark_tokens:
            self.landmark = nn.Parameter(torch.zeros(D))
        self.layers = nn.ModuleList([DrtLayer(config, i) for i in range(config.num_hidden_layers)])
        self.retriever = RETRIEVERS[config.retriever](config) if config.retrieval_groups else None
        if self.retriever is not None:
            self.encoder = DrtChunkEncoder(config)
            self.retriever.add_weights(self)
        self.norm = decoder_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: ChunkMemoryCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        lower_only: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Encode text left to right.

        Args:
            input_ids: Token ids `[B, Q]`, the new ones behind a cache.
            attention_mask: 1 on tokens, 0 on padding, `[B, Q]`; behind a cache `[B, columns + Q]`. Padding may stand
                anywhere; chunks are counted over a row's own tokens.
            past_key_values: What a call with `use_cache=True` returned; no gradient flows into its chunks.
            inputs_embeds: Embeddings `[B, Q, D]` in the place of `input_ids` (not with `retriever="fixed"`).
            use_cache: Whether to return a cache; by default `config.use_cache`, but not in training.
            output_hidden_states: Whether to return the states of all layers, at the tokens.
            lower_only: Run the lower layers and fill the chunk memory only; `last_hidden_state` is `None`.
            **kwargs: `position_ids` `[B, Q]`, which must count the tokens of a row, and what any model may get.

        Returns:
            `last_hidden_state` `[B, Q, D]`, zero on padding.

        Raises:
            ValueError: If ids lie outside the vocabulary, the mask has another shape than the tokens, a row has no
                token and no cache is given or asked for, the cache holds another number of rows, or a row holds
                several texts.
            OSError: If the chunk memory cannot grow on disk; the cache is unchanged.
        """
        _refuse_unknown(kwargs)
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None:
            said = {name: kwargs.get(name) for name in BOUNDARIES}
            first = 0 if self.config.position_encoding == "learned" and past_key_values is None else None
            check_one_text(kwargs.get("position_ids"), said, given.shape[:2], attention_mask, first)
        layout, past = self._begin(input_ids, inputs_embeds, attention_mask, past_key_values, use_cache)
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past is not None:
            if self.gradient_checkpointing and self.training:
                raise ValueError("use_cache must be False under gradient checkpointing: layers run twice, got True")
            self._reserve(past, layout, embeds)
            if layout.width == 0:
                past.advance(layout, embeds.shape[1])
                return BaseModelOutputWithPast(last_hidden_state=torch.zeros_like(embeds), past_key_values=past)
        hidden = put_in(layout, embeds, self.landmark if self.config.has_landmark_tokens else None)
        entering = embeds
        if self.config.position_encoding == "learned":
            last = self.config.max_position_embeddings - 1
            hidden = hidden + self.embed_positions(slot_positions(layout, hidden.device).clamp_max(last))
            entering = take_out(layout, hidden)
        states = [entering] if output_hidden_states or self.config.output_hidden_states else None
        first = self.config.num_lower_layers
        carried = self._carry(layout, past, hidden)
        hidden = self._run(range(first), hidden, carried, states)
        if self.retriever is not None:
            memory = self._remember(hidden, input_ids, layout, past)
            for group, count in enumerate([] if lower_only else self.config.retrieval_groups):
                served = self.retriever.retrieve(self, group, hidden, layout, memory, past)
                hidden = self._run(range(first, first + count), hidden, carried._replace(served=served), states)
                first += count
        if past is not None:
            past.advance(layout, embeds.shape[1])
        if lower_only:
            return BaseModelOutputWithPast(last_hidden_state=None, past_key_values=past)
        last = take_out(layout, self.norm(hidden))
        if states is not None:
            states[-1] = last
        return BaseModelOutputWithPast(
            last_hidden_state=last, past_key_values=past, hidden_states=None if states is None else tuple(states)
        )

    def _begin(self, input_ids, inputs_embeds, attention_mask, past, use_cache) -> tuple[Layout, ChunkMemoryCache]:
        """Check the input and return where its tokens stand, and the cache to fill."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        given = input_ids if inputs_embeds is None else inputs_embeds
        B, Q = given.shape[:2]
        if 0 in (B, Q):
            raise ValueError(f"there must be at least one token, got input of shape {list(given.shape)}")
        if inputs_embeds is not None and self.config.retriever == "fixed" and self.config.retrieval_groups:
            raise ValueError('retriever="fixed" reads token ids, got inputs_embeds')
        if past is not None and not hasattr(past, "memory"):
            raise ValueError(
                f"past_key_values must be a ChunkMemoryCache, got {type(past).__name__} (as prefix tuning sends; "
                "prompt tuning needs none)"
            )
        alone = past is None and not use_cache
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if past is None and use_cache:
            past = ChunkMemoryCache(self.config)
        if past is not None:
            past.check(self.config, self.dtype if inputs_embeds is None else inputs_embeds.dtype, B)
        real_BQ = self._real(attention_mask, B, Q, past)
        new, real_BQ = self._count(input_ids, real_BQ, B, Q, past)
        seen = (past.seen if past is not None else None) or [0] * len(new)
        layout = build_layout((B, Q), given.device, self.config.grid, seen, new, real_BQ)
        learned = self.config.position_encoding == "learned"
        if learned and max(layout.ends) > (limit := self.config.max_position_embeddings):
            raise ValueError(
                f"with learned positions a text holds at most max_position_embeddings={limit}, got {max(layout.ends)}"
            )
        if alone and 0 in layout.lengths:
            raise ValueError(f"every row needs at least one token, got rows of {layout.lengths} positions")
        return layout, past

    def _real(self, attention_mask, B, Q, past) -> torch.Tensor | None:
        if attention_mask is None:
            return None
        columns = past.columns if past is not None else 0
        if attention_mask.shape != (B, columns + Q):
            raise ValueError(f"attention_mask must be [{B}, {columns + Q}], got {list(attention_mask.shape)}")
        return attention_mask[:, columns:].bool()

    def _count(self, input_ids, real_BQ, B, Q, past) -> tuple[list[int], torch.Tensor | None]:
        """Check the ids and return how many tokens each row brings, and the mask if it hides any of them.

        The device is asked once for everything. A graph cannot ask: there every row counts as full, which without a
        cache is as good.
        """
        in_graph = torch.compiler.is_compiling()
        if in_graph and past is None:
            return [Q], real_BQ
        ids = [] if input_ids is None or in_graph else [x[None] for x in input_ids.aminmax()]
        counts = [] if real_BQ is None else [real_BQ.sum(1)]
        facts = torch.cat([*ids, *counts]).tolist() if ids or counts else []
        if ids:
            low, high, *facts = facts
            if low < 0 or high >= self.config.vocab_size:
                outside = low if low < 0 else high
                raise ValueError(f"input_ids must be in [0, {self.config.vocab_size}), got {outside}")
        if all(count == Q for count in facts):
            return [Q] * (1 if past is None else B), None
        return facts, real_BQ

    def _reserve(self, past: ChunkMemoryCache, layout: Layout, embeds: torch.Tensor) -> None:
        config = self.config
        chunk_shape = (2, config.memory_heads, config.chunk_size, config.head_dim)
        width = config.hidden_size if self.retriever is None else self.retriever.landmark_width
        past.expect(embeds.shape[1])
        past.begin(len(embeds), chunk_shape, width, embeds.dtype, embeds.device)
        if self.retriever is not None:
            past.memory.reserve(layout.chunks_completed)

    def _carry(self, layout: Layout, past: ChunkMemoryCache | None, hidden: torch.Tensor) -> Pass:
        """Return what all layers share that remember as much as the first one."""
        rotary = self.rope and self.rope.turns(slot_positions(layout, hidden.device)[:, None], hidden.dtype)
        config, alibi = self.config, self.config.position_encoding == "alibi"
        window = Window(
            config.sliding_window,
            layout.width,
            0,
            [],
            config.chunk_length,
            layout.first,
            alibi,
            rotary,
            config.num_sink_tokens,
        )
        return self._windowed(Pass(layout, past, window, None), 0, hidden)

    def _windowed(self, carried: Pass, layer: int, hidden: torch.Tensor) -> Pass:
        """Return what is carried with the window of a layer; after a lower-only prefill upper ones remember less."""
        tail = carried.past.keys[layer] if carried.past is not None else None
        remembered = tail.places if tail is not None else 0
        memory = tail.valid if remembered else [0] * len(carried.layout.first)
        window = carried.window._replace(remembered=remembered, memory=memory)
        if carried.prepared is not None and (remembered, memory) == (carried.window.remembered, carried.window.memory):
            return carried
        prepared = window_backend(self.config).prepare(window, self.config.num_attention_heads, hidden)
        return carried._replace(window=window, prepared=prepared)

    def _run(self, layers: range, hidden: torch.Tensor, carried: Pass, states: list | None) -> torch.Tensor:
        """Run layers that share a retrieval."""
        if not layers:
            return hidden
        carried = self._windowed(carried, layers[0], hidden)
        tensors = () if carried.served is None else carried.served[:3]
        for index in layers:
            hidden = self.layers[index](hidden, carried, *tensors)
            if states is not None:
                states.append(take_out(carried.layout, hidden))
        return hidden

    def _remember(self, hidden_BLD, input_ids, layout: Layout, past):
        """Encode the chunks that this pass completes and return the memory to search."""
        P, D = self.config.chunk_length, self.config.hidden_size
        beside_BLW = self.retriever.beside(self, input_ids, layout, hidden_BLD.dtype)
        if beside_BLW is not None:
            hidden_BLD = torch.cat([hidden_BLD, beside_BLW], -1)
        fresh = past is None or not any(past.seen)
        held = 0 if past is None else past.states.places
        joined = hidden_BLD if past is None else past.states.joined(hidden_BLD)
        completed = layout.chunks_completed
        most = max(completed)
        # a whole chunk is encoded as soon as its last position is there
        starts = [held - phase for phase in layout.phases]
        chunks_BCPD = shift_rows(joined, starts, most * P).unflatten(1, (most, P)) if most else None
        if past is not None:
            past.states.keep(joined, layout.lengths)
        if not most:
            return past.memory if not fresh else None
        landmarks, keys_values = self.encoder(chunks_BCPD[..., :D])
        landmarks = self.retriever.landmarks(landmarks, chunks_BCPD[..., D:])
        if past is not None:
            place_C = torch.arange(most, device=hidden_BLD.device)
            done_BC = place_C < torch.tensor(completed, device=hidden_BLD.device)[:, None]
            past.memory.append(keys_values[done_BC].detach(), landmarks[done_BC].detach(), completed)
        return ParallelMemory(keys_values, landmarks) if fresh else past.memory


# what Transformers and its Trainer may pass to any model, and what this one has no use for
PASSED_TO_ANY_MODEL = (
    "output_attentions",
    "return_dict",
    "cache_position",
    "position_ids",
    "num_items_in_batch",
    "tokenizer",
    "assistant_tokenizer",
    *BOUNDARIES,
)


def _refuse_unknown(kwargs: dict) -> None:
    """Raise a `TypeError` for a misspelt argument, a `ValueError` for one that this model cannot serve."""
    unknown = sorted(set(kwargs) - set(PASSED_TO_ANY_MODEL))
    if unknown:
        raise TypeError(f"forward has no argument {', '.join(map(repr, unknown))}")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions must be False: attention is computed in blocks and never held, got True")


def next_labels(labels_BQ: torch.Tensor, mask_BQ: torch.Tensor | None) -> torch.Tensor:
    """Return for every token the label of the row's next one, -100 for its last one and on padding."""
    if mask_BQ is None:
        return nn.functional.pad(labels_BQ[:, 1:], (0, 1), value=-100)
    real_BQ = mask_BQ.bool()
    # a row's own tokens first, in their order
    column_BQ = (~real_BQ).long().argsort(dim=1, stable=True)
    own_BQ = labels_BQ.masked_fill(~real_BQ, -100).gather(1, column_BQ)
    return torch.full_like(labels_BQ, -100).scatter(1, column_BQ, next_labels(own_BQ, None))


def causal_lm_loss(logits_BQV, targets_BQ, num_items_in_batch: int | torch.Tensor | None) -> torch.Tensor:
    """Return the cross entropy in float32 or wider over `num_items_in_batch`, by default the number of targets.

    Without any target it is 0, whatever the number.
    """
    wide = torch.promote_types(logits_BQV.dtype, torch.float32)
    total = nn.functional.cross_entropy(
        logits_BQV.flatten(0, 1).to(wide), targets_BQ.flatten().to(logits_BQV.device), reduction="sum"
    )
    count = (targets_BQ != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp_min(1)


class DrtForCausalLM(DrtPreTrainedModel, DrtGenerationMixin):
    """DRT with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: DrtConfig):
        super().__init__(config)
        self.model = DrtModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: ChunkMemoryCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return next-token logits `[B, Q, V]`.

        Args:
            input_ids: See :class:`DrtModel`.
            attention_mask: See :class:`DrtModel`.
            past_key_values: See :class:`DrtModel`.
            inputs_embeds: See :class:`DrtModel`.
            labels: Ids `[B, Q]`, -100 where there is no loss; shifted inside, as for every causal language model, and
                over a row's own tokens: what stands in front of padding predicts what stands behind it.
            use_cache: See :class:`DrtModel`.
            logits_to_keep: How many last positions get logits (0: all), or which.
            output_hidden_states: See :class:`DrtModel`.
            num_items_in_batch: Divisor of the loss; by default the number of supervised tokens.
            **kwargs: `shift_labels`, the label of each next token `[B, Q]` in the place of `labels`; and what
                :class:`DrtModel` takes.

        Raises:
            ValueError: See :class:`DrtModel`; also if labels come with `logits_to_keep`, have another shape than the
                tokens, or lie outside the vocabulary.
        """
        # not in the signature, where Trainer would take it for a label that every batch must have
        shift_labels = kwargs.pop("shift_labels", None)
        _refuse_unknown(kwargs)
        given = input_ids if inputs_embeds is None else inputs_embeds
        for sent in (labels, shift_labels):
            if sent is not None:
                self._check_labels(sent, given, logits_to_keep)
        outputs = self.model(
            input_ids,
            attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if shift_labels is not None:
            loss = causal_lm_loss(logits, shift_labels, num_items_in_batch)
        elif labels is not None:
            targets = next_labels(labels, None if attention_mask is None else attention_mask[:, -labels.shape[1] :])
            loss = causal_lm_loss(logits, targets, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _check_labels(self, labels: torch.Tensor, given: torch.Tensor | None, logits_to_keep) -> None:
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(f"labels need the logits of all tokens, got logits_to_keep={logits_to_keep}")
        if given is not None and labels.shape != given.shape[:2]:
            raise ValueError(f"labels must be {list(given.shape[:2])}, one a token, got {list(labels.shape)}")
        if not torch.compiler.is_compiling():
            wrong = labels[(labels != -100) & ((labels < 0) | (labels >= self.vocab_size))]
            if len(wrong):
                raise ValueError(f"labels must be in [0, {self.vocab_size}) or -100, got {int(wrong[0])}")


class DrtForSequenceClassification(DrtPreTrainedModel):
    """Class of a text, or with one label a number, read off its last token."""

    accepts_loss_kwargs = False

    def __init__(self, config: DrtConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DrtModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Return logits `[B, num_labels]`; with labels `[B]` the loss that `config.problem_type` names.

        Without an `attention_mask` every column is text.
        """
        _refuse_unknown(kwargs)
        outputs = self.model(
            input_ids,
            attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last_B = torch.full((hidden.shape[0],), hidden.shape[1] - 1, device=hidden.device)
        if attention_mask is not None:
            new_BQ = attention_mask[:, -hidden.shape[1] :].long()
            last_B = (new_BQ * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)).argmax(1)
        logits = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


__all__ = ["DrtForCausalLM", "DrtForSequenceClassification", "DrtModel", "DrtPreTrainedModel"]
