"""PyTorch InsNeXt: a transformer that writes text by insertion, one exact cached step a token.

Shape suffixes: B rows, Q new tokens, K keys (cached and new), N tokens of an insertion sequence, T of a text, D hidden
size, V vocabulary size. Notation, intervals and offsets: attention. Slots, STOP and the losses: slots.

A block is h + Attention(RMSNorm(h)), then h + SwiGLU(RMSNorm(h)), without biases; other forms: layers.

Sources: InsNet (arXiv:2102.11008), InsNeXt (OpenReview moqBBpMZ8w), ALiBi (arXiv:2108.12409).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import (
    Interval,
    alibi_slopes,
    build_interval,
    insertion_offsets,
    interval_backend,
    visible_keys,
)
from .cache import InsertionCache
from .checkpoint import CheckedLoadingMixin
from .configuration_insnext import CODE_VERSION, InsNextConfig
from .document import DocumentMixin
from .generation_configuration import InsertionGenerationConfig
from .generation_insnext import InsertionGenerationMixin
from .layers import InsNextAttention, InsNextBlock, block_norm
from .packing import BOUNDARIES, LONGEST, packed_starts, with_packed_texts
from .rope import rope_of
from .rotary import ROTARY_BACKENDS
from .rotary_step import is_step, rotary_step
from .scoring import InsertionScoringMixin
from .slot_losses import divisor, insertion_losses, mean_losses
from .slots import InsNextSlotHead
from .supervision import Supervision, check_supervision, next_tokens


AUTO_MAP = {
    "AutoModel": "modeling_insnext.InsNextModel",
    "AutoModelForCausalLM": "modeling_insnext.InsNextForInsertionLM",
    "AutoModelForMultipleChoice": "modeling_insnext.InsNextForMultipleChoice",
    "AutoModelForSequenceClassification": "modeling_insnext.InsNextForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_insnext.InsNextForTokenClassification",
}


class InsNextPreTrainedModel(CheckedLoadingMixin, PreTrainedModel):
    config: InsNextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InsNextBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": InsNextBlock, "attentions": InsNextAttention}
    # encoder and heads are taken from language models as well
    _keys_to_ignore_on_load_unexpected = [r"^slot_head\.", r"^lm_head\."]

    @property
    def device(self) -> torch.device:
        """Where tokens go: to the embeddings or, where accelerate keeps those elsewhere, to where they are used."""
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None)
        execution_device = getattr(hook, "execution_device", None)
        return super().device if execution_device is None else torch.device(execution_device)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save weights, configuration and code: a folder for every Auto class with `trust_remote_code=True`."""
        self.config.auto_map = {"AutoConfig": "configuration_insnext.InsNextConfig", **AUTO_MAP}
        self.config.code_version = CODE_VERSION
        super().save_pretrained(save_directory, *args, **kwargs)

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
        elif isinstance(module, InsNextSlotHead):
            init.normal_(module.edge, std=std)
            init.normal_(module.stop_key, std=std)
        elif isinstance(module, InsNextAttention) and self.config.position_encoding == "sinusoidal":
            init.zeros_(module.content_bias)
            init.zeros_(module.offset_bias)
        elif isinstance(module, InsNextBlock) and self.config.norm == "deepnorm":
            gain = (8 * self.config.num_hidden_layers) ** -0.25
            attention, mlp = module.self_attn, module.mlp
            for linear in (attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                if linear is not None:
                    init.normal_(linear.weight, std=std * gain)


# what Transformers and its Trainer may pass to any model, and what this one has no use for
PASSED_TO_ANY_MODEL = (
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "cache_position",
    "num_items_in_batch",
    "tokenizer",
    "assistant_tokenizer",
)


NO_DIRECTION = (
    "the encoder of a language model reads causally or as a whole: is_causal must be True or False, got None. A loss "
    "that takes lm_head(hidden) past forward (fused or chunked cross-entropy, the trainers of trl >= 1.7) would train "
    "another function, as lm_head takes the states of slots: train on the loss of forward(labels=...), as Trainer does"
)


def _refuse_unknown(kwargs: dict) -> None:
    """Raise a `TypeError` for a misspelt argument, which would otherwise do nothing."""
    unknown = sorted(set(kwargs) - set(PASSED_TO_ANY_MODEL))
    if unknown:
        raise TypeError(f"forward has no argument {', '.join(map(repr, unknown))}")


class InsNextModel(InsNextPreTrainedModel):
    """The encoder. Alone it reads its whole input as given text: every token sees every token of its row."""

    # whether `is_causal` has no default: callers of a language model's encoder may take either for granted
    must_say_direction = False

    def __init__(self, config: InsNextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InsNextBlock(config, i) for i in range(config.num_hidden_layers)])
        self.embed_norm = block_norm(config) if config.embedding_norm else None
        # the last block of a post-norm model like BERT ends with its norm
        self.norm = nn.Identity() if config.norm == "post_layernorm" else block_norm(config)
        self.rope = rope_of(config) if config.position_encoding == "rotary" else None
        # numbers, as in `Rope`
        self.slopes = alibi_slopes(config.num_attention_heads, config.alibi_slope_ratio, "cpu").tolist()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        positions: torch.LongTensor | None = None,
        context_length: int | torch.LongTensor | None = None,
        start: torch.LongTensor | None = None,
        horizon: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        is_causal: bool | None = None,
        interval: Interval | None = None,
        advance_cache: bool = True,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Encode tokens that stand in insertion order.

        Args:
            input_ids: Token ids `[B, Q]`, in insertion order.
            attention_mask: 1 on tokens, 0 on padding, `[B, K]`, ones contiguous; with an `InsertionCache` `[B, Q]`,
                for the new tokens alone, padded on the right.
            positions: Integers `[B, K]` whose order is the text's order, for cached and new tokens; `None`: as stored.
            context_length: Number c of leading tokens that see one another, an integer or `[B]`; the others see what
                came before them. Excludes `horizon`.
            start: First visible key of each new token `[B, Q]`.
            horizon: Last visible key of each new token `[B, Q]`; by default the last token of the row.
            past_key_values: An `InsertionCache`, or any cache of Transformers for rows that grow alike.
            inputs_embeds: Embeddings `[B, Q, D]` in the place of `input_ids`.
            position_ids: Integers `[B, Q]` or `[1, Q]` that rise by one along a text and begin anew where the next
                text of a row begins: packed texts, which do not see one another. `cu_seq_lens_q`, `cu_seq_lens_k`,
                `max_length_q`, `max_length_k` and `seq_idx` may say the same beside them.
            use_cache: Whether to make a cache where none is given (with `is_causal` only).
            is_causal: Whether the default horizon is the token itself; by default it is not. The encoder inside
                :class:`InsNextForInsertionLM` has no default where no other argument says who sees whom.
            interval: Who sees whom, in the place of all arguments that say so, for callers that have checked their
                input.
            advance_cache: Whether to count the new tokens in an `InsertionCache`.

        Raises:
            ValueError: If ids lie outside the vocabulary, the text is longer than `max_position_embeddings`, a horizon
                lies below its query, positions of a text are tied, the mask has holes, `position_ids` are no texts, or
                nothing says whether the encoder of a language model reads causally.
        """
        said = {name: kwargs.pop(name) for name in (*BOUNDARIES, *LONGEST) if name in kwargs}
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        device = (input_ids if inputs_embeds is None else inputs_embeds).device
        if use_cache and is_causal and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if interval is None:
            fields = {"positions": positions, "context_length": context_length, "start": start, "horizon": horizon}
            said_otherwise = isinstance(past_key_values, InsertionCache) or any(x is not None for x in fields.values())
            if self.must_say_direction and is_causal is None and not said_otherwise:
                raise ValueError(NO_DIRECTION)
            fields |= {"attention_mask": attention_mask, "past": past_key_values, "is_causal": bool(is_causal)}
            interval = self.checked_interval(input_ids, shape, device, position_ids, said, **fields)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embed_norm is not None:
            hidden_states = self.embed_norm(hidden_states)
        prepared = self._prepare(interval, hidden_states, past_key_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=prepared, past_key_values=past_key_values)
        if advance_cache and isinstance(past_key_values, InsertionCache):
            past_key_values.advance(shape[1], None if attention_mask is None else attention_mask.long().sum(1))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def checked_interval(self, input_ids, shape, device, position_ids=None, said=None, **fields) -> Interval:
        """Return `build_interval(shape, device, **fields)` once ids, length, mask, horizons and positions are checked.

        `position_ids` and what else is `said` of packed texts go into the fields.
        """
        if input_ids is not None and input_ids.numel() and not torch.compiler.is_compiling():
            low, high, size = int(input_ids.min()), int(input_ids.max()), self.config.vocab_size
            if low < 0 or high >= size:
                raise ValueError(f"ids must be in the model's vocabulary [0, {size}), got {low if low < 0 else high}")
        interval = build_interval(shape, device, **with_packed_texts(shape, position_ids, said or {}, fields))
        length, limit = interval.positions_BK.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"a text holds at most max_position_embeddings={limit} tokens, got {length}")
        return interval

    def _prepare(self, interval: Interval, hidden_states: torch.Tensor, past: Cache | None):
        name, encoding = self.config._attn_implementation, self.config.position_encoding
        # a block of one token has no right side
        causal_blocks = self.config.block_attention == "causal" and interval.entries_BQ.shape[1] > 1
        # what `_replace` makes, the compiler of PyTorch 2.9 cannot carry over a graph break
        interval = Interval(**{**interval._asdict(), "causal_blocks": causal_blocks})
        if encoding != "alibi" and name not in ("eager", "sdpa"):
            raise ValueError(f'position_encoding="{encoding}" needs attn_implementation eager or sdpa, got {name!r}')
        if encoding == "sinusoidal":
            return insertion_offsets(interval), visible_keys(interval)
        if encoding == "rotary":
            if name == "sdpa" and is_step(interval, past):
                return rotary_step(interval, self.rope, hidden_states.dtype, past)
            if isinstance(past, InsertionCache):
                # what is written now is not among them
                past.turned = None
            return ROTARY_BACKENDS[name](interval, self.rope, hidden_states.dtype)
        slopes = torch.tensor(self.slopes, dtype=torch.float64, device=hidden_states.device)
        return interval_backend(name).prepare(interval, slopes, hidden_states.dtype)


@dataclass
class InsNextLMOutput(ModelOutput):
    """Output of :class:`InsNextForInsertionLM`.

    Attributes:
        loss: Position and token loss, nats per inserted token (left to right: nats per token).
        logits: Log-probabilities `[B, T, V]` of the next token to the right, STOP in the EOS column; only left to
            right.
        past_key_values: The cache, if one was used.
        hidden_states: Of every layer, if asked for.
        attentions: Of every layer, if asked for.
        position_loss: -log p(slot or STOP) per inserted token, unweighted, without gradient.
        token_loss: -log p(token | slot) per inserted token, unweighted, without gradient.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    position_loss: torch.FloatTensor | None = None
    token_loss: torch.FloatTensor | None = None


class InsNextForInsertionLM(InsNextPreTrainedModel, InsertionGenerationMixin, InsertionScoringMixin, DocumentMixin):
    """InsNeXt with slots: writes text by insertion; left to right it is an ordinary causal language model.

    `lm_head` takes the states of slots (:meth:`token_logits`), not hidden states: `logits` of `forward` are
    log-probabilities that no `lm_head(hidden)` gives.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected = None
    generation_config_class = InsertionGenerationConfig

    def __init__(self, config: InsNextConfig):
        super().__init__(config)
        # the loss reads labels from the second on, here as in any causal language model: `Trainer` counts those
        self.loss_type = "ForCausalLM"
        self.model = InsNextModel(config)
        self.model.must_say_direction = True
        self.slot_head = InsNextSlotHead(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        positions: torch.LongTensor | None = None,
        context_length: int | torch.LongTensor | None = None,
        start: torch.LongTensor | None = None,
        horizon: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        stop_targets: torch.BoolTensor | None = None,
        target_kinds: torch.LongTensor | None = None,
        unit_starts: torch.BoolTensor | None = None,
        step_weights: torch.FloatTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> InsNextLMOutput:
        """Score one whole insertion sequence a row in one pass, or, without `positions`, text from left to right.

        Args:
            input_ids: Token ids `[B, N]`, in insertion order.
            attention_mask: 1 on tokens, 0 on padding.
            positions: Integers `[B, N]` whose order is the text's order. `None`: a causal language model from left to
                right.
            context_length: Number of leading tokens that are given, an integer or `[B]`.
            start: First token of each token's text `[B, N]`, for several texts packed in a row.
            horizon: Last token encoded together with each token `[B, N]`; excludes `context_length`.
            labels: Which tokens are trained on, `[B, N]`: `input_ids`, or -100 to leave one out. Left to right as in
                any causal language model; EOS there is STOP, and BOS and a text's first token count as -100.
            stop_targets: True at the last token of a text that really ends there, `[B, N]`; by default at every
                text's.
            target_kinds: How the place of each token is supervised, `[B, N]` of :class:`TargetKind`: 0 by its slot, 1
                by the number of units missing in every slot, 2 by every slot with something missing alike.
            unit_starts: True at the first token of a unit (a word), `[B, N]`; needed for kinds 1 and 2.
            step_weights: Weight of each token's loss `[B, N]`, 1 by default.
            past_key_values: A cache; see :class:`InsNextModel`.
            inputs_embeds: Embeddings in the place of `input_ids`.
            position_ids: Left to right: packed texts, see :class:`InsNextModel`.
            use_cache: Whether to return a cache.
            logits_to_keep: Left to right: how many last positions get logits (0 all), or which.
            num_items_in_batch: Divisor of the loss; by default the number of supervised tokens.
            **kwargs: `shift_labels`, left to right the label of each next token `[B, N]` in the place of `labels`;
                and what :class:`InsNextModel` takes.

        Raises:
            ValueError: See :class:`InsNextModel`; also if training fields come without `positions` or labels or have
                another shape than the tokens, or if a label is structure, no token, or with `positions` not the token
                itself.
        """
        left_to_right = positions is None
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        given = input_ids if inputs_embeds is None else inputs_embeds
        supervision = Supervision(labels, stop_targets, target_kinds, unit_starts, step_weights)
        # not in the signature, where Trainer would take it for a label that every batch must have
        shift_labels = kwargs.pop("shift_labels", None)
        check_supervision(supervision, shift_labels, given, left_to_right, num_items_in_batch)
        has_targets = labels is not None or shift_labels is not None
        if has_targets and left_to_right and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(f"labels need the logits of all tokens, got logits_to_keep={logits_to_keep}")
        interval = self.model.checked_interval(
            input_ids,
            given.shape[:2],
            given.device,
            position_ids,
            {name: kwargs.pop(name) for name in (*BOUNDARIES, *LONGEST) if name in kwargs},
            attention_mask=attention_mask,
            positions=positions,
            context_length=context_length,
            start=start,
            horizon=horizon,
            past=past_key_values,
            is_causal=True,
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache if left_to_right else False,
            is_causal=True,
            interval=interval,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = position = token = None
        if left_to_right:
            logits = self._left_to_right_logits(hidden, logits_to_keep)
            if has_targets:
                target = next_tokens(labels, interval.start_BQ) if shift_labels is None else shift_labels
                loss = self._left_to_right_loss(logits, target, num_items_in_batch)
        elif labels is not None:
            losses = insertion_losses(self, hidden, input_ids, interval, supervision)
            loss, position, token = mean_losses(losses, interval.start_BQ, step_weights, num_items_in_batch)
        return InsNextLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            position_loss=position,
            token_loss=token,
        )

    def token_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits `[..., V]` of the token in a slot, E . state, float32 or wider.

        Ids that are structure (`config.never_inserted`) have `-inf`.

        Args:
            states: `slot_head.token_state` of slots and states, `[..., D]`.
        """
        logits = self.lm_head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        structure = torch.tensor(self.config.never_inserted, dtype=torch.long, device=logits.device)
        return logits.index_fill(-1, structure, -torch.inf)

    def _left_to_right_logits(self, hidden, logits_to_keep):
        """Return log-probabilities `[B, T, V]`: STOP or the rightmost slot, times the token in it."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = hidden[:, kept]
        slot, log_p_slot, log_p_stop = self.slot_head.at_the_right_edge(hidden)
        logits = self.token_logits(self.slot_head.token_state(slot, hidden))
        log_p = logits.log_softmax(-1) + log_p_slot[..., None]
        eos = self.config.eos_token_id
        if eos is not None:
            is_eos = torch.arange(self.config.vocab_size, device=log_p.device) == eos
            log_p = torch.where(is_eos, log_p_stop[..., None], log_p)
        return log_p

    def _left_to_right_loss(self, log_p, target, num_items):
        bos, eos = self.config.bos_token_id, self.config.eos_token_id
        # BOS begins a text and is never written: nothing is to be learnt from what stands before it
        if bos is not None and bos != eos:
            target = target.masked_fill(target == bos, -100)
        if not torch.compiler.is_compiling():
            self._check_labels(target, [token for token in self.config.never_inserted if token not in (bos, eos)])
        loss = nn.functional.nll_loss(
            log_p.flatten(0, 1), target.flatten().long().to(log_p.device), ignore_index=-100, reduction="sum"
        )
        return loss / divisor((target != -100).sum(), num_items)

    def _check_labels(self, target, structure):
        size = self.config.vocab_size
        is_structure = torch.isin(target, torch.tensor(structure, dtype=target.dtype, device=target.device))
        for rule, wrong in (
            (f"ids {structure} are structure and have probability 0", is_structure),
            (f"labels must be in [0, {size}) or -100", (target != -100) & ((target < 0) | (target >= size))),
        ):
            if wrong.any():
                where = wrong.nonzero()[0].tolist()
                raise ValueError(f"{rule}, got label {int(target[wrong][0])} at {where}; set it to -100")


def _pooled(hidden_BTD, attention_mask: torch.Tensor | None, pooling: str, position_ids=None) -> torch.Tensor:
    """Return the state of an encoded text, `[B, D]`: the mean over its tokens, or its last token's."""
    if position_ids is not None:
        packed_starts(hidden_BTD.shape[:2], position_ids, attention_mask, may_begin_anew=False)
    if attention_mask is None:
        attention_mask = hidden_BTD.new_ones(hidden_BTD.shape[:2])
    if pooling == "mean":
        weights_BT1 = attention_mask[..., None].to(hidden_BTD.dtype)
        return (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp_min(1)
    T = hidden_BTD.shape[1]
    last_B = (attention_mask.long() * torch.arange(1, T + 1, device=attention_mask.device)).argmax(1)
    return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]


class InsNextForSequenceClassification(InsNextPreTrainedModel):
    """Class of a text, or with one label a number, read off the state of the whole text."""

    accepts_loss_kwargs = False

    def __init__(self, config: InsNextConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = InsNextModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, position_ids=None, **kwargs
    ):
        """Return logits `[B, num_labels]`; with labels `[B]` the loss that `config.problem_type` names."""
        outputs = self.model(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs
        )
        hidden = outputs.last_hidden_state
        logits = self.score(_pooled(hidden, attention_mask, self.config.classifier_pooling, position_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class InsNextForTokenClassification(InsNextPreTrainedModel):
    """Class of every token, each read in the light of the whole text."""

    def __init__(self, config: InsNextConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = InsNextModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Return logits `[B, T, num_labels]`; with labels `[B, T]` (-100: none) the mean cross-entropy.

        `num_items_in_batch` is the divisor of the loss in the place of the number of labels.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            items = divisor((labels != -100).sum(), num_items_in_batch)
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, num_items_in_batch=items)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class InsNextForMultipleChoice(InsNextPreTrainedModel):
    """The best of C texts, each read as a whole: ids `[B, C, T]` to logits `[B, C]`."""

    accepts_loss_kwargs = False

    def __init__(self, config: InsNextConfig):
        super().__init__(config)
        self.model = InsNextModel(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, position_ids=None, **kwargs
    ):
        """Return logits `[B, C]`; with labels `[B]` the mean cross-entropy.

        Raises:
            ValueError: If `input_ids` or `attention_mask` is not `[B, C, T]`, or `inputs_embeds` not `[B, C, T, D]`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        given = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        for name, tensor in (("input_ids or inputs_embeds", given), ("attention_mask", attention_mask)):
            if tensor is not None and (tensor.ndim != 3 or tensor.shape != given.shape):
                raise ValueError(f"multiple choice needs {name} [B, C, T], got {list(tensor.shape)}")
        choices = given.shape[1]
        flat_ids, flat_mask, flat_embeds, flat_position_ids = (
            None if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask, inputs_embeds, position_ids)
        )
        outputs = self.model(flat_ids, flat_mask, inputs_embeds=flat_embeds, position_ids=flat_position_ids, **kwargs)
        state = _pooled(outputs.last_hidden_state, flat_mask, self.config.classifier_pooling, flat_position_ids)
        logits = self.score(state).view(-1, choices)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)


__all__ = [
    "InsNextForInsertionLM",
    "InsNextForMultipleChoice",
    "InsNextForSequenceClassification",
    "InsNextForTokenClassification",
    "InsNextModel",
    "InsNextPreTrainedModel",
]
