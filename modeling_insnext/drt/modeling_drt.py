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
all layers. Sources: DRT (ICML 2025, PMLR 267:24727), ALiBi (arXiv:2108.12409), RoPE (arXiv:2104.09864).
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
from .layers import DrtChunkEncoder, DrtLayer, decoder_norm, window_backend
from .layout import Layout, build_layout, put_in, shift_rows, take_out
from .memory import ParallelMemory
from .packing import BOUNDARIES, check_one_text
from .positions import rope_frequencies, rotary_table, slot_positions
from .retrieval import Retrieved, best_chunks, chance, chunk_weights


AUTO_MAP = {
    "AutoConfig": "configuration_drt.DrtConfig",
    "AutoModel": "modeling_drt.DrtModel",
    "AutoModelForCausalLM": "modeling_drt.DrtForCausalLM",
    "AutoModelForSequenceClassification": "modeling_drt.DrtForSequenceClassification",
}

# label smoothing of `Trainer` shifts the labels of the classes named here, and of no others
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["drt"] = "DrtForCausalLM"

# width of the frozen bag-of-tokens vectors, and what their cosine is multiplied by
FIXED_WIDTH = 64
FIXED_SHARPNESS = 10.0


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

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save weights, configuration and code: a folder for every Auto class with `trust_remote_code=True`."""
        self.config.auto_map = dict(AUTO_MAP)
        self.config.code_version = CODE_VERSION
        super().save_pretrained(save_directory, *args, **kwargs)

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
        elif isinstance(module, DrtChunkEncoder) and self.config.landmark_source == "cls":
            init.normal_(module.cls, std=std)
        elif isinstance(module, DrtModel):
            if self.config.has_landmark_tokens:
                init.normal_(module.landmark, std=std)
            if self.config.retriever == "fixed" and self.config.retrieval_groups:
                init.normal_(module.bag_of_tokens)


class DrtModel(DrtPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: DrtConfig):
        super().__init__(config)
        window_backend(config)
        D = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        if config.position_encoding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, D)
        self.rope = rope_frequencies(config) if config.position_encoding == "rope" else None
        if config.has_landmark_tokens:
            self.landmark = nn.Parameter(torch.zeros(D))
        lower, upper = config.num_lower_layers, sum(config.retrieval_groups)
        self.layers = nn.ModuleList([DrtLayer(config, i, i >= lower) for i in range(lower + upper)])
        if config.retrieval_groups:
            self.encoder = DrtChunkEncoder(config)
            if config.retriever == "learned":
                self.query_norms = nn.ModuleList(
                    [nn.RMSNorm(D, eps=config.rms_norm_eps) for _ in config.retrieval_groups]
                )
            elif config.retriever == "fixed":
                self.register_buffer("bag_of_tokens", torch.zeros(config.vocab_size, FIXED_WIDTH))
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
            check_one_text(kwargs.get("position_ids"), said, given.shape[:2], attention_mask)
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
        lower = self.config.num_lower_layers
        hidden = self._run(range(lower), hidden, layout, past, states)
        if self.config.retrieval_groups:
            memory = self._remember(hidden, input_ids, layout, past)
            first = lower
            for group, count in enumerate([] if lower_only else self.config.retrieval_groups):
                served = self._retrieve(group, hidden, layout, memory, past)
                hidden = self._run(range(first, first + count), hidden, layout, past, states, served)
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
        if input_ids is not None and not torch.compiler.is_compiling():
            low, high, size = int(input_ids.min()), int(input_ids.max()), self.config.vocab_size
            if low < 0 or high >= size:
                raise ValueError(f"input_ids must be in [0, {size}), got {low if low < 0 else high}")
        if past is not None and not hasattr(past, "memory"):
            raise ValueError(
                f"past_key_values must be a ChunkMemoryCache, got {type(past).__name__} (as prefix tuning sends; "
                "prompt tuning needs none)"
            )
        alone = past is None and not use_cache
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if past is None and use_cache:
            past = ChunkMemoryCache(self.config)
        seen = past.seen or None if past is not None else None
        if seen is not None and len(seen) != B:
            raise ValueError(f"the cache holds {len(seen)} rows, got input of {B} rows")
        real_BQ = self._real(attention_mask, B, Q, past)
        sizes = (self.config.chunk_size, self.config.has_landmark_tokens)
        layout = build_layout((B, Q), given.device, *sizes, seen, real_BQ)
        limit = self.config.max_position_embeddings
        if self.config.position_encoding == "learned" and max(layout.ends) > limit:
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
        real_BQ = attention_mask[:, columns:].bool()
        return None if real_BQ.all() else real_BQ

    def _reserve(self, past: ChunkMemoryCache, layout: Layout, embeds: torch.Tensor) -> None:
        config = self.config
        chunk_shape = (2, config.num_key_value_heads, config.chunk_size, config.head_dim)
        width = FIXED_WIDTH if config.retriever == "fixed" else config.hidden_size
        past.begin(len(embeds), chunk_shape, width, embeds.dtype, embeds.device)
        if config.retrieval_groups:
            past.memory.reserve(layout.chunks_completed)

    def _run(self, layers: range, hidden, layout: Layout, past, states, served=(None,) * 5):
        """Run layers that share a retrieval."""
        if not layers:
            return hidden
        key, value, indices, weights, phases = served
        tail = past.keys[layers[0]] if past is not None else None
        remembered = tail.places if tail is not None else 0
        window = Window(
            self.config.sliding_window,
            layout.width,
            remembered,
            tail.valid if remembered else [0] * len(hidden),
            self.config.chunk_length,
            layout.first,
            self.config.position_encoding == "alibi",
            self.rope and rotary_table(slot_positions(layout, hidden.device), *self.rope, hidden.dtype),
        )
        prepared = window_backend(self.config).prepare(window, self.config.num_attention_heads, hidden)
        for index in layers:
            hidden = self.layers[index](
                hidden, key, value, indices, weights, prepared, window, past, layout.lengths, phases
            )
            if states is not None:
                states.append(take_out(layout, hidden))
        return hidden

    def _remember(self, hidden_BLD, input_ids, layout: Layout, past):
        """Encode the chunks that this pass completes and return the memory to search."""
        config, P = self.config, self.config.chunk_length
        if config.retriever == "fixed":
            bags = put_in(layout, self.bag_of_tokens.to(hidden_BLD.dtype)[input_ids], None)
            hidden_BLD = torch.cat([hidden_BLD, bags], -1)
        fresh = past is None or not any(past.seen)
        held = 0 if past is None else past.states.places
        joined = hidden_BLD if past is None else past.states.joined(hidden_BLD)
        completed = layout.chunks_completed
        most = max(completed)
        # a whole chunk is encoded as soon as its last position is there
        starts = [held - first % P for first in layout.first]
        chunks_BCPD = shift_rows(joined, starts, most * P).unflatten(1, (most, P)) if most else None
        if past is not None:
            past.states.keep(joined, layout.lengths)
        if not most:
            return past.memory if not fresh else None
        landmarks, keys_values = self.encoder(chunks_BCPD[..., : config.hidden_size])
        if config.retriever == "fixed":
            bags = nn.functional.normalize(chunks_BCPD[..., config.hidden_size :].detach().sum(2), dim=-1)
            landmarks = bags * (FIXED_SHARPNESS * FIXED_WIDTH**0.5) ** 0.5
        if past is not None:
            place_C = torch.arange(most, device=hidden_BLD.device)
            done_BC = place_C < torch.tensor(completed, device=hidden_BLD.device)[:, None]
            past.memory.append(keys_values[done_BC].detach(), landmarks[done_BC].detach(), completed)
        return ParallelMemory(keys_values, landmarks) if fresh else past.memory

    def _retrieve(self, group: int, hidden_BLD, layout: Layout, memory, past):
        """Return what serves the slots: keys, values, indices and weights of chunks, and the slots' phases.

        Chunk t asks with the state of its last position and serves chunk t + 1: place 0 is what the cache holds for
        the chunk in progress, place j what this pass finds at the end of the j-th chunk it completes.
        """
        B, K, P = len(hidden_BLD), self.config.num_retrieved_chunks, self.config.chunk_length
        device, completed = hidden_BLD.device, layout.chunks_completed
        joined = past.retrieved_for_current(group) if past is not None else None
        if joined is None:
            wide = torch.promote_types(hidden_BLD.dtype, torch.float32)
            nothing = torch.full((B, 1, K), -1, device=device)
            joined = Retrieved(nothing, nothing.new_zeros((B, 1, K), dtype=wide))
        if max(completed):
            found = self._ask(group, hidden_BLD, layout, memory)
            joined = Retrieved(*(torch.cat(pair, 1) for pair in zip(joined, found, strict=True)))
        phases = [first % P for first in layout.first]
        spanned = max(-(-(phase + length) // P) for phase, length in zip(phases, layout.lengths, strict=True))
        serving = Retrieved(*(tensor[:, :spanned] for tensor in joined))
        if memory is None or not memory.total:
            read = self._nothing(hidden_BLD, serving)
        elif spanned == 1 and past is not None and memory is past.memory:
            read = past.read(group, serving)
        else:
            read = memory.read(serving.chunks_BCK)
        if past is not None:
            past.keep_retrieved(group, Retrieved(*(tensor.detach() for tensor in joined)), completed)
        return (*read, serving.weights_BCK, None if spanned == 1 else phases)

    def _nothing(self, hidden_BLD, serving: Retrieved):
        """Return one empty chunk: before the first chunk is complete there is nothing to read."""
        config = self.config
        shape = (1, config.num_key_value_heads, 1, config.chunk_size, config.head_dim)
        empty = hidden_BLD.new_zeros(shape)
        return empty, empty, serving.chunks_BCK

    def _ask(self, group: int, hidden_BLD, layout: Layout, memory) -> Retrieved:
        """Retrieve for every chunk that this pass completes."""
        P, D = self.config.chunk_length, hidden_BLD.shape[-1]
        device, completed = hidden_BLD.device, layout.chunks_completed
        place_C = torch.arange(max(completed), device=device)
        done_BC = place_C < torch.tensor(completed, device=device)[:, None]
        begun_B1 = torch.tensor(layout.chunks_begun, device=device)[:, None]
        asking_BC = torch.where(done_BC, begun_B1 + place_C, 0)
        first_B1 = torch.tensor(layout.first, device=device)[:, None]
        slot_BC = ((begun_B1 + place_C + 1) * P - 1 - first_B1).clamp_max(layout.width - 1)
        noisy = self.training
        K = self.config.num_retrieved_chunks
        if self.config.retriever == "random":
            with torch.no_grad():
                chunks_BCK = best_chunks(self._lottery(asking_BC, group, noisy), asking_BC, memory.total, K)
            scores_BCK = torch.zeros_like(chunks_BCK, dtype=torch.float32)
            return Retrieved(chunks_BCK, chunk_weights(scores_BCK, chunks_BCK).to(hidden_BLD.dtype))
        if self.config.retriever == "fixed":
            queries_BCD = memory.landmarks_of(asking_BC[..., None])[:, :, 0]
        else:
            state_BCD = hidden_BLD.gather(1, slot_BC[..., None].expand(-1, -1, D))
            queries_BCD = self.query_norms[group](state_BCD)
        with torch.no_grad():
            chunks_BCK = memory.find(queries_BCD, asking_BC, K, noisy and self.config.retriever == "learned")
        landmarks_BCKD = memory.landmarks_of(chunks_BCK)
        wide = torch.promote_types(queries_BCD.dtype, torch.float32)
        scores_BCK = torch.einsum("bcd,bckd->bck", queries_BCD.to(wide), landmarks_BCKD.to(wide))
        return Retrieved(chunks_BCK, chunk_weights(scores_BCK * queries_BCD.shape[-1] ** -0.5, chunks_BCK))

    @staticmethod
    def _lottery(asking_BC, group: int, noisy: bool):
        """Return the scores of the random retriever: drawn anew in training, otherwise always the same."""

        def score(start, stop):
            number = torch.arange(start, stop, device=asking_BC.device)
            scores = chance(asking_BC, number, group)
            return torch.rand_like(scores) if noisy else scores

        return score


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
        last_B = torch.full((len(hidden),), hidden.shape[1] - 1, device=hidden.device)
        if attention_mask is not None:
            new_BQ = attention_mask[:, -hidden.shape[1] :].long()
            last_B = (new_BQ * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)).argmax(1)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


__all__ = ["DrtForCausalLM", "DrtForSequenceClassification", "DrtModel", "DrtPreTrainedModel"]
