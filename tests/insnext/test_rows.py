"""Rows stay in their batch: criteria, processors and streamers see all of them, in order, at every step."""

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from modeling_insnext.insnext.write_sample import write_tokens
from tests.support.generation_twins import canvas_of, writing_model
from tests.support.insnext import BOS, PAD


MODEL = writing_model(seed=0, max_position_embeddings=24)
IDS = torch.tensor([[PAD, PAD, BOS, 5], [BOS, 5, 9, 4]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": [3, 8]},
    "parallel": {"parallel_slots": 2},
    "static": {"cache_implementation": "static"},
    "ebr": {"ebr": True, "ebr_ratio": 0.5},
    "beams": {"num_beams": 2},
}
every_mode = pytest.mark.parametrize("mode", MODES)


class Limits(StoppingCriteria):
    """Ends row i once it has `limits[i]` tokens more than it was given, as users write it."""

    def __init__(self, limits, given=2):
        self.limits, self.given, self.shapes = torch.tensor(limits), given, []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append(len(input_ids))
        return (input_ids != PAD).sum(1) - self.given >= self.limits


def written(out):
    return (out.insertion_steps >= 1).sum(1).tolist()


def run(mode, **options):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "return_dict_in_generate": True, **MODES[mode], **options}
    return MODEL.generate(**canvas_of([[(BOS, True), (4, True)], [(BOS, True), (5, True)]]), **options)


@every_mode
def test_a_criterion_with_a_limit_for_each_row_stops_each_row_at_its_own(mode):
    copies = MODES[mode].get("num_beams", 1)
    criterion = Limits([limit for limit in (2, 6) for _ in range(copies)])
    assert written(run(mode, stopping_criteria=[criterion])) == [2, 6]
    assert set(criterion.shapes) == {2 * copies}
    other_way = Limits([limit for limit in (6, 2) for _ in range(copies)])
    assert written(run(mode, stopping_criteria=[other_way])) == [6, 2]


class Allowed(LogitsProcessor):
    """Lets row i write token `tokens[i]` only, from a state made for the whole batch."""

    def __init__(self, tokens, vocab=13):
        self.barred = torch.ones(len(tokens), vocab, dtype=torch.bool)
        self.barred[torch.arange(len(tokens)), torch.tensor(tokens)] = False
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(len(input_ids))
        return scores.masked_fill(self.barred, -torch.inf)


@every_mode
def test_a_processor_with_a_rule_for_each_row_applies_it_to_that_row_to_the_end(mode):
    copies = MODES[mode].get("num_beams", 1)
    processor = Allowed([token for token in (6, 7) for _ in range(copies)])
    criterion = Limits([limit for limit in (2, 6) for _ in range(copies)])
    out = run(mode, logits_processor=[processor], stopping_criteria=[criterion])
    for row, (token, count) in enumerate([(6, 2), (7, 6)]):
        assert out.sequences[row][out.insertion_steps[row] > 0].tolist() == [token] * count
    assert set(processor.calls) == {2 * copies}


def test_control_rows_that_leave_the_batch_give_their_rule_to_others(monkeypatch):
    def leave(draft, sampler, slots, takes, rules):
        # as if the first row had gone: what is left of the batch moves up
        rows = draft.running.nonzero().squeeze(1)
        if len(rows) < 2:
            draft.select_rows(rows)
            return write_tokens(draft, sampler, slots[rows], takes[rows], rules)
        return write_tokens(draft, sampler, slots, takes, rules)

    monkeypatch.setattr("modeling_insnext.insnext.write_sample.write_tokens", leave)
    with pytest.raises((IndexError, RuntimeError)):
        run("greedy", logits_processor=[Allowed([6, 7])], stopping_criteria=[Limits([2, 6])])


@every_mode
def test_texts_that_criteria_see_are_those_of_the_output_with_its_left_padding(mode):
    seen = []

    def watch(input_ids, scores, **kwargs):
        seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    out = MODEL.generate(
        IDS,
        attention_mask=MASK,
        max_new_tokens=6,
        min_new_tokens=6,
        stopping_criteria=[watch],
        return_dict_in_generate=True,
        **MODES[mode],
    )
    assert out.sequences[0, :4].tolist() == IDS[0].tolist() and out.sequences.shape[1] == 10
    for texts in seen:
        assert (texts[: len(texts) // 2, :4] == IDS[0]).all() and (texts[len(texts) // 2 :, :4] == IDS[1]).all()
    last = seen[-1]
    for row, copies in enumerate(last.chunk(2)):
        assert out.sequences[row].tolist() in copies.tolist()


class FirstStop(StoppingCriteria):
    """Looks for token ids behind the width of the prompts and remembers each row's answer, as lm-eval does."""

    def __init__(self, token, width, rows):
        self.token, self.width, self.done = token, width, [False] * rows

    def __call__(self, input_ids, scores, **kwargs):
        for row, ids in enumerate(input_ids[:, self.width :]):
            self.done[row] = self.done[row] or bool((ids == self.token).any())
        return torch.tensor(self.done)


@pytest.mark.parametrize("left_to_right", [False, True])
def test_criteria_with_a_memory_for_each_row_work_on_left_padded_prompts(left_to_right):
    plain = MODEL.generate(
        IDS, attention_mask=MASK, max_new_tokens=6, min_new_tokens=6, left_to_right=left_to_right, do_sample=False
    )
    token = int(plain[1, 4])
    out = MODEL.generate(
        IDS,
        attention_mask=MASK,
        max_new_tokens=6,
        min_new_tokens=6,
        left_to_right=left_to_right,
        stopping_criteria=[FirstStop(token, 4, 2)],
    )
    assert out[1, 4:].tolist().count(token) == 1
    assert out.shape[0] == 2 and (out[:, :4] == IDS).all()


class Drafts:
    def __init__(self):
        self.drafts = []

    def put_draft(self, value):
        self.drafts.append(value.tolist())

    def put(self, value):
        self.final = value.tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "beams"])
def test_a_streamer_of_drafts_is_shown_all_rows_at_every_step(mode):
    streamer = Drafts()
    out = run(mode, streamer=streamer, stopping_criteria=[Limits([2, 6])])
    assert {len(draft) for draft in streamer.drafts} == {2}
    assert streamer.drafts[-1] == out.sequences.tolist() == streamer.final


@pytest.mark.parametrize("pad", [PAD, 6])
def test_padding_counts_as_no_token_of_a_shorter_row(pad):
    # 6 is a token like others, here in the padding of the shorter row
    canvas = canvas_of([[(BOS, True)], [(BOS, True), (5, True), (9, True), (4, True), (7, True)]])
    options = dict(pad_token_id=pad, repetition_penalty=9.0, max_new_tokens=6, min_new_tokens=6)
    both = MODEL.generate(**canvas, **options)[0, :7].tolist()
    assert both == MODEL.generate(torch.tensor([[BOS]]), **options)[0].tolist()
    # control: what the penalty counts changes the text
    assert both != MODEL.generate(torch.tensor([[BOS]]), **{**options, "repetition_penalty": 1.0})[0].tolist()


@pytest.mark.parametrize("mode", [{"do_sample": True, "seed": 1}, {"num_beams": 3}])
def test_allowed_tokens_are_asked_for_by_the_row_of_the_canvas_however_many_texts_it_gives(mode):
    canvas = canvas_of([[(BOS, True)], [(BOS, True)]])
    out = MODEL.generate(
        **canvas, **mode, num_return_sequences=3, max_new_tokens=3, min_new_tokens=2,
        prefix_allowed_tokens_fn=lambda row, ids: [[6, 7], [8, 9]][row],
    )  # fmt: skip
    for row, texts in enumerate(out.split(3)):
        assert set(texts.flatten().tolist()) <= {PAD, BOS, *[(6, 7), (8, 9)][row]}
