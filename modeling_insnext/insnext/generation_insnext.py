"""`generate` for models that write by insertion.

In reading order: canvas (what is given), budget (what may be written), draft (the text as it grows), step (one token
more), write_sample and write_beam (which one), output.

A step chooses a slot (or STOP) from the state, then a token in that slot, writes it, and encodes that one token. Given
tokens are never touched, so whatever a canvas holds survives, in order. Left to right (`left_to_right=True`) the
decoding loops of Transformers run unchanged.

Sources: sequential and parallel insertion, InsNet (arXiv:2102.11008); EBR, InsNeXt (OpenReview moqBBpMZ8w).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList, TextStreamer
from transformers.generation import MaxTimeCriteria, StopStringCriteria
from transformers.utils import logging

from .bans import Bans
from .budget import Budget
from .canvas import Canvas
from .canvas_choice import choose_forms
from .canvas_pieces import continuation_mask_of
from .canvas_text import build_canvas
from .draft import Draft
from .generation_configuration import (
    InsertionGenerationConfig,
    asked_options,
    check_generation_kwargs,
    merge_generation_configs,
)
from .output import InsertionGenerateOutput, stop_strings
from .pending import check_pending
from .prompt_learning import virtual_tokens
from .step import TokenRules, check_stock
from .write_beam import write_beams
from .write_sample import write_sample


logger = logging.get_logger(__name__)

ONLY_LEFT_TO_RIGHT = (
    "assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "synced_gpus",
)  # fmt: skip

# the first two are kept by STOP, the others by `Bans`, which look to both sides of a slot
NOT_BY_PROCESSORS = {"min_new_tokens", "min_length", "bad_words_ids", "sequence_bias", "no_repeat_ngram_size"}


class Voices(NamedTuple):
    """What has a say in a call of `generate` beside its options; see there."""

    logits_processor: LogitsProcessorList | None = None
    stopping_criteria: StoppingCriteriaList | None = None
    prefix_allowed_tokens_fn: Callable | None = None
    streamer: Any = None


class WritingTask(NamedTuple):
    """A checked call of `generate`: what is given, what may be written, and who has a say."""

    config: InsertionGenerationConfig
    canvas: Canvas
    budget: Budget
    rules: TokenRules
    criteria: StoppingCriteriaList
    stops: StopStringCriteria | None

    def write(self, draft: Draft, streamer=None) -> InsertionGenerateOutput:
        """Write into the encoded canvas.

        Raises:
            ValueError: If every token of a chosen slot is barred in a row that may not stop.
        """
        shown = _put_prompt(streamer, draft, self.canvas)
        if self.config.num_beams > 1:
            output = write_beams(draft, self.config, self.rules, self.criteria)
        else:
            output = write_sample(draft, self.config, self.rules, self.criteria, streamer)
        if self.stops is not None:
            output.cut(self.stops, self.canvas.lengths, draft.pad)
        if streamer is not None:
            streamer.put(output.sequences[:, shown:].cpu())
            streamer.end()
        return output


class InsertionGenerationMixin(GenerationMixin):
    """Adds `canvas` and an inserting `generate` to a model."""

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        """Load generation_config.json as an `InsertionGenerationConfig`; Transformers would load a plain one."""
        config_class = self.generation_config_class
        if generation_config is not None:
            self.generation_config = config_class.from_dict(generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            try:
                self.generation_config = config_class.from_pretrained(
                    pretrained_model_name_or_path,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    proxies=proxies,
                    local_files_only=local_files_only,
                    token=token,
                    revision=revision,
                    subfolder=subfolder,
                )
            except OSError:
                self.generation_config = config_class.from_model_config(self.config)

    def _prepare_generation_config(self, generation_config, **kwargs):
        """Merge options the way Transformers does, without losing those of insertion."""
        config, rest = merge_generation_configs(self.generation_config, generation_config, **kwargs)
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name):
                rest[name] = True
        return config, rest

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """Hand the padding on as it is: the model builds its own intervals, with a static cache too."""
        return attention_mask

    def init_continuous_batching(self, *args, **kwargs):
        """Refuse `generate_batch`: text grows between tokens, and pages of keys only at their end.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "continuous batching (generate_batch) keeps keys in pages, which insertion has none of; "
            "use generate with a padded batch"
        )

    def canvas(self, tokenizer, text=None, keywords=None, **options):
        """Return the canvas of a text with marks, or of keywords: what `generate(**canvas)` fills.

        Args:
            tokenizer: The model's tokenizer.
            text: One text or a batch; gaps open at the marks only, `___` by default. `___{2,5}` bounds the tokens of a
                gap.
            keywords: Words or phrases, a list or a batch of lists. Phrases stay whole, gaps open around them. A list
                beside strings holds the forms of one keyword, of which the model chooses one:
                `[["look", "looks"], "field"]`.
            **options: `gap`, `min_gap_tokens`, `max_gap_tokens`, `ordered`; see `canvas_text.build_canvas`. With
                `ordered=False` keywords are pending: `generate` chooses form, place and order of each as it writes.
                Otherwise forms are chosen here, before anything is written.

        Raises:
            ValueError: If text or keywords are empty, bounds contradict each other, or the vocabularies do not match.
        """

        def choose(keywords):
            mask = continuation_mask_of(tokenizer, self.config.vocab_size)
            return choose_forms(self, tokenizer.bos_token_id, keywords, mask)

        return build_canvas(
            tokenizer,
            text,
            keywords,
            choose=choose,
            vocab_size=self.config.vocab_size,
            device=self.device,
            **options,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn=None,
        synced_gpus: bool | None = None,
        streamer=None,
        **kwargs,
    ):
        """Write into the open slots of a canvas; without one, continue a prompt to its right by insertion.

        Args:
            inputs: Token ids `[B, T]`, the same as `input_ids`.
            generation_config: Options, an `InsertionGenerationConfig` or a plain one; keyword arguments overrule it.
            logits_processor: More processors of the token scores. They are given all rows of the batch, in order:
                the text right of the slot, then left of it, so that the last token is the slot's left neighbour.
            stopping_criteria: More criteria; they are given all rows, as `sequences` would show them.
            prefix_allowed_tokens_fn: As in Transformers, on what the processors see, without padding; called with the
                row of the canvas.
            synced_gpus: As in Transformers, for `left_to_right=True` only.
            streamer: `put_draft` (`TextDiffusionStreamer`) shows every state of the text; others get the finished
                text. What `skip_prompt` skips is the given text up to the first open slot.
            **kwargs: The fields of a :class:`Canvas`, options of :class:`InsertionGenerationConfig`, and with
                `stop_strings` the `tokenizer` that reads them.

        Returns:
            The texts, `[B, T']`, each behind the left padding that it was given with, or an
            :class:`InsertionGenerateOutput` with `return_dict_in_generate=True`.

        Raises:
            TypeError: If `generation_config` or `streamer` is none.
            ValueError: If an option does not exist, or has no meaning or effect here, or the canvas breaks a rule;
                before any work. Later, if every token of a chosen slot is barred in a row that may not stop.
        """
        config, fields = merge_generation_configs(self.generation_config, generation_config, **kwargs)
        asked = asked_options(self.generation_config, generation_config, kwargs)
        if config.left_to_right:
            self._check_special_tokens(config)
            _check_left_to_right(config, asked)
            return super().generate(
                inputs,
                generation_config=generation_config,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **kwargs,
            )
        voices = Voices(logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer)
        task = self.writing_task(config, {**fields, "inputs": inputs, "synced_gpus": synced_gpus}, asked, voices)
        draft = Draft.start(self, task.canvas, task.budget, config, fields.get("attention_mask"))
        output = task.write(draft, streamer)
        return output if config.return_dict_in_generate else output.sequences

    def writing_task(self, config, fields: dict, asked: set[str], voices: "Voices") -> "WritingTask":
        """Return what a call of `generate` is to do, once everything about it is checked.

        Args:
            config: The options.
            fields: The other keyword arguments.
            asked: Names of the options that the caller has set.
            voices: What has a say beside the options.

        Raises:
            ValueError: As `generate`.
            TypeError: If `streamer` is none.
        """
        fields = dict(fields)
        inputs, tokenizer = fields.pop("inputs", None), fields.pop("tokenizer", None)
        self._check_special_tokens(config)
        self._check_options(config, fields, asked)
        bans = Bans(config, self.config.vocab_size)
        canvas = bans.with_minima(self._given_canvas(inputs, fields))
        budget = Budget.resolve(canvas, config, self.config)
        check_pending(canvas, bans, self.config.never_inserted, "keyword_bias" in asked)
        _check_texts(voices.streamer, canvas, config)
        check_stock([*(voices.logits_processor or []), *(voices.stopping_criteria or [])])
        stops = stop_strings(config, tokenizer, canvas)
        processors = self._token_processors(config, voices.logits_processor, canvas)
        bias = config.keyword_bias if config.num_beams == 1 else 0.0
        rules = TokenRules(canvas.continuation_mask, processors, bans, voices.prefix_allowed_tokens_fn, bias)
        return WritingTask(config, canvas, budget, rules, _criteria(config, voices.stopping_criteria), stops)

    def _check_special_tokens(self, config) -> None:
        if config.pad_token_id is not None and config.pad_token_id >= self.config.vocab_size:
            raise ValueError(f"pad_token_id must be in [0, {self.config.vocab_size}), got {config.pad_token_id}")

    def _check_options(self, config, fields, asked) -> None:
        """Refuse what means nothing when text is inserted."""
        method = virtual_tokens(self)
        if method is not None:
            raise ValueError(
                f"{method} of PEFT puts virtual tokens in front of a prompt and needs left_to_right=True; adapters "
                "like LoRA work with inserted text too"
            )
        for name in ONLY_LEFT_TO_RIGHT:
            value = fields.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"{name} needs left_to_right=True")
        check_generation_kwargs(fields, {*Canvas.field_names(), *config.option_names(), "tokenizer"})
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(config, name)
            known = [_ids(getattr(self.generation_config, name)), _ids(getattr(self.config, name))]
            if name in asked and _ids(value) not in known:
                raise ValueError(
                    f"{name}={value!r} has no effect when text is inserted: a canvas brings its BOS, and a text ends "
                    "when STOP is chosen; use stop_strings or stopping_criteria"
                )
        if {"max_length", "max_new_tokens"} <= asked:
            logger.warning(
                "max_new_tokens=%s counts, as in Transformers, max_length=%s does not",
                config.max_new_tokens,
                config.max_length,
            )
        if "max_length" not in asked and self.generation_config.max_length is None:
            config.max_length = None
        config.validate_for_insertion(asked)

    def _given_canvas(self, inputs, fields) -> Canvas:
        if (inputs is None) == (fields.get("input_ids") is None):
            raise ValueError("exactly one of inputs and input_ids must be given")
        canvas = Canvas.from_ids(**{**fields, "input_ids": fields.get("input_ids", inputs)})
        if canvas.continuation_mask is None and not bool(canvas.word_end_mask.any()):
            canvas.continuation_mask = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        return canvas.to(self.device)

    def _token_processors(self, config, processors, canvas):
        """Return Transformers' own processors for these options, without those that speak of EOS or look left only."""
        plain = InsertionGenerationConfig(**{
            name: value
            for name, value in config.to_dict().items()
            if name in config.option_names() - NOT_BY_PROCESSORS and value is not None
        })  # fmt: skip
        self._prepare_special_tokens(plain, kwargs_has_attention_mask=True, device=self.device)
        return self._get_logits_processor(
            plain,
            input_ids_seq_length=canvas.input_ids.shape[1],
            prefix_allowed_tokens_fn=None,
            logits_processor=LogitsProcessorList(processors or []),
            device=self.device,
            model_kwargs={},
        )


def _ids(value: int | list[int] | None) -> list[int] | None:
    """Return a special token as Transformers reads it: one id or a list of them."""
    return [value] if isinstance(value, int) else value


def _check_left_to_right(config, asked) -> None:
    config.validate_for_left_to_right(asked)
    for name in sorted(Canvas.field_names() - {"input_ids", "attention_mask"}):
        if name in asked:
            raise ValueError(
                f"{name} belongs to a canvas, which is filled by insertion: drop left_to_right=True, or give "
                "input_ids and attention_mask alone"
            )


def _check_texts(streamer, canvas: Canvas, config) -> None:
    """Check what depends on the number of texts."""
    texts = canvas.rows * config.num_return_sequences
    if streamer is not None:
        if config.num_beams > 1:
            raise ValueError(f"a streamer shows one text as it grows, num_beams={config.num_beams} grow at once")
        if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise TypeError(f"a streamer has the methods put and end, got {type(streamer).__name__}")
        if isinstance(streamer, TextStreamer) and texts > 1:
            raise ValueError(f"a TextStreamer shows one text, got {texts}")
    if isinstance(config.seed, (list, tuple)) and len(config.seed) != texts:
        raise ValueError(f"seed must be an integer or one for each of the {texts} texts, got {len(config.seed)}")


def _criteria(config, more) -> StoppingCriteriaList:
    limits = [] if config.max_time is None else [MaxTimeCriteria(config.max_time)]
    return StoppingCriteriaList([*(more or []), *limits])


def _put_prompt(streamer, draft: Draft, canvas: Canvas) -> int:
    """Give a streamer that skips the prompt what stands before the first open slot; return how many columns it got."""
    if not getattr(streamer, "skip_prompt", False):
        return 0
    before = torch.where(canvas.slot_mask.any(1), canvas.slot_mask.int().argmax(1) + 1, canvas.lengths)
    shown = int((before + draft.margins).min())
    streamer.put(draft.texts()[:, :shown].cpu())
    return shown


__all__ = ["InsertionGenerateOutput", "InsertionGenerationMixin"]
