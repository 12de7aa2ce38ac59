"""Keywords whose form, place and order are chosen as the text is written, against all texts of a tiny vocabulary."""

import math
from collections import Counter, defaultdict
from functools import cache

import pytest
import torch

from modeling_insnext.insnext.canvas import Canvas
from tests.support.generation_twins import writing_model
from tests.support.insnext import BOS
from tests.support.pending_twin import PendingTwin


# four tokens that can be written, one of which glues
MODEL = writing_model(seed=3, vocab_size=7)
WRITTEN, GLUES = (3, 4, 5, 6), frozenset({6})
# scores are returned in float32
FLOAT32 = 1e-6
SETS = {
    "one word": [[(5,)]],
    "a longer form": [[(5,), (5, 6)]],
    "two keywords": [[(5,)], [(4,)]],
    "a phrase": [[(5, 3)]],
    "a phrase that begins like a word": [[(5,)], [(5, 4), (4,)]],
    "twice": [[(3,)], [(3,)]],
}
# a text of BOS alone begins with a keyword
STARTS = {name: (BOS,) if index % 2 else (BOS, 4) for index, name in enumerate(SETS)}
BIAS = 0.7


def canvas_of(name):
    """Return a canvas that is open everywhere, with the pending keywords of a set."""
    start, keywords = STARTS[name], SETS[name]
    glues = torch.zeros(MODEL.config.vocab_size, dtype=torch.bool)
    glues[list(GLUES)] = True
    ids = torch.full((1, len(keywords), max(map(len, keywords)), 2), -1)
    for k, forms in enumerate(keywords):
        for f, form in enumerate(forms):
            ids[0, k, f, : len(form)] = torch.tensor(form)
    slots = torch.ones(1, len(start), dtype=torch.bool)
    return Canvas.from_ids(torch.tensor([start]), slot_mask=slots, continuation_mask=glues, pending_ids=ids)


@cache
def all_texts(name, way="counted", limit=3):
    """Return the log-probability of every text, the sum over the sequences that write it, breadth first."""
    finished, running = defaultdict(list), [(0.0, ())]
    for _ in range(limit + 1):
        grown = []
        for log_p, writes in running:
            twin = PendingTwin(MODEL, STARTS[name], SETS[name], limit, GLUES, writes, BIAS)
            text = tuple(twin.twin.tokens())
            if twin.written == limit:
                assert not twin.left and not twin.busy
                finished[text].append(log_p)
                continue
            for slot, token, value in getattr(twin, way)(WRITTEN):
                if slot < 0:
                    finished[text].append(log_p + value)
                else:
                    grown.append((log_p + value, (*writes, (slot, token))))
        running = grown
    return {text: float(torch.tensor(mine, dtype=torch.float64).logsumexp(0)) for text, mine in finished.items()}


def generated(name, copies=1, **options):
    """Return what `generate` writes of up to three tokens, the texts as tuples."""
    canvas = canvas_of(name).repeat(copies)
    out = MODEL.generate(**canvas, max_new_tokens=3, return_dict_in_generate=True, **options)
    return [
        tuple(ids[steps != -2].tolist()) for ids, steps in zip(out.sequences, out.insertion_steps, strict=True)
    ], out


def holds(text, keywords):
    """Whether words of a text can be dealt out to the keywords, each whole in one of its forms."""
    if not keywords:
        return True
    for form in keywords[0]:
        for first in range(1, len(text) - len(form) + 1):
            end = first + len(form)
            if tuple(text[first:end]) == form and (end == len(text) or text[end] not in GLUES):
                # what one keyword has is no other's
                if holds((*text[:first], -1, *text[end:]), keywords[1:]):
                    return True
    return False


@pytest.mark.parametrize("name", SETS)
def test_once_all_orders_fit_beams_find_every_text_with_the_sum_over_its_orders(name):
    expected = all_texts(name)
    # 2 slots x 4 tokens, then 3 x 4, then 4 x 4: 1,536 orders of three insertions
    texts, out = generated(name, num_beams=1536, num_return_sequences=60, length_penalty=0.0)
    # where there are fewer texts, the last one stands there again
    scores = zip(texts, out.sequences_scores.tolist(), strict=True)
    found = {text: score for text, score in scores if score > -math.inf}
    assert set(found) == set(sorted(expected, key=lambda text: -expected[text])[:60])
    assert max(abs(score - expected[text]) for text, score in found.items()) < FLOAT32
    assert all(holds(text, SETS[name]) for text in expected)
    # control: what is drawn is another probability
    drawn = all_texts(name, "drawn")
    assert max(abs(score - drawn[text]) for text, score in found.items()) > 1e-3


@pytest.mark.parametrize("beams", [2, 4, 12])
def test_a_score_is_a_lower_bound_and_texts_with_fewer_keywords_left_keep_rows(beams):
    for name in SETS:
        expected = all_texts(name)
        texts, out = generated(name, num_beams=beams, num_return_sequences=beams, length_penalty=0.0)
        for text, score in zip(texts, out.sequences_scores.tolist(), strict=True):
            assert score == -math.inf or score < expected[text] + FLOAT32


@pytest.mark.parametrize("name", SETS)
def test_the_probabilities_of_what_is_drawn_sum_to_1(name):
    assert abs(sum(map(math.exp, all_texts(name, "drawn").values())) - 1) < 1e-10


@pytest.mark.parametrize("name", SETS)
def test_texts_are_drawn_as_the_definition_says(name):
    draws = 1000
    texts, _ = generated(name, draws, do_sample=True, seed=4, top_k=0, keyword_bias=BIAS)
    drawn, expected = Counter(texts), all_texts(name, "drawn")
    assert set(drawn) <= set(expected)

    def differs(log_p, text):
        # four and a half standard deviations of a proportion: a few hundred texts are looked at
        p = math.exp(log_p)
        return abs(drawn[text] / draws - p) > 4.5 * math.sqrt(p * (1 - p) / draws) + 1 / draws

    assert not any(differs(log_p, text) for text, log_p in expected.items())
    # control: other probabilities are noticed
    assert any(differs(min(log_p, 0.0), text) for text, log_p in all_texts(name).items())


@pytest.mark.parametrize("name", SETS)
def test_greedy_takes_the_largest_of_every_choice(name):
    writes = []
    while True:
        twin = PendingTwin(MODEL, STARTS[name], SETS[name], 3, GLUES, writes, BIAS)
        slot, token = twin.greedy(WRITTEN) if twin.written < 3 else (-1, -1)
        if slot < 0:
            break
        writes.append((slot, token))
    assert generated(name, keyword_bias=BIAS)[0] == [tuple(twin.twin.tokens())]
