"""Options of insertion decoding: the fields of `GenerationConfig` and eleven more, every one checked.

As everywhere in transformers a field left at None is not set: `merge_generation_configs` fills it from the model's
own configuration, then from the defaults of GenerationConfig and `INSERTION_DEFAULTS`. So an explicit `ebr=False`
overrules a checkpoint that sets `ebr=True`, and a field that nobody set has its default.
"""

import copy
import difflib
import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any

from transformers import GenerationConfig


INSERTION_DEFAULTS = {
    "left_to_right": False,
    "ebr": False,
    "ebr_ratio": 1.0,
    "ebr_window": None,
    "parallel_slots": 1,
    "slot_window": None,
    "reading_order": False,
    "slot_temperature": 1.0,
    "slot_top_p": 1.0,
    "keyword_bias": 7.0,
    "seed": None,
}

ASSISTED = "assisted decoding guesses the next tokens on the right; use parallel_slots"
STOPS = "a text ends when STOP is chosen, not with a token; use min_new_tokens, max_new_tokens or bounds of the gaps"
FORCED = "no step is the first or the last of the text; use a canvas with the token as given text"
GIVEN = "given words are kept by construction; use canvas(keywords=...) or a text with marks"

SCORED = "a step scores slots, then tokens in one of them; use a logits processor, model.score or forward"

# option -> what to do instead; the neutral values are those of GenerationConfig and NEUTRAL
MEANINGLESS = {
    "is_assistant": ASSISTED,
    "use_mtp": ASSISTED,
    "num_assistant_tokens": ASSISTED,
    "num_assistant_tokens_schedule": ASSISTED,
    "assistant_confidence_threshold": ASSISTED,
    "assistant_early_exit": ASSISTED,
    "assistant_ensemble_weight": ASSISTED,
    "assistant_lookbehind": ASSISTED,
    "target_lookbehind": ASSISTED,
    "prompt_lookup_num_tokens": ASSISTED,
    "max_matching_ngram_size": ASSISTED,
    "speculation_type": ASSISTED,
    "constraints": GIVEN,
    "force_words_ids": GIVEN,
    "token_healing": 'glue the mark to the word, as in "un___able"',
    "forced_bos_token_id": FORCED,
    "forced_eos_token_id": FORCED,
    "begin_suppress_tokens": "no step is the first of the text; use suppress_tokens",
    "min_length": STOPS,
    "exponential_decay_length_penalty": STOPS,
    "guidance_scale": "there is no prompt to leave out; use temperature",
    "num_beam_groups": "use num_beams",
    "diversity_penalty": "use num_return_sequences with do_sample=True",
    "penalty_alpha": "use repetition_penalty",
    "dola_layers": "use repetition_penalty",
    "low_memory": "use ebr=False, which keeps one cache",
    "encoder_no_repeat_ngram_size": "there is no encoder; use no_repeat_ngram_size",
    "encoder_repetition_penalty": "there is no encoder; use repetition_penalty",
    "decoder_start_token_id": "there is no decoder start; use a canvas, which starts with BOS",
    "watermarking_config": "its key is the token on the left, which a later insertion changes; use left_to_right=True",
    "prefill_chunk_size": "the given text is one block; use a shorter one",
    "cache_config": 'use cache_implementation="dynamic" or "static"',
    "output_scores": SCORED,
    "output_logits": SCORED,
    "output_attentions": SCORED,
    "output_hidden_states": SCORED,
    "use_cache": "use ebr=True, ebr_ratio=0, which encodes the text anew at every step",
}
NEUTRAL = {
    "is_assistant": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "use_mtp": False,
    "token_healing": False,
    "low_memory": False,
    "guidance_scale": 1.0,
}
INSERTION_CACHES = (None, "dynamic", "static")
# option -> what it acts with, and whether that is so
NEEDS = {
    "slot_temperature": ("do_sample=True", lambda config: config.do_sample),
    "slot_top_p": ("do_sample=True", lambda config: config.do_sample),
    "seed": ("do_sample=True", lambda config: config.do_sample),
    "ebr_ratio": ("ebr=True", lambda config: config.ebr),
    "ebr_window": ("ebr=True", lambda config: config.ebr),
    "keyword_bias": ("num_beams=1: beams deal their rows out", lambda config: (config.num_beams or 1) == 1),
    "compile_config": ('cache_implementation="static"', lambda config: config.cache_implementation == "static"),
}
# arguments that models elsewhere take -> why there is nothing to take here
NO_ARGUMENT = {
    "position_ids": "the positions follow from the canvas",
    "cache_position": "the positions follow from the canvas",
    "past_key_values": "generate makes its own cache; use forward to encode with one",
    "inputs_embeds": "text is inserted by its tokens; use input_ids",
    "token_type_ids": "the model has none",
    "encoder_outputs": "there is no encoder",
}


def check_generation_kwargs(kwargs: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Refuse keyword arguments of `generate` that nothing reads.

    Args:
        kwargs: Keyword arguments as the user wrote them.
        allowed: Names that something reads.

    Raises:
        ValueError: If a name is not allowed; the message proposes the nearest one that is.
    """
    unknown = [name for name in kwargs if name not in allowed]
    if unknown:
        raise ValueError(
            "; ".join(f"unknown generation option {name!r}{_suggestion(name, allowed)}" for name in unknown)
        )


def asked_options(model_config: GenerationConfig, user_config: GenerationConfig | None, kwargs) -> set[str]:
    """Return the names that one call sets, by `kwargs` or by a `user_config` that differs from the model's own.

    The defaults of insertion in a `user_config` ask for nothing: pipelines fill them in.
    """
    set_here = {} if user_config is None else user_config.to_dict()
    asked = set()
    for name, value in set_here.items():
        own = getattr(model_config, name, None)
        if value is not None and value != (INSERTION_DEFAULTS.get(name) if own is None else own):
            asked.add(name)
    return asked | {name for name, value in kwargs.items() if value is not None}


def merge_generation_configs(
    model_config: "InsertionGenerationConfig",
    user_config: GenerationConfig | None = None,
    **kwargs,
) -> tuple["InsertionGenerationConfig", dict[str, Any]]:
    """Return the options of one `generate` call and the keyword arguments that are not options.

    A keyword argument overrules `user_config`, that overrules `model_config`, that overrules the defaults.

    Args:
        model_config: The model's own `generation_config`; not changed.
        user_config: What the user passed as `generation_config`, of this class or a plain `GenerationConfig`.
        kwargs: Everything else passed to `generate`.

    Raises:
        TypeError: If `user_config` is no `GenerationConfig`.
        ValueError: If an option has a bad value or `user_config` carries an option that does not exist.
    """
    if user_config is not None and not isinstance(user_config, GenerationConfig):
        raise TypeError(
            "generation_config must be a GenerationConfig, options of a dictionary go in as keyword arguments, got "
            f"{type(user_config).__name__}"
        )
    config = copy.deepcopy(model_config)
    user_options = {}
    if user_config is not None:
        user_options = {name: value for name, value in user_config.to_dict().items() if not _is_metadata(name)}
        check_generation_kwargs(user_options, config.option_names())
    for name, value in config._get_default_generation_params().items():
        if getattr(config, name, None) is None and user_options.get(name) is None:
            setattr(config, name, value)
    options = {name: value for name, value in user_options.items() if value is not None}
    rest = config.update(**{**options, **kwargs})
    return config, rest


class InsertionGenerationConfig(GenerationConfig):
    """Options of `generate` for a model that writes by insertion. Values in brackets hold where nobody set one.

    Args:
        left_to_right: Write to the right only, with the decoding loops of transformers (False).
        ebr: Encode the text anew, as one block, whenever it has outgrown its last encoding (False).
        ebr_ratio: EBR strikes when more than `ebr_ratio` times the tokens encoded together were written since;
            0 encodes anew at every step (1.0).
        ebr_window: EBR encodes only the last `ebr_window` entries anew, over the untouched older ones (None: all).
        parallel_slots: Number of slots that one step writes into, at most one token each (1).
        slot_window: Write only into slots next to the last `slot_window` insertions (None: every open slot).
        reading_order: Close the slot left of every written token, so that what was written into an open slot of the
            canvas grows at its right end only: steps choose among the slots that are left, and STOP (False).
        slot_temperature: Divides the logits of the slots when `do_sample` (1.0).
        slot_top_p: Nucleus of the slots when `do_sample` (1.0).
        keyword_bias: Added to the scores of tokens that begin a pending keyword, in nats: how readily one is written
            (7.0).
        seed: Seed of the sampling: one, from which with the row's number that of each row is made, or a list with one
            for each row, taken as they are (None: the global generator).
        kwargs: Fields of `GenerationConfig`.

    Raises:
        ValueError: If an option does not exist or has a bad value.
    """

    def __init__(
        self,
        left_to_right: bool | None = None,
        ebr: bool | None = None,
        ebr_ratio: float | None = None,
        ebr_window: int | None = None,
        parallel_slots: int | None = None,
        slot_window: int | None = None,
        reading_order: bool | None = None,
        slot_temperature: float | None = None,
        slot_top_p: float | None = None,
        keyword_bias: float | None = None,
        seed: int | list[int] | None = None,
        **kwargs,
    ):
        options = {name: value for name, value in kwargs.items() if not _is_metadata(name)}
        check_generation_kwargs(options, {*vars(GenerationConfig()), *INSERTION_DEFAULTS})
        # set before super().__init__, which ends by calling validate
        self.left_to_right = left_to_right
        self.ebr = ebr
        self.ebr_ratio = ebr_ratio
        self.ebr_window = ebr_window
        self.parallel_slots = parallel_slots
        self.slot_window = slot_window
        self.reading_order = reading_order
        self.slot_temperature = slot_temperature
        self.slot_top_p = slot_top_p
        self.keyword_bias = keyword_bias
        self.seed = seed
        # not True, which would make GenerationConfig drop fields when the saved file is loaded
        super().__init__(**options, _from_model_config=False, transformers_version=kwargs.get("transformers_version"))

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the names of all options."""
        return {name for name in vars(cls()) if not _is_metadata(name)}

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return {**GenerationConfig._get_default_generation_params(), **INSERTION_DEFAULTS}

    @classmethod
    def from_model_config(cls, model_config) -> "InsertionGenerationConfig":
        """Return a configuration with the special tokens of `model_config`, an object or a dictionary."""
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return cls(**{name: values[name] for name in names if values.get(name) is not None})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Return the configuration of `config_dict` with `kwargs` over it, and the rest if `return_unused_kwargs`.

        Raises:
            ValueError: If a name in `config_dict` is no option, or one in `kwargs` without `return_unused_kwargs`.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        for name in ("_from_auto", "_from_pipeline"):
            kwargs.pop(name, None)
        names = cls.option_names()
        unused = {name: value for name, value in kwargs.items() if name not in names and not _is_metadata(name)}
        if not return_unused:
            check_generation_kwargs(unused, names)
        config = cls(**{**config_dict, **{name: value for name, value in kwargs.items() if name not in unused}})
        return (config, unused) if return_unused else config

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields that are set, which is what `save_pretrained` writes."""
        return {
            name: value
            for name, value in super().to_diff_dict().items()
            if name not in INSERTION_DEFAULTS or value is not None
        }

    def validate(self, *args, **kwargs) -> None:
        """Check every option, then those of `GenerationConfig`.

        Raises:
            ValueError: If an option has a bad value, or two contradict each other.
        """
        for name in ("left_to_right", "ebr", "reading_order", "do_sample", "return_dict_in_generate"):
            _check(name, getattr(self, name), "True or False", lambda value: isinstance(value, bool))
        for name in ("ebr_window", "parallel_slots", "slot_window", "num_beams", "num_return_sequences",
                     "max_new_tokens", "max_length"):  # fmt: skip
            _check(name, getattr(self, name), "an integer of at least 1", lambda value: _is_int(value) and value >= 1)
        for name in ("top_k", "min_new_tokens", "no_repeat_ngram_size", "pad_token_id"):
            _check(name, getattr(self, name), "an integer of at least 0", lambda value: _is_int(value) and value >= 0)
        _check(
            "ebr_ratio", self.ebr_ratio, "a finite number of at least 0", lambda value: _is_real(value) and value >= 0
        )
        for name in ("length_penalty", "keyword_bias"):
            _check(name, getattr(self, name), "a finite number", _is_real)
        for name in ("temperature", "slot_temperature", "repetition_penalty", "max_time"):
            _check(name, getattr(self, name), "a finite number above 0", lambda value: _is_real(value) and value > 0)
        for name in ("top_p", "slot_top_p"):
            _check(name, getattr(self, name), "in (0, 1]", lambda value: _is_real(value) and 0 < value <= 1)
        _check("seed", self.seed, "an integer of at least 0 or a list of them, one a row", _is_seed)
        if (self.num_beams or 1) > 1 and (self.parallel_slots or 1) > 1:
            raise ValueError(
                "beams compare texts that grow by one token a step: num_beams > 1 needs parallel_slots=1, got "
                f"num_beams={self.num_beams} and parallel_slots={self.parallel_slots}"
            )
        if self.max_new_tokens is not None and (self.min_new_tokens or 0) > self.max_new_tokens:
            raise ValueError(
                "min_new_tokens must not exceed max_new_tokens, got "
                f"min_new_tokens={self.min_new_tokens} and max_new_tokens={self.max_new_tokens}"
            )
        super().validate(*args, **kwargs)

    def validate_for_insertion(self, asked: Collection[str] = ()) -> None:
        """Refuse options that mean nothing when a token may go anywhere in the text, or nothing beside the others.

        Args:
            asked: Names that this call sets, see `asked_options`; a checkpoint's own settings may rest.

        Raises:
            ValueError: If one of them is set to something else than its neutral value.
        """
        neutral = {**GenerationConfig._get_default_generation_params(), **NEUTRAL}
        for name, instead in MEANINGLESS.items():
            value = getattr(self, name, None)
            if value is not None and value != neutral.get(name):
                raise ValueError(f"{name}={value!r} has no meaning when text is inserted: {instead}")
        for name, (needed, is_so) in NEEDS.items():
            value = getattr(self, name)
            if name in asked and value != INSERTION_DEFAULTS.get(name) and not is_so(self):
                raise ValueError(f"{name}={value!r} has no effect without {needed}")
        if self.do_sample and (self.num_beams or 1) > 1:
            raise ValueError(
                "beams look for the likeliest text, do_sample=True for another one: num_beams > 1 needs "
                f"do_sample=False, got num_beams={self.num_beams}"
            )
        if self.cache_implementation not in INSERTION_CACHES:
            raise ValueError(
                'cache_implementation must be "dynamic" or "static" when text is inserted, '
                f"got {self.cache_implementation!r}"
            )

    def validate_for_left_to_right(self, options: Collection[str] = ()) -> None:
        """Refuse insertion options that mean nothing left to right.

        Args:
            options: Names that this call sets, see `asked_options`; a checkpoint's own settings may rest.

        Raises:
            ValueError: If one of `options` is an insertion option that is set to something else than its default.
        """
        for name, default in INSERTION_DEFAULTS.items():
            value = getattr(self, name)
            if name != "left_to_right" and name in options and value is not None and value != default:
                raise ValueError(f"{name}={value!r} has no meaning left to right; drop it or use left_to_right=False")


def _is_metadata(name: str) -> bool:
    return name.startswith("_") or name == "transformers_version"


def _suggestion(name: str, allowed: Collection[str]) -> str:
    if name in NO_ARGUMENT:
        return f": {NO_ARGUMENT[name]}"
    near = difflib.get_close_matches(name, sorted(allowed), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _check(name: str, value: Any, rule: str, holds) -> None:
    if value is not None and not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_seed(value: Any) -> bool:
    seeds = value if isinstance(value, (list, tuple)) else [value]
    return len(seeds) > 0 and all(_is_int(seed) and 0 <= seed < 2**63 for seed in seeds)


__all__ = ["InsertionGenerationConfig", "check_generation_kwargs", "merge_generation_configs"]
