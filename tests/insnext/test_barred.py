"""A chosen slot into which no token may be written ends its row alone, or says who barred them."""

import pytest
import torch
from transformers import LogitsProcessor

from modeling_insnext.insnext.canvas import Canvas
from tests.insnext.test_rows import MODES
from tests.support.generation_twins import canvas_of, writing_model
from tests.support.insnext import BOS, EOS, PAD, tiny_model
from tests.support.tokenizers import tiny_tokenizer


MODEL = writing_model(seed=0, max_position_embeddings=24)
TWO_ROWS = canvas_of([[(BOS, True), (4, True)], [(BOS, True), (5, True)]])
TOKENS = set(range(MODEL.config.vocab_size)) - {PAD, BOS, EOS}
every_mode = pytest.mark.parametrize("mode", MODES)


def run(mode, **options):
    model, canvas = options.pop("model", MODEL), options.pop("canvas", TWO_ROWS)
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, **MODES[mode], **options}
    return model.generate(**canvas, **options)


def written(out):
    return (out.insertion_steps >= 1).sum(1).tolist()


class Until(LogitsProcessor):
    """Bars every token of the first texts of a batch once they have so many; `copies` texts a canvas."""

    def __init__(self, tokens, copies):
        self.tokens, self.copies = tokens, copies

    def __call__(self, input_ids, scores):
        barred = (input_ids != PAD).sum(1) >= self.tokens
        barred[self.copies :] = False
        return scores.masked_fill(barred[:, None], -torch.inf)


def until(mode, tokens, how):
    """Return options that bar every token of the first row from `tokens` on."""
    if how == "processor":
        return {"logits_processor": [Until(tokens, MODES[mode].get("num_beams", 1))]}
    return {"prefix_allowed_tokens_fn": lambda row, ids: [] if row == 0 and len(ids) >= tokens else list(TOKENS)}


@pytest.mark.parametrize("how", ["processor", "prefix"])
@every_mode
def test_a_row_without_a_token_stops_and_the_others_write_what_they_would_have(mode, how):
    minima = {"min_gap_tokens": torch.tensor([[0, 0], [3, 3]])}
    canvas = {**TWO_ROWS, **minima}
    free = run(mode, canvas=canvas)
    out = run(mode, canvas=canvas, **until(mode, 2, how))
    assert written(out)[0] == 0 < min(written(free))
    assert out.sequences[1][: 2 + written(free)[1]].tolist() == free.sequences[1][: 2 + written(free)[1]].tolist()


@pytest.mark.parametrize("how, name", [("processor", "Until 10"), ("prefix", "prefix_allowed_tokens_fn 10")])
@every_mode
def test_a_row_that_may_not_stop_raises_and_the_message_names_it_and_who_barred_the_tokens(mode, how, name):
    with pytest.raises(ValueError, match=f"row 0, .* it has 2 of min_new_tokens=6; .* {name}$"):
        run(mode, min_new_tokens=6, **until(mode, 4, how))


@every_mode
def test_each_voice_is_counted_for_what_the_ones_before_it_left(mode):
    # no token is left once each has had its say: 3 and 4 glue, 5 and 6 are banned, 7 and 8 suppressed
    canvas = Canvas.from_ids(torch.tensor([[BOS, 9], [BOS, 9]]), word_end_mask=torch.tensor([[False, True]] * 2))
    canvas["slot_mask"] = torch.tensor([[False, True]] * 2)
    glues = torch.zeros(MODEL.config.vocab_size, dtype=torch.bool)
    glues[[3, 4]] = True
    canvas["continuation_mask"] = glues
    message = "pieces that continue a given word 2, bad_words_ids.* 2, prefix_allowed_tokens_fn 4, Suppress.* 2$"
    with pytest.raises(ValueError, match=message):
        run(
            mode,
            canvas=canvas,
            min_new_tokens=1,
            bad_words_ids=[[5], [6]],
            prefix_allowed_tokens_fn=lambda row, ids: [3, 5, 7, 8],
            suppress_tokens=[4, 6, 7, 8],
        )


@every_mode
def test_a_gap_below_its_minimum_keeps_its_row_from_stopping(mode):
    canvas = {**TWO_ROWS, "min_gap_tokens": torch.tensor([[0, 0], [0, 2]])}
    with pytest.raises(ValueError, match="row 1, .* it lacks 2 of the 2 tokens that gap 1 must get"):
        run(mode, canvas=canvas, prefix_allowed_tokens_fn=lambda row, ids: list(TOKENS) if row == 0 else [])
    nothing = run(mode, canvas=canvas, prefix_allowed_tokens_fn=lambda row, ids: [] if row == 0 else list(TOKENS))
    assert written(nothing)[0] == 0 and written(nothing)[1] >= 2


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "beams"])
def test_pending_keywords_keep_a_row_from_stopping_until_they_are_written(mode):
    pending = torch.full((2, 1, 1, 1), -1)
    pending[0] = 6
    canvas = Canvas.from_ids(
        **{**TWO_ROWS, "continuation_mask": torch.zeros(13, dtype=torch.bool), "pending_ids": pending}
    )
    # what begins a keyword is asked for like any token
    with pytest.raises(ValueError, match="row 0, .* it has 0 of min_new_tokens=3 and has 1 pending keywords left"):
        run(mode, canvas=canvas, keyword_bias=-30.0, min_new_tokens=3, suppress_tokens=sorted(TOKENS))
    out = run(mode, canvas=canvas, prefix_allowed_tokens_fn=lambda row, ids: [6] if row == 0 and 6 not in ids else [])
    assert 6 in out.sequences[0].tolist() and written(out) == [1, 0]


def test_a_later_slot_without_a_token_ends_the_step_and_not_the_row():
    first = []

    def barred_beside(row, ids):
        # the first slot of each step, in which the whole text of the step before stands, is free
        first.append(len(ids))
        return list(TOKENS) if first.count(len(ids)) == 1 and len(ids) % 2 == 0 else []

    canvas = canvas_of([[(BOS, True), (4, True)]])
    free = run("parallel", canvas=canvas, min_new_tokens=8)
    assert max(free.insertion_steps[0].tolist()) < 8
    out = run("parallel", canvas=canvas, prefix_allowed_tokens_fn=barred_beside)
    assert [step for step in out.insertion_steps[0].tolist() if step > 0] == [1]


def test_a_document_stays_as_it_is_where_nothing_may_be_written():
    tokenizer = tiny_tokenizer(vocab_size=290, all_bytes=True, add_prefix_space=False)
    document = tiny_model(vocab_size=290).open(tokenizer, "the old man")
    barred = {"prefix_allowed_tokens_fn": lambda row, ids: []}
    before = document.ids
    assert document.write(7, **barred) == "" and document.ids == before
    with pytest.raises(ValueError, match="row 0, .* it has 0 of min_new_tokens=2; .* prefix_allowed_tokens_fn "):
        document.write(7, min_new_tokens=2, **barred)
    assert document.text == "the old man" and document.ids == before
