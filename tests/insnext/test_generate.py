"""When a text ends, what criteria and streamers see, prompts without a canvas, precedence of options, misuse."""

from collections import Counter

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, StoppingCriteria, TextStreamer

from modeling_insnext.insnext.generation_configuration import InsertionGenerationConfig
from tests.support.equality import same_bits
from tests.support.generation_twins import canvas_of, writing_model
from tests.support.insnext import BOS, PAD
from tests.support.one_canvas import MODEL, PROMPT, Watch, run, written


class Watching(StoppingCriteria):
    def __init__(self, ends):
        self.ends, self.texts = ends, []

    def __call__(self, input_ids, scores, **kwargs):
        self.texts.append(input_ids.tolist())
        return torch.tensor([self.ends(row) for row in input_ids.tolist()])


def test_criteria_see_the_text_from_left_to_right_and_end_their_row_alone():
    watching = Watching(lambda row: len([token for token in row if token != PAD]) >= 6)
    canvas = canvas_of([[(BOS, True)], [(BOS, True), (5, False), (9, True), (4, True)]])
    out = MODEL.generate(
        **canvas, max_new_tokens=9, min_new_tokens=9, stopping_criteria=[watching], return_dict_in_generate=True
    )
    assert (out.insertion_steps >= -1).sum(1).tolist() == [6, 6]
    assert watching.texts[-1] == out.sequences.tolist()
    assert all(texts[1] == out.sequences[1].tolist() + [PAD] * (len(texts[1]) - 6) for texts in watching.texts[1:])
    assert {len(texts) for texts in watching.texts} == {2}


def test_max_time_ends_all_texts_after_the_step_in_which_it_passes():
    assert len(written(run(max_time=1e-9, min_new_tokens=None))) == 1


class Letters:
    """A tokenizer as streamers need it."""

    all_special_ids = [0, 1, 2]

    def decode(self, ids, **kwargs):
        return "".join(chr(97 + int(token)) for token in ids if int(token) > 2)


class Drafts:
    def __init__(self):
        self.drafts, self.final, self.ended = [], None, False

    def put_draft(self, value):
        self.drafts.append(value[0].tolist())

    def put(self, value):
        self.final = value.tolist()

    def end(self):
        self.ended = True


def test_a_streamer_of_drafts_sees_every_state_of_the_text():
    streamer = Drafts()
    out = run(streamer=streamer)
    assert streamer.final == out.sequences.tolist() and streamer.ended
    assert [len(draft) for draft in streamer.drafts] == list(range(5, 13))
    for step, draft in enumerate(streamer.drafts, 1):
        assert draft == out.sequences[0][out.insertion_steps[0] <= step].tolist()


@pytest.mark.parametrize("skip", [False, True])
def test_a_text_streamer_prints_the_finished_text_without_a_skipped_prompt(skip, capsys):
    streamer = TextStreamer(Letters(), skip_prompt=skip)
    text = MODEL.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, streamer=streamer)[0]
    assert capsys.readouterr().out.strip() == Letters().decode(text[4 if skip else 0 :])


def test_a_text_streamer_refuses_several_texts_before_any_work():
    watch = Watch()
    with pytest.raises(ValueError, match="a TextStreamer shows one text, got 2"):
        MODEL.generate(PROMPT.repeat(2, 1), streamer=TextStreamer(Letters()), logits_processor=[watch])
    assert not watch.seen


def test_returned_sequences_stand_together_and_differ():
    canvas = canvas_of([[(BOS, True)], [(BOS, True), (5, False), (9, True)]])
    out = MODEL.generate(**canvas, do_sample=True, seed=0, num_return_sequences=5, max_new_tokens=6, min_new_tokens=6)
    assert out.shape[0] == 10
    assert all(row[0] == BOS for row in out[:5].tolist())
    assert all(Counter(row)[5] >= 1 and Counter(row)[9] >= 1 for row in out[5:].tolist())
    assert len({tuple(row) for row in out.tolist()}) > 5
    with pytest.raises(ValueError, match="num_return_sequences"):
        MODEL.generate(PROMPT, num_return_sequences=2)


def test_the_same_seed_writes_the_same_and_leaves_the_global_generator_alone():
    torch.manual_seed(4)
    before = torch.get_rng_state()
    first = run(do_sample=True, seed=9).sequences
    assert same_bits(before, torch.get_rng_state())
    assert same_bits(first, run(do_sample=True, seed=9).sequences)
    assert not same_bits(first, run(do_sample=True, seed=10).sequences)
    with pytest.raises(ValueError, match="one for each of the 1 texts, got 2"):
        run(do_sample=True, seed=[1, 2])


def test_keywords_overrule_the_generation_config_and_that_the_models_own():
    model = writing_model(seed=0)
    model.generation_config.max_new_tokens = 3
    model.generation_config.min_new_tokens = 3
    assert model.generate(PROMPT).shape[1] == 7
    for kind in (InsertionGenerationConfig, GenerationConfig):
        config = kind(max_new_tokens=5, min_new_tokens=5)
        assert model.generate(PROMPT, generation_config=config).shape[1] == 9
        assert model.generate(PROMPT, generation_config=config, max_new_tokens=6, min_new_tokens=6).shape[1] == 10
        assert config.max_new_tokens == 5
    assert model.generation_config.max_new_tokens == 3


def test_a_prompt_without_a_canvas_grows_to_its_right_only():
    out = MODEL.generate(PROMPT, max_new_tokens=9, min_new_tokens=9, return_dict_in_generate=True)
    assert out.sequences[0, :4].tolist() == PROMPT[0].tolist()
    assert out.insertion_steps[0, :4].tolist() == [-1] * 4
    # by insertion: not every token was written at the right end
    assert out.insertion_steps[0, 4:].tolist() != list(range(1, 10))


def test_prompts_padded_on_the_left_are_continued_like_prompts_alone():
    ids = torch.tensor([[PAD, PAD, BOS, 5], PROMPT[0].tolist()])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    both = MODEL.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5)
    # the padding stays where it was, as in Transformers
    assert both[0, :2].tolist() == [PAD, PAD]
    assert both[0, 2:].tolist() == MODEL.generate(ids[:1, 2:], max_new_tokens=5, min_new_tokens=5)[0].tolist()
    assert both[1].tolist() == MODEL.generate(PROMPT, max_new_tokens=5, min_new_tokens=5)[0].tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_the_padding_token_of_the_call_fills_both_sides(options):
    ids = torch.tensor([[PAD, PAD, BOS, 5], PROMPT[0].tolist()])
    slots = torch.tensor([[False] * 4, [True] * 4])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"attention_mask": mask, "slot_mask": slots, "max_new_tokens": 3, **options}
    bounds = {"min_gap_tokens": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])}
    out = MODEL.generate(ids, pad_token_id=11, **options, **bounds)
    assert out.tolist()[0] == [11, 11, BOS, 5, 11, 11, 11]
    assert out.shape[1] == 7


def test_a_prompt_of_one_token_and_a_canvas_without_an_open_slot():
    assert MODEL.generate(torch.tensor([[BOS]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 4)
    for options in ({}, {"num_beams": 2}, {"do_sample": True}, {"ebr": True}, {"parallel_slots": 3}):
        closed = MODEL.generate(PROMPT, slot_mask=torch.zeros(1, 4, dtype=torch.bool), **options)
        assert closed.tolist() == PROMPT.tolist()


def test_a_text_grows_to_the_longest_the_model_has_and_no_further():
    for length, most in ((20, 24), (24, 24)):
        prompt = torch.full((1, length), 5)
        for options in ({}, {"num_beams": 2}, {"parallel_slots": 3}, {"cache_implementation": "static", "ebr": True}):
            out = MODEL.generate(prompt, max_new_tokens=40, min_new_tokens=24 - length, **options)
            assert out.shape[1] == most
    with pytest.raises(ValueError, match="25 given tokens .* longest text is 24"):
        MODEL.generate(torch.full((1, 25), 5))
    with pytest.raises(ValueError, match="min_new_tokens must not exceed what the gaps can take, 4, got 5"):
        MODEL.generate(torch.full((1, 20), 5), max_new_tokens=9, min_new_tokens=5)


@pytest.mark.parametrize("left_to_right", [False, True])
def test_no_new_tokens_are_refused_as_in_transformers(left_to_right):
    with pytest.raises(ValueError, match="max_new_tokens"):
        MODEL.generate(PROMPT, max_new_tokens=0, left_to_right=left_to_right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_token": 3}, "unknown generation option 'max_new_token', did you mean 'max_new_tokens'"),
        ({"output_scores": True}, "output_scores=True has no meaning when text is inserted"),
        ({"slot_masks": 3}, "did you mean 'slot_mask'"),
        ({"token_type_ids": PROMPT}, "unknown generation option 'token_type_ids'"),
        ({"input_ids": PROMPT}, "exactly one of inputs and input_ids"),
        ({"assistant_model": MODEL}, "assistant_model needs left_to_right=True"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens must not exceed max_new_tokens"),
        ({"slot_mask": torch.ones(1, 3, dtype=torch.bool)}, "slot_mask must have shape"),
    ],
)
def test_misuse_raises_before_any_work(options, message):
    watch = Watch()
    with pytest.raises(ValueError, match=message):
        MODEL.generate(PROMPT, logits_processor=[watch], **options)
    assert not watch.seen


def test_max_length_counts_each_rows_own_tokens():
    model = writing_model()
    ids, mask = torch.tensor([[1, 5, 6, 7, 8], [1, 5, 0, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    given = {"input_ids": ids, "attention_mask": mask, "min_new_tokens": 2}
    lengths = (model.generate(**given, max_length=7, return_dict_in_generate=True).insertion_steps != -2).sum(1)
    assert lengths[0] == 7 and lengths[1] <= 7
    alone = model.generate(ids[1:, :2], min_new_tokens=2, max_length=7)
    assert lengths[1] == alone.shape[1]
    exact = model.generate(ids[1:, :2], min_new_tokens=18, max_length=20)
    assert exact.shape[1] == 20, "an explicit max_length of 20 is no default"
    unset = model.generate(ids[1:, :2], min_new_tokens=20)
    assert unset.shape[1] == 22, "unset, 20 new tokens"


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_text():
    model = writing_model()
    given = {"inputs": torch.tensor([[1, 5, 6], [1, 7, 8]]), "max_new_tokens": 12, "min_new_tokens": 12, "ebr": True}
    plain = model.generate(**given, cache_implementation="static")
    compiled = model.generate(
        **given, cache_implementation="static", compile_config=CompileConfig(mode="default", dynamic=False)
    )
    assert same_bits(plain, compiled) and hasattr(model, "_compiled_encoder")
    assert not any("_compiled" in name for name in model.state_dict())
    assert not same_bits(plain, model.generate(**{**given, "min_new_tokens": 11, "max_new_tokens": 11}))
