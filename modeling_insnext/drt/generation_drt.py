"""Generation with DRT: the loops of Transformers, a prefill for very long prompts."""

import torch
from tqdm.auto import tqdm
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from .cache import ChunkMemoryCache
from .prompt_learning import virtual_tokens


CACHE_LOCATIONS = {None: "device", "dynamic": "device", "offloaded": "host"}
# methods of PEFT that come as keys and values instead of embeddings
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
PREFILL_OPTIONS = "prefill_chunk_size, lower_only_prefill and show_progress"


def _is_count(number) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _check_ends(attention_mask: torch.Tensor | None) -> None:
    """Raise a `ValueError` for prompts that end in padding, behind which nothing can be written."""
    rows = [] if attention_mask is None else (attention_mask[:, -1] == 0).nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(
            f'prompts must be padded on the left (tokenizer.padding_side = "left"), got padding at the end of rows '
            f"{rows}"
        )


class DrtGenerationMixin(GenerationMixin):
    """`generate` of Transformers; prompts may be read in segments.

    Beyond the usual arguments `generate` takes

    - `prefill_chunk_size`: how many tokens of the prompt are read at a time,
    - `lower_only_prefill`: run only the lower layers on what the upper ones cannot see any more,
    - `show_progress`: a progress bar over the prompt,
    - `cache_implementation="offloaded"`: chunk memory in (pinned) host memory. For a file, or to come back to a text
      that was read before, pass a :class:`ChunkMemoryCache` as `past_key_values`.
    """

    def init_continuous_batching(self, *args, **kwargs):
        """Refuse `generate_batch`: a memory of chunks is no list of pages.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "continuous batching (generate_batch) keeps keys in pages, which a memory of chunks has none of; "
            "use generate with a padded batch"
        )

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: ChunkMemoryCache | None = None,
        segment_length: int | None = None,
        lower_only: bool = False,
        show_progress: bool = False,
    ) -> ChunkMemoryCache:
        """Read a text and return the cache behind it.

        Every way of reading leads to the same cache, up to rounding. Only what the last position depends on is kept:
        U upper layers of window w see U (w - 1) positions back, so with `lower_only` they run on those alone.

        Args:
            input_ids: Tokens `[B, T]`, the new ones behind a cache.
            attention_mask: 1 on tokens, 0 on padding, `[B, T]`, behind a cache `[B, columns + T]`.
            past_key_values: Cache to fill; by default a new one on the device.
            segment_length: Tokens read at a time; by default all at once.
            lower_only: Whether to skip upper layers where nothing can depend on them.
            show_progress: Whether to show a progress bar.

        Raises:
            ValueError: If `segment_length` is no integer of at least 1, the mask has another shape than all columns
                together, or the model refuses the input.
            TypeError: If `past_key_values` is no cache of DRT.
        """
        if segment_length is not None and not _is_count(segment_length):
            raise ValueError(f"segment_length must be an integer of at least 1 or None, got {segment_length!r}")
        past = ChunkMemoryCache(self.config) if past_key_values is None else past_key_values
        if not hasattr(past, "memory"):
            raise TypeError(f"past_key_values must be a ChunkMemoryCache, got {type(past).__name__}")
        B, T = input_ids.shape
        start = past.columns
        if attention_mask is not None and attention_mask.shape != (B, start + T):
            raise ValueError(f"attention_mask must be [{B}, {start + T}], got {list(attention_mask.shape)}")
        past.expect(T)
        first_full = self._first_full_column(input_ids, attention_mask, past) if lower_only else 0
        # upper layers as well go on seeing the sinks, and must have read them
        after_sinks = self._column_behind_sinks(attention_mask, past, T)
        with tqdm(total=T, unit="token", disable=not show_progress) as progress:
            column = 0
            while column < T:
                end = T if segment_length is None else min(column + segment_length, T)
                only = after_sinks <= column < first_full
                for border in (after_sinks, first_full):
                    end = min(end, border) if column < border else end
                mask = None if attention_mask is None else attention_mask[:, : start + end]
                self.model(input_ids[:, column:end], mask, past_key_values=past, use_cache=True, lower_only=only)
                progress.update(end - column)
                column = end
        return past

    def _column_behind_sinks(self, attention_mask, past: ChunkMemoryCache, T: int) -> int:
        """Return how many of the new columns hold the sinks of all rows."""
        missing = self.config.num_sink_tokens - torch.tensor(past.seen or [0])
        if (missing <= 0).all():
            return 0
        if attention_mask is None:
            return min(int(missing.max()), T)
        count_BT = attention_mask[:, past.columns :].long().cumsum(1).cpu()
        there_T = (count_BT >= missing[:, None]).all(0)
        return int(there_T.long().argmax()) + 1 if there_T.any() else T

    def _first_full_column(self, input_ids, attention_mask, past: ChunkMemoryCache) -> int:
        """Return the first column that the upper layers must read, so that the last positions are exact."""
        config = self.config
        if not config.retrieval_groups or config.sliding_window is None:
            return 0
        needed = sum(config.retrieval_groups) * (config.sliding_window - 1) + past.margin + config.chunk_length
        T = input_ids.shape[1]
        if attention_mask is None:
            return max(T - needed, 0)
        real = attention_mask[:, past.columns :].long()
        behind = real.flip(1).cumsum(1).flip(1)
        # the last column that still has enough tokens in every row behind it, itself included
        enough = (behind >= torch.minimum(behind[:, :1], torch.full_like(behind[:, :1], needed))).all(0)
        return int(enough.nonzero().max())

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args):
        if virtual_tokens(self) in KEYS_AND_VALUES:
            raise ValueError(
                f"{virtual_tokens(self)} of PEFT is a cache of its own kind, and past_key_values must be a "
                "ChunkMemoryCache; prompt tuning, P-tuning and adapters like LoRA work"
            )
        wanted, segment = generation_config.cache_implementation, generation_config.prefill_chunk_size
        if segment is not None and not _is_count(segment):
            raise ValueError(f"prefill_chunk_size must be an integer of at least 1 or None, got {segment!r}")
        if not generation_config.is_assistant:
            _check_ends(model_kwargs.get("attention_mask"))
        steered = model_kwargs.get("lower_only_prefill") or model_kwargs.get("show_progress")
        if generation_mode == GenerationMode.ASSISTED_GENERATION and (steered or segment):
            raise ValueError(f"{PREFILL_OPTIONS} cannot be had with assisted generation: call prefill before")
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit must be None: a draft by DRT's own lower layers would lack what they retrieve, "
                f"got {generation_config.assistant_early_exit}; use assistant_model or prompt_lookup_num_tokens"
            )
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, *args)
        elif wanted not in CACHE_LOCATIONS:
            raise ValueError(f"cache_implementation must be one of {list(CACHE_LOCATIONS)}, got {wanted!r}")
        else:
            model_kwargs["past_key_values"] = ChunkMemoryCache(self.config, CACHE_LOCATIONS[wanted])
        if generation_config.is_assistant and model_kwargs.get("past_key_values") is not None:
            # the model that asked for this draft may take all of it back
            model_kwargs["past_key_values"].allow_crop(generation_config.max_new_tokens + 1)

    def _assisted_decoding(self, input_ids, *args, generation_config, **kwargs):
        """Behind a cache, read first what it does not hold; the loop of Transformers would read the whole text."""
        mask, held = kwargs.get("attention_mask"), getattr(kwargs.get("past_key_values"), "columns", 0)
        length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        if 0 < held < length == input_ids.shape[1]:
            kwargs["held_columns"] = held
        return super()._assisted_decoding(input_ids, *args, generation_config=generation_config, **kwargs)

    def _get_candidate_generator(self, model_kwargs, **kwargs):
        """Let the cache take back every draft, however long, before it is read."""
        # an assistant has a cache of its own
        own = {name: value for name, value in model_kwargs.items() if name != "held_columns"}
        generator = super()._get_candidate_generator(model_kwargs=own, **kwargs)
        draft, past = generator.get_candidates, model_kwargs.get("past_key_values")

        def get_candidates(input_ids, *args, **options):
            ids, logits = draft(input_ids, *args, **options)
            if past is not None:
                past.allow_crop(ids.shape[1] - input_ids.shape[1] + 1)
            return ids, logits

        generator.get_candidates = get_candidates
        return generator

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        segment, lower_only = generation_config.prefill_chunk_size, model_kwargs.get("lower_only_prefill", False)
        show_progress = model_kwargs.get("show_progress", False)
        past = model_kwargs.get("past_key_values")
        if not (segment or lower_only or show_progress):
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        if past is None or model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(f"{PREFILL_OPTIONS} need input_ids and a cache, got use_cache=False or inputs_embeds")
        # behind a cache, `input_ids` are the whole text if the mask is as long, else the new part; all but the last
        # column is read here, the step of the last one returns the logits
        mask = model_kwargs.get("attention_mask")
        length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        new = input_ids[:, past.columns : -1] if length == input_ids.shape[1] else input_ids[:, :-1]
        if new.shape[1]:
            self.prefill(
                new,
                None if mask is None else mask[:, : past.columns + new.shape[1]],
                past,
                segment,
                lower_only,
                show_progress,
            )
        inputs = self.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        return self(**inputs, return_dict=True)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        inputs_embeds=None,
        held_columns=None,
        lower_only_prefill=False,
        show_progress=False,
        **kwargs,
    ):
        """Leave out what steers the prefill alone. `generate` takes `inputs_embeds` if they are named here."""
        if held_columns is not None and next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - held_columns
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )


__all__ = ["DrtGenerationMixin"]
