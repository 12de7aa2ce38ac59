"""Options of `generate` are honoured or refused: what has no effect, nonsense, stop strings, seeds."""

import numpy as np
import pytest
import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, TextStreamer, generation
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_insnext.insnext.generation_configuration import InsertionGenerationConfig
from tests.support.equality import same_bits
from tests.support.generation_twins import canvas_of, writing_model
from tests.support.insnext import BOS, PAD, tiny_model
from tests.support.tokenizers import tiny_tokenizer


MODEL = writing_model(seed=0, max_position_embeddings=24)
PROMPT = torch.tensor([[BOS, 5, 9, 4]])


class Watch(LogitsProcessor):
    calls = 0

    def __call__(self, input_ids, scores):
        type(self).calls += 1
        return scores


def refused(message, error=ValueError, model=MODEL, **options):
    Watch.calls = 0
    with pytest.raises(error, match=message):
        model.generate(PROMPT, logits_processor=[Watch()], **options)
    assert not Watch.calls


NO_EFFECT = [
    ({"eos_token_id": 7}, "eos_token_id=7 has no effect .* use stop_strings"),
    ({"bos_token_id": 7}, "bos_token_id=7 has no effect"),
    ({"slot_temperature": 0.5}, "slot_temperature=0.5 has no effect without do_sample=True"),
    ({"slot_top_p": 0.5}, "slot_top_p=0.5 has no effect without do_sample=True"),
    ({"seed": 1}, "seed=1 has no effect without do_sample=True"),
    ({"seed": [1, 2, 3]}, r"seed=\[1, 2, 3\] has no effect without do_sample=True"),
    ({"seed": 1, "num_beams": 2}, "seed=1 has no effect without do_sample=True"),
    ({"ebr_window": 3}, "ebr_window=3 has no effect without ebr=True"),
    ({"ebr_ratio": 0.5, "ebr": False}, "ebr_ratio=0.5 has no effect without ebr=True"),
    ({"compile_config": CompileConfig()}, "compile_config=.* has no effect without cache_implementation"),
    ({"synced_gpus": True}, "synced_gpus needs left_to_right=True"),
    ({"tokenizer": "a name"}, "tokenizer is read with stop_strings only"),
]


@pytest.mark.parametrize(("options", "message"), NO_EFFECT, ids=[str(options) for options, _ in NO_EFFECT])
def test_an_option_without_effect_is_refused(options, message):
    refused(message, **options)
    config = {name: value for name, value in options.items() if name not in ("synced_gpus", "tokenizer")}
    if config:
        refused(message, generation_config=InsertionGenerationConfig(**config))


def test_a_config_with_the_defaults_filled_in_asks_for_nothing_as_a_pipeline_gives_it():
    model = writing_model(seed=0)
    filled, _ = model._prepare_generation_config(None)
    assert filled.keyword_bias == 7.0 and model.generation_config.keyword_bias is None
    plain = model.generate(PROMPT, max_new_tokens=3)
    assert same_bits(model.generate(PROMPT, max_new_tokens=3, generation_config=filled), plain)
    # control: another value asks, and so does the default as a keyword argument
    filled.keyword_bias = 3.0
    for options in ({"generation_config": filled}, {"keyword_bias": 7.0}):
        with pytest.raises(ValueError, match="keyword_bias has no effect without pending keywords"):
            model.generate(PROMPT, max_new_tokens=3, **options)


def test_what_a_checkpoint_sets_may_rest():
    model = writing_model(seed=0)
    model.generation_config.update(slot_temperature=0.5, ebr_window=3, ebr_ratio=0.5, slot_top_p=0.9)
    model.generate(PROMPT, max_new_tokens=2, ebr=False)
    model.generate(PROMPT, max_new_tokens=2, generation_config=model.generation_config, eos_token_id=2, bos_token_id=1)
    model.generate(PROMPT, max_new_tokens=2, eos_token_id=[2])
    # control: what has an effect is taken
    model.generate(PROMPT, max_new_tokens=2, do_sample=True, seed=1, slot_temperature=2.0, ebr=True, ebr_window=4)


NONSENSE = [
    ("max_new_tokens", 1.5),
    ("max_new_tokens", True),
    ("max_new_tokens", -3),
    ("max_new_tokens", 0),
    ("max_length", 2.5),
    ("no_repeat_ngram_size", -1),
    ("no_repeat_ngram_size", 2.0),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", float("nan")),
    ("length_penalty", float("inf")),
    ("max_time", -1),
    ("do_sample", "yes"),
    ("return_dict_in_generate", 1),
    ("pad_token_id", -1),
    ("pad_token_id", 1.0),
]


@pytest.mark.parametrize("left_to_right", [False, True])
@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_nonsense_is_refused_by_name_and_value(name, value, left_to_right):
    refused(f"{name} must be .*, got {value!r}", **{name: value}, left_to_right=left_to_right)


@pytest.mark.parametrize("left_to_right", [False, True])
def test_a_padding_token_outside_the_vocabulary_is_refused(left_to_right):
    refused(r"pad_token_id must be in \[0, 13\), got 13", pad_token_id=13, left_to_right=left_to_right)
    MODEL.generate(PROMPT, pad_token_id=12, max_new_tokens=1, left_to_right=left_to_right)


def test_of_two_lengths_in_one_call_a_warning_names_the_one_that_counts():
    source = logging.get_logger("modeling_insnext.insnext.generation_insnext")
    with CaptureLogger(source) as said:
        assert MODEL.generate(PROMPT, max_new_tokens=2, min_new_tokens=2, max_length=20).shape[1] == 6
    assert "max_new_tokens=2 counts" in said.out and "max_length=20 does not" in said.out
    with CaptureLogger(source) as said:
        MODEL.generate(PROMPT, max_length=6)
    assert not said.out


def test_integers_of_numpy_are_integers():
    assert MODEL.generate(PROMPT, max_new_tokens=np.int64(2), min_new_tokens=np.int64(2)).shape == (1, 6)


MESSAGES = [
    ({"position_ids": PROMPT}, "unknown generation option 'position_ids': the positions follow from the canvas"),
    ({"past_key_values": 1}, "unknown generation option 'past_key_values': generate makes its own cache"),
    ({"inputs_embeds": 1}, "unknown generation option 'inputs_embeds': text is inserted by its tokens"),
    ({"min_gap_tokens": 1.5}, "min_gap_tokens must be integers, got 1.5"),
    ({"max_gap_tokens": True}, "max_gap_tokens must be integers, got True"),
    ({"min_gap_tokens": torch.tensor([[1.5]])}, "min_gap_tokens must be integers"),
    ({"left_to_right": True, "slot_mask": PROMPT > 0}, "slot_mask belongs to a canvas, .* drop left_to_right=True"),
    ({"left_to_right": True, **{k: v for k, v in canvas_of([[(BOS, True)]]).items() if k == "gap_ids"}},
     "gap_ids belongs to a canvas"),
    ({"max_new_tokens": -3}, "max_new_tokens must be an integer of at least 1, got -3"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MESSAGES, ids=[str(list(options)) for options, _ in MESSAGES])
def test_a_message_names_the_rule_and_what_to_do(options, message):
    refused(message, **options)


@pytest.mark.parametrize("left_to_right", [False, True])
def test_options_in_a_dictionary_are_no_generation_config(left_to_right):
    refused("generation_config must be a GenerationConfig, .* got dict", TypeError, generation_config={},
            left_to_right=left_to_right)  # fmt: skip
    MODEL.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=1), left_to_right=left_to_right)


STOCK = [
    (generation.NoBadWordsLogitsProcessor([[5, 6]]), "use bad_words_ids"),
    (generation.NoRepeatNGramLogitsProcessor(2), "use no_repeat_ngram_size"),
    (generation.MinNewTokensLengthLogitsProcessor(4, 2, 2), "use min_new_tokens"),
    (generation.ForcedEOSTokenLogitsProcessor(9, 2), "use a canvas"),
]


@pytest.mark.parametrize(("processor", "message"), STOCK)
def test_a_stock_processor_that_reads_the_end_of_a_text_is_refused(processor, message):
    with pytest.raises(ValueError, match=f"{type(processor).__name__} reads the end of a text, .*: {message}"):
        MODEL.generate(PROMPT, logits_processor=[processor])
    MODEL.generate(PROMPT, logits_processor=[processor], left_to_right=True, max_new_tokens=1)
    MODEL.generate(PROMPT, logits_processor=[generation.TemperatureLogitsWarper(2.0)], max_new_tokens=1)


def test_a_stock_criterion_that_reads_the_end_of_a_text_is_refused():
    refused("EosTokenCriteria reads the end", stopping_criteria=[generation.EosTokenCriteria(2)])
    MODEL.generate(PROMPT, stopping_criteria=[generation.MaxTimeCriteria(9.0)], max_new_tokens=1)


@pytest.mark.parametrize("streamer", [object(), print, type("Half", (), {"put": print})()])
def test_what_is_no_streamer_is_found_before_any_work(streamer):
    refused("a streamer has the methods put and end", TypeError, streamer=streamer)


def test_two_seeds_share_the_draws_of_no_row():
    def texts(seed):
        out = MODEL.generate(
            torch.tensor([[BOS]]), do_sample=True, seed=seed, num_return_sequences=4, max_new_tokens=12,
            min_new_tokens=12, temperature=5.0, slot_temperature=5.0,
        )  # fmt: skip
        return {tuple(text) for text in out.tolist()}

    drawn = [texts(seed) for seed in range(6)]
    assert len(set().union(*drawn)) == 6 * 4
    assert texts(3) == drawn[3]
    # control: seeds that are given one a row are taken as they are
    assert texts([1, 2, 3, 4]) & texts([2, 3, 4, 5])


def test_a_list_of_seeds_has_one_for_every_text():
    refused("one for each of the 3 texts, got 2", do_sample=True, seed=[1, 2], num_return_sequences=3)
    MODEL.generate(PROMPT, do_sample=True, seed=[1, 2, 3], num_return_sequences=3, max_new_tokens=1)


class TestStopStrings:
    """A finished text that grew to the right of its prompt is cut behind the first stop string."""

    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64)

    def generate(self, texts=("the old man", "a"), **options):
        ids = self.tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")
        options = {"max_new_tokens": 12, "min_new_tokens": 12, **options}
        return ids["input_ids"], self.model.generate(**ids, return_dict_in_generate=True, **options)

    def test_the_text_ends_behind_the_first_stop_string_from_the_left(self):
        given, plain = self.generate()
        width = given.shape[1]
        piece = self.tokenizer.decode(plain.sequences[0, width + 2 : width + 3])
        _, cut = self.generate(stop_strings=piece, tokenizer=self.tokenizer)
        for row, (ids, steps) in enumerate(zip(cut.sequences, cut.insertion_steps, strict=True)):
            kept = int((steps != -2).nonzero().max()) + 1
            assert ids[:kept].tolist() == plain.sequences[row, :kept].tolist()
            assert steps[:kept].tolist() == plain.insertion_steps[row, :kept].tolist()
            behind = self.tokenizer.decode(ids[width:kept])
            assert behind.count(piece) <= 1 and (kept == plain.sequences.shape[1] or behind.endswith(piece))
            assert kept > width
        assert int((cut.insertion_steps[0] > 0).sum()) <= 3

    def test_what_the_prompt_holds_stops_nothing(self):
        given, cut = self.generate(["the old man"], stop_strings=["old"], tokenizer=self.tokenizer)
        assert cut.sequences[0, : given.shape[1]].tolist() == given[0].tolist()
        assert cut.sequences.shape[1] > given.shape[1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"stop_strings": "a"}, "stop_strings needs tokenizer"),
            ({"stop_strings": "a", "tokenizer": 1, "num_beams": 2}, "finished and ranked, got num_beams=2"),
            ({"stop_strings": "a", "tokenizer": 1, "slot_mask": PROMPT > 0}, "only the last slot may be open, row 0"),
        ],
    )
    def test_where_nothing_can_be_cut_they_are_refused(self, options, message):
        refused(message, **options)

    def test_a_text_streamer_prints_the_text_that_is_cut(self, capsys):
        given, plain = self.generate(["the old man"])
        piece = self.tokenizer.decode(plain.sequences[0, given.shape[1] + 1 : given.shape[1] + 2])
        streamer = TextStreamer(self.tokenizer)
        _, cut = self.generate(["the old man"], stop_strings=piece, tokenizer=self.tokenizer, streamer=streamer)
        assert capsys.readouterr().out.strip() == self.tokenizer.decode(cut.sequences[0]).strip()
        assert PAD not in cut.sequences[0, given.shape[1] :].tolist()
