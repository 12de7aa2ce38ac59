"""The cache is exact: every step of `generate` scores what one whole forward pass over the text scores."""

import pytest
import torch

from modeling_insnext.insnext.draft import Draft
from modeling_insnext.insnext.generation_configuration import InsertionGenerationConfig
from tests.support.equality import same_bits
from tests.support.generation_twins import HandTwin, TextTwin, canvas_of, draft_of, greedy_twin, row_of, writing_model
from tests.support.insnext import BOS, PAD


MODEL = writing_model()
TEXT = [BOS, 5, 9, 4, 9]
OPEN = [True, False, True, True, True]
EBR = {
    "off": {},
    "ratio_1": {"ebr": True},
    "every_step": {"ebr": True, "ebr_ratio": 0},
    "window": {"ebr": True, "ebr_ratio": 0.3, "ebr_window": 3},
}
RAGGED = canvas_of([
    [(BOS, True), (5, False), (9, True)],
    [(BOS, True)],
    [(BOS, False), (4, True), (4, False), (7, True), (11, False), (3, True), (6, True)],
    [(BOS, True), (12, True)],
])  # fmt: skip
every_ebr = pytest.mark.parametrize("ebr", EBR)


def rule_of(options):
    return options.get("ebr_ratio", 1.0) if options.get("ebr") else None, options.get("ebr_window")


def ebr_of(ratio, window=None):
    return InsertionGenerationConfig(ebr=ratio is not None, ebr_ratio=ratio, ebr_window=window)


def write_all(draft, writes):
    """Write the (slot, token) pairs of each row."""
    for q in range(max(map(len, writes))):
        pairs = torch.tensor([row[q] if q < len(row) else (0, 0) for row in writes])
        draft.write(pairs[:, 0], pairs[:, 1], torch.tensor([q < len(row) for row in writes]))


def random_writes(twin, generator, most):
    count = min(len(twin.ids), int(torch.randint(1, most + 1, (1,), generator=generator)))
    slots = torch.randperm(len(twin.ids), generator=generator)[:count].tolist()
    return [(slot, int(torch.randint(3, 13, (1,), generator=generator))) for slot in slots]


def largest_error(ebr, parallel, static=False, model=MODEL, steps=14, kind=None, counted=True):
    """Return the largest difference to the twin of any slot, STOP or token logit while rows grow at random."""
    ratio, window = rule_of(EBR[ebr])
    starts = [TEXT, [BOS], [BOS, 3, 4]]
    canvas = canvas_of([[(token, True) for token in ids] for ids in starts])
    draft = draft_of(model, canvas, steps * parallel, parallel=parallel, static=static)
    kind = kind or (HandTwin if window else TextTwin)
    twins = [kind(model, ids, range(len(ids))) for ids in starts]
    generator = torch.Generator().manual_seed(7)
    worst = 0.0
    for step in range(1, steps + 1):
        writes = [random_writes(twin, generator, parallel) for twin in twins]
        if step % 5 == 0:
            writes[1] = []  # a row rests
        write_all(draft, writes)
        draft.encode(ebr_of(ratio, window))
        present = torch.arange(draft.width) < draft.lengths[:, None]
        scores = draft.slot_scores(present, torch.ones(3, dtype=torch.bool))
        for row, twin in enumerate(twins):
            if writes[row]:
                twin.insert(writes[row], step, ratio, window)
            slots, stop, tokens = twin.scores()
            length = len(twin.ids)
            states = model.slot_head.token_state(draft.slots[row, :length], draft.state[row])
            mine = model.token_logits(states)
            worst = max(
                worst,
                float((scores[row, :length] - slots).abs().max()),
                abs(float(scores[row, -1] - stop)),
                float((mine[:, 3:] - tokens[:, 3:]).abs().max()),
            )
            assert draft.texts()[row, :length].tolist() == twin.tokens()
            assert draft.reencoded_at[row] == twin.struck
            assert int(draft.encoded_tokens[row]) == twin.encoded or not counted
    if ratio is not None:
        assert all(twin.struck for twin in twins)
    return worst


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("parallel", [1, 3])
@every_ebr
def test_scores_of_the_cache_are_those_of_one_whole_forward_at_every_step(ebr, parallel, static):
    assert largest_error(ebr, parallel, static) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        dict(position_encoding="sinusoidal"),
        dict(norm="deepnorm"),
        dict(num_key_value_heads=2),
        dict(block_attention="causal"),
        dict(block_attention="causal", position_encoding="rotary"),
    ],
)
def test_scores_of_the_cache_are_exact_in_every_kind_of_model(change):
    model = writing_model(**change, attn_implementation="eager")
    assert largest_error("ratio_1", 2, model=model, steps=8) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("model", [MODEL, writing_model(block_attention="causal")], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("ebr", ["off", "ratio_1", "window"])
def test_scores_of_the_cache_are_those_of_a_transformer_written_by_hand(ebr, model):
    assert largest_error(ebr, 2, model=model, kind=HandTwin) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("ebr", ["ratio_1", "window"])
def test_control_scores_differ_once_the_block_is_encoded_by_another_rule(ebr, monkeypatch):
    def other_block(self, rows, first):
        block(self, rows, first + (self.step > 0))

    block = Draft.encode_block
    monkeypatch.setattr(Draft, "encode_block", other_block)
    assert largest_error(ebr, 1, counted=False) > 1e-3


@torch.no_grad()
def test_after_reencoding_the_scores_are_those_of_the_text_given_at_once():
    draft = draft_of(MODEL, canvas_of([[(token, True) for token in TEXT]]), 15)
    twin = TextTwin(MODEL, TEXT, range(5))
    for step, (slot, token) in enumerate([(0, 6), (5, 7), (3, 8)], 1):
        write_all(draft, [[(slot, token)]])
        twin.insert([(slot, token)], step)
        draft.encode(ebr_of(None))
    everything = torch.ones(1, 8, dtype=torch.bool)
    stop = torch.ones(1, dtype=torch.bool)
    running = draft.slot_scores(everything, stop)
    draft.encode_block(torch.tensor([0]), torch.tensor([0]))
    order = torch.tensor([twin.text])
    fresh = MODEL.model(draft.texts(), is_causal=False).last_hidden_state
    assert (draft.left[0, order] - MODEL.slot_head.left_proj(fresh)).abs().max() < 1e-10
    assert (draft.slot_scores(everything, stop) - running).abs().max() > 1e-3


@pytest.mark.parametrize("parallel", [1, 3])
@every_ebr
def test_greedy_texts_are_those_of_a_loop_without_a_cache(ebr, parallel):
    lengths = set()
    for seed in range(4):
        model = writing_model(seed=seed)
        out = model.generate(
            torch.tensor([TEXT]), slot_mask=torch.tensor([OPEN]), max_new_tokens=12, parallel_slots=parallel,
            return_dict_in_generate=True, **EBR[ebr],
        )  # fmt: skip
        text, steps, twin = greedy_twin(model, TEXT, OPEN, 12, *rule_of(EBR[ebr]), parallel)
        assert out.sequences[0].tolist() == text
        assert out.insertion_steps[0].tolist() == steps
        assert out.reencoded_at[0] == twin.struck
        assert int(out.encoded_tokens[0]) == twin.encoded
        lengths.add(len(text))
    assert len(lengths) > 1 and max(lengths) > 5


MODES = {
    "greedy": {},
    "parallel": {"parallel_slots": 3},
    "static_parallel": {"cache_implementation": "static", "parallel_slots": 4},
    "sampling": {"do_sample": True, "seed": [3, 1, 4, 5]},
    "sampling_parallel": {"do_sample": True, "seed": [3, 1, 4, 5], "parallel_slots": 4, "slot_top_p": 0.95},
    "slot_window": {"do_sample": True, "seed": [3, 1, 4, 5], "slot_window": 2},
    "reading_order": {"do_sample": True, "seed": [3, 1, 4, 5], "reading_order": True, "parallel_slots": 2},
    "penalties": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "two_of_three_beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0},
}


def alone(model, row, options):
    options = {**options, "seed": [options["seed"][row]]} if "seed" in options else options
    return model.generate(**row_of(RAGGED, row), **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ebr", ["off", "ratio_1", "window"])
def test_a_ragged_batch_is_its_rows_alone(ebr, mode):
    struck = set()
    options = {**MODES[mode], **EBR[ebr], "max_new_tokens": 7, "min_new_tokens": 4, "return_dict_in_generate": True}
    batch = MODEL.generate(**RAGGED, **options)
    repeats = options.get("num_return_sequences", 1)
    assert len(batch.sequences) == 4 * repeats
    for row in range(4):
        single = alone(MODEL, row, options)
        for k in range(repeats):
            index = row * repeats + k
            length = int((single.insertion_steps[k] != -2).sum())
            for name, fill in (("sequences", PAD), ("insertion_steps", -2)):
                assert batch[name][index, :length].tolist() == single[name][k, :length].tolist()
                assert (batch[name][index, length:] == fill).all()
            assert int(batch.encoded_tokens[index]) == int(single.encoded_tokens[k])
            assert batch.reencoded_at[index] == single.reencoded_at[k]
            if batch.sequences_scores is not None:
                assert abs(float(batch.sequences_scores[index] - single.sequences_scores[k])) < 1e-6
            struck.add(tuple(single.reencoded_at[k]))
    assert len(struck) > 1 or ebr == "off"  # rows strike alone


def test_control_sampling_with_another_seed_writes_another_text():
    options = {**MODES["sampling"], "max_new_tokens": 9}
    assert not same_bits(alone(MODEL, 2, options), alone(MODEL, 2, {**options, "seed": [0, 0, 5, 0]}))


@pytest.mark.parametrize("ebr", EBR)
@pytest.mark.parametrize("parallel", [1, 4])
def test_dynamic_and_static_caches_write_the_same(ebr, parallel):
    options = {"max_new_tokens": 9, "parallel_slots": parallel, "do_sample": True, "seed": 11, **EBR[ebr]}
    dynamic = MODEL.generate(**RAGGED, **options)
    assert same_bits(dynamic, MODEL.generate(**RAGGED, **options, cache_implementation="static"))


@torch.no_grad()
def test_a_row_that_strikes_while_all_others_rest_loses_no_key():
    # the others' buffers are full, so the struck row's last entry needs room that only it asks for
    canvas = canvas_of([[(BOS, True), (4, True)], [(BOS, True), (5, True)]])
    draft = draft_of(MODEL, canvas, 38)
    twin = TextTwin(MODEL, [BOS, 4], [0, 1])
    for step in range(1, 30):
        write_all(draft, [[(0, 6)], []])
        draft.encode(ebr_of(0.2))
        twin.insert([(0, 6)], step, 0.2)
        slots, stop, _ = twin.scores()
        scores = draft.slot_scores(torch.arange(draft.width) < draft.lengths[:, None], torch.tensor([True, True]))
        assert (scores[0, :-1] - slots).abs().max() < 1e-10
