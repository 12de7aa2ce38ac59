"""Options of insertion decoding: what is set, what is refused, what survives saving."""

import json

import pytest
from transformers import GenerationConfig

from modeling_insnext.insnext.generation_configuration import (
    INSERTION_DEFAULTS,
    MEANINGLESS,
    InsertionGenerationConfig,
    check_generation_kwargs,
    merge_generation_configs,
)


EVERY_FIELD = dict(
    left_to_right=False,
    ebr=True,
    ebr_ratio=0.5,
    ebr_window=64,
    parallel_slots=4,
    slot_window=8,
    reading_order=True,
    slot_temperature=0.7,
    slot_top_p=0.9,
    keyword_bias=3.0,
    seed=[1, 2, 3],
)


def test_every_insertion_field_is_tested():
    assert EVERY_FIELD.keys() == INSERTION_DEFAULTS.keys()


def test_saving_and_loading_keeps_every_field(tmp_path):
    config = InsertionGenerationConfig(**EVERY_FIELD, max_new_tokens=7, do_sample=True, top_p=0.8, eos_token_id=2)
    config.save_pretrained(tmp_path)
    loaded = InsertionGenerationConfig.from_pretrained(tmp_path)
    assert loaded == config
    for name, value in {**EVERY_FIELD, "max_new_tokens": 7, "top_p": 0.8, "eos_token_id": 2}.items():
        assert getattr(loaded, name) == value, name
    # once more, as a checkpoint that is fine-tuned and saved again
    loaded.save_pretrained(tmp_path / "again")
    assert InsertionGenerationConfig.from_pretrained(tmp_path / "again") == config
    assert config != InsertionGenerationConfig(**{**EVERY_FIELD, "seed": 4})


def test_a_config_that_comes_from_a_model_config_keeps_its_fields_too(tmp_path):
    config = InsertionGenerationConfig.from_model_config({"bos_token_id": 0, "eos_token_id": 2, "hidden_size": 8})
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 2, None)
    config.ebr = True
    config.save_pretrained(tmp_path)
    assert InsertionGenerationConfig.from_pretrained(tmp_path).ebr is True
    # control: the class of transformers drops a custom field here
    plain = GenerationConfig.from_model_config(
        type("Config", (), {"to_dict": lambda self: {}, "get_text_config": lambda self, decoder: self})()
    )
    plain.ebr = True
    plain.save_pretrained(tmp_path / "plain")
    assert not hasattr(GenerationConfig.from_pretrained(tmp_path / "plain"), "ebr")


def test_only_what_is_set_is_written(tmp_path):
    InsertionGenerationConfig(ebr=False, max_new_tokens=3).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert {"ebr", "max_new_tokens"} <= written.keys()
    assert not (INSERTION_DEFAULTS.keys() - {"ebr"}) & written.keys()
    assert InsertionGenerationConfig().to_diff_dict().keys() <= {"transformers_version", "_from_model_config"}


def test_a_file_of_transformers_loads_and_a_foreign_field_in_it_is_refused(tmp_path):
    GenerationConfig(max_new_tokens=3, eos_token_id=1).save_pretrained(tmp_path)
    assert InsertionGenerationConfig.from_pretrained(tmp_path, ebr=True).max_new_tokens == 3
    with pytest.raises(ValueError, match="unknown generation option 'ebr_rato', did you mean 'ebr_ratio'"):
        InsertionGenerationConfig.from_pretrained(tmp_path, ebr_rato=2)
    config, unused = InsertionGenerationConfig.from_pretrained(tmp_path, foo=2, ebr=True, return_unused_kwargs=True)
    assert unused == {"foo": 2} and config.ebr is True
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "paralel_slots": 2}))
    with pytest.raises(ValueError, match="'paralel_slots', did you mean 'parallel_slots'"):
        InsertionGenerationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "near"), [("parallel_slot", "parallel_slots"), ("temprature", "temperature"), ("ebr_windw", "ebr_window")]
)
def test_a_misspelt_option_is_refused_with_a_suggestion(name, near):
    with pytest.raises(ValueError, match=f"unknown generation option '{name}', did you mean '{near}'"):
        InsertionGenerationConfig(**{name: 1})
    with pytest.raises(ValueError, match=f"unknown generation option '{name}', did you mean '{near}'"):
        check_generation_kwargs({name: 1, "input_ids": None}, {"input_ids", near})
    check_generation_kwargs({near: 1, "input_ids": None}, {"input_ids", near})


def test_every_unknown_option_is_named():
    with pytest.raises(ValueError, match="'foo'; unknown generation option 'seeds', did you mean 'seed'"):
        check_generation_kwargs({"foo": 1, "seeds": 2}, {"seed"})


BAD_VALUES = [
    ("left_to_right", 1),
    ("ebr", "yes"),
    ("ebr_ratio", -0.5),
    ("ebr_ratio", float("inf")),
    ("ebr_ratio", float("nan")),
    ("ebr_window", 0),
    ("ebr_window", 2.0),
    ("parallel_slots", 0),
    ("parallel_slots", True),
    ("slot_window", 0),
    ("reading_order", 1),
    ("slot_temperature", 0.0),
    ("slot_temperature", -1),
    ("slot_top_p", 0.0),
    ("slot_top_p", 1.5),
    ("keyword_bias", float("inf")),
    ("seed", -1),
    ("seed", []),
    ("seed", [1, "2"]),
    ("seed", 2**63),
    ("temperature", 0.0),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -1),
    ("num_beams", 0),
    ("num_return_sequences", 0),
    ("min_new_tokens", -1),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got ") as error:
        InsertionGenerationConfig(**{name: value})
    assert repr(value) in str(error.value)
    with pytest.raises(ValueError, match=name):
        InsertionGenerationConfig().update(**{name: value})


GOOD_VALUES = [
    ("ebr_ratio", 0),
    ("slot_top_p", 1.0),
    ("keyword_bias", -2),
    ("seed", 0),
    ("seed", [0, 2**63 - 1]),
    ("top_k", 0),
    ("ebr", None),
]


@pytest.mark.parametrize(("name", "value"), GOOD_VALUES)
def test_the_edge_of_each_range_is_allowed(name, value):
    assert getattr(InsertionGenerationConfig(**{name: value}), name) == value


def test_contradicting_options_are_refused():
    with pytest.raises(ValueError, match="num_beams=3 and parallel_slots=2"):
        InsertionGenerationConfig(num_beams=3, parallel_slots=2)
    InsertionGenerationConfig(num_beams=3, parallel_slots=1)
    with pytest.raises(ValueError, match="min_new_tokens=5 and max_new_tokens=4"):
        InsertionGenerationConfig(min_new_tokens=5, max_new_tokens=4)
    with pytest.raises(ValueError, match="num_return_sequences"):
        InsertionGenerationConfig(num_return_sequences=2)


ODD_VALUES = {
    "use_cache": False,
    "num_assistant_tokens_schedule": "heuristic",
    "speculation_type": "dflash",
    "force_words_ids": [[1]],
    "constraints": [1],
    "exponential_decay_length_penalty": (1, 1.5),
    "stop_strings": "end",
    "begin_suppress_tokens": [1],
    "assistant_confidence_threshold": 0.1,
    "assistant_ensemble_weight": 0.5,
    "dola_layers": "high",
    "cache_config": {"backend": "quanto"},
    "watermarking_config": {"bias": 1.0},
    "encoder_repetition_penalty": 1.2,
    "penalty_alpha": 0.6,
    "guidance_scale": 1.5,
    "diversity_penalty": 0.5,
    "is_assistant": True,
    "use_mtp": True,
    "token_healing": True,
    "low_memory": True,
}


@pytest.mark.parametrize("name", MEANINGLESS)
def test_options_without_meaning_for_insertion_are_refused(name):
    config = InsertionGenerationConfig(**{name: ODD_VALUES.get(name, 7)})
    with pytest.raises(ValueError, match=f"{name}=.* has no meaning when text is inserted: .+"):
        config.validate_for_insertion()


def test_neutral_values_and_meaningful_options_are_allowed():
    neutral = InsertionGenerationConfig(
        **{**InsertionGenerationConfig._get_default_generation_params(), "max_length": 9}
    )
    neutral.validate_for_insertion()
    InsertionGenerationConfig(
        do_sample=True, temperature=0.5, top_k=3, repetition_penalty=1.1, no_repeat_ngram_size=2, suppress_tokens=[1],
        guidance_scale=1.0, use_cache=True, cache_implementation="static",
    ).validate_for_insertion()  # fmt: skip


def test_only_two_caches_are_offered():
    with pytest.raises(ValueError, match='must be "dynamic" or "static" .* got \'quantized\''):
        InsertionGenerationConfig(cache_implementation="quantized").validate_for_insertion()


def test_insertion_options_mean_nothing_left_to_right_if_the_user_asks_for_them():
    config = InsertionGenerationConfig(left_to_right=True, ebr=True, parallel_slots=1)
    config.validate_for_left_to_right()
    config.validate_for_left_to_right({"left_to_right", "parallel_slots", "max_new_tokens"})
    with pytest.raises(ValueError, match="ebr=True has no meaning left to right"):
        config.validate_for_left_to_right({"ebr"})


def test_the_nearest_setting_wins():
    model = InsertionGenerationConfig(ebr=True, ebr_ratio=2.0, top_k=5, eos_token_id=2)
    user = GenerationConfig(top_k=7, max_new_tokens=4)
    config, rest = merge_generation_configs(model, user, max_new_tokens=9, input_ids="ids")
    assert (config.ebr, config.ebr_ratio, config.top_k, config.max_new_tokens) == (True, 2.0, 7, 9)
    assert (config.parallel_slots, config.slot_top_p, config.temperature, config.eos_token_id) == (1, 1.0, 1.0, 2)
    assert rest == {"input_ids": "ids"}
    assert model.max_new_tokens is None and model.parallel_slots is None
    off, _ = merge_generation_configs(model, InsertionGenerationConfig(ebr=False))
    assert off.ebr is False
    unset, _ = merge_generation_configs(model, InsertionGenerationConfig())
    assert unset.ebr is True


def test_a_user_config_with_a_foreign_field_is_refused():
    with pytest.raises(ValueError, match="'ebr_ration', did you mean 'ebr_ratio'"):
        merge_generation_configs(InsertionGenerationConfig(), GenerationConfig(ebr_ration=2))
    with pytest.raises(ValueError, match="slot_window must be"):
        merge_generation_configs(InsertionGenerationConfig(), slot_window=0)
