"""`reading_order=True`: an open slot fills from left to right, by the model's own choice among what is left."""

import math
from functools import cache

import pytest
import torch

from modeling_insnext.insnext.draft import Draft
from tests.support.generation_twins import TextTwin, canvas_of, writing_model
from tests.support.insnext import BOS
from tests.support.tokenizers import tiny_tokenizer


# three tokens that can be written, into the first and the last of three slots
MODEL = writing_model(seed=3, vocab_size=6)
WRITTEN = (3, 4, 5)
ROW = [(BOS, True), (4, False), (5, True)]
# scores are returned in float32
FLOAT32 = 1e-6


@cache
def all_texts(limit, in_order=True):
    """Return the log-probability of every text of up to `limit` insertions: with `in_order`, into the slots left."""
    finished, running = {}, [(0.0, ())]
    for step in range(limit + 1):
        grown = []
        for log_p, writes in running:
            twin, closed = TextTwin(MODEL, [token for token, _ in ROW], [0, -1, 1]), {1}
            for number, (slot, token) in enumerate(writes, 1):
                twin.insert([(slot, token)], number)
                closed |= {slot} if in_order else set()
            text = tuple(twin.tokens())
            if step == limit:
                finished.setdefault(text, []).append(log_p)
                continue
            slots, stop, tokens = twin.scores()
            open_slots = [slot for slot in range(len(slots)) if slot not in closed]
            places = torch.cat([slots[open_slots], stop[None]]).log_softmax(0)
            tokens = tokens.log_softmax(1)
            finished.setdefault(text, []).append(log_p + float(places[-1]))
            for place, slot in zip(places, open_slots, strict=False):
                for token in WRITTEN:
                    grown.append((log_p + float(place + tokens[slot, token]), (*writes, (slot, token))))
        running = grown
    return {text: float(torch.tensor(orders, dtype=torch.float64).logsumexp(0)) for text, orders in finished.items()}


def texts_of(out):
    return [tuple(ids[steps != -2].tolist()) for ids, steps in zip(out.sequences, out.insertion_steps, strict=True)]


def test_the_enumerated_probabilities_sum_to_1():
    assert abs(sum(map(math.exp, all_texts(3).values())) - 1) < 1e-10


def test_texts_are_drawn_as_often_as_the_model_says_of_the_slots_that_are_left():
    draws, expected = 4000, all_texts(2)
    canvas = canvas_of([ROW] * draws)
    out = MODEL.generate(
        **canvas, reading_order=True, do_sample=True, top_k=0, seed=1, max_new_tokens=2, return_dict_in_generate=True
    )
    counts = dict.fromkeys(expected, 0)
    for text in texts_of(out):
        counts[text] += 1

    def distance(texts):
        """Return chi square, texts that are expected less than ten times taken together."""
        rare = {text for text, log_p in texts.items() if draws * math.exp(log_p) < 10}
        groups = [[text] for text in texts if text not in rare] + ([list(rare)] if rare else [])
        terms = []
        for group in groups:
            mean = draws * sum(math.exp(texts[text]) for text in group)
            terms.append((sum(counts[text] for text in group) - mean) ** 2 / mean)
        return sum(terms), len(terms) - 1

    value, freedom = distance(expected)
    # five standard deviations above the mean of chi square
    assert value < freedom + 5 * math.sqrt(2 * freedom)
    # control: every slot open is another distribution
    value, freedom = distance(all_texts(2, in_order=False))
    assert value > freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_once_all_orders_fit_beams_find_every_text_with_its_probability(limit):
    expected = sorted(all_texts(limit).items(), key=lambda item: -item[1])[:12]
    out = MODEL.generate(
        **canvas_of([ROW]), reading_order=True, num_beams=216, num_return_sequences=len(expected), length_penalty=0.0,
        max_new_tokens=limit, return_dict_in_generate=True,
    )  # fmt: skip
    assert texts_of(out) == [text for text, _ in expected]
    scores = out.sequences_scores.tolist()
    assert max(abs(score - log_p) for score, (_, log_p) in zip(scores, expected, strict=True)) < FLOAT32


def test_a_text_of_one_gap_has_one_order_so_few_beams_score_it_exactly():
    def log_p_by_hand(text):
        """Return log p of writing what follows BOS, token by token, and stopping."""
        twin, total = TextTwin(MODEL, [BOS, 4], [0, -1]), 0.0
        for number, token in enumerate([*text[1:-1], None], 1):
            slots, stop, tokens = twin.scores()
            # the last written token's slot, at first that of BOS
            slot = 0 if number == 1 else len(twin.ids) - 1
            places = torch.stack([slots[slot], stop]).log_softmax(0)
            if token is None or number > 3:
                return total + (float(places[1]) if number <= 3 else 0.0)
            total += float(places[0] + tokens[slot].log_softmax(0)[token])
            twin.insert([(slot, token)], number)

    out = MODEL.generate(
        **canvas_of([[(BOS, True), (4, False)]]), reading_order=True, num_beams=3, num_return_sequences=3,
        length_penalty=0.0, max_new_tokens=3, return_dict_in_generate=True,
    )  # fmt: skip
    for text, score in zip(texts_of(out), out.sequences_scores.tolist(), strict=True):
        assert abs(score - log_p_by_hand(text)) < FLOAT32


WIDE = writing_model(seed=1)
OPTIONS = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 2, "top_k": 0},
    "parallel": {"do_sample": True, "seed": 2, "parallel_slots": 3, "slot_temperature": 9.0},
    "ebr": {"do_sample": True, "seed": 3, "ebr": True, "slot_temperature": 9.0},
    "window": {"do_sample": True, "seed": 4, "slot_window": 1, "slot_temperature": 9.0},
    "static": {"do_sample": True, "seed": 5, "cache_implementation": "static"},
    "beams": {"num_beams": 4, "num_return_sequences": 3},
}


def is_in_order(out):
    """Say whether the steps between given tokens grow from left to right."""
    for steps in out.insertion_steps.tolist():
        run = []
        for step in steps:
            run = [] if step < 0 else [*run, step]
            if run != sorted(run):
                return False
    return True


@pytest.mark.parametrize("mode", OPTIONS)
def test_every_way_of_writing_fills_each_gap_from_left_to_right(mode):
    canvas = canvas_of([[(BOS, True), (4, False), (6, True), (7, True)], [(BOS, True), (5, True)]])
    written = {**OPTIONS[mode], "max_new_tokens": 9, "min_new_tokens": 9, "return_dict_in_generate": True}
    out = WIDE.generate(**canvas, reading_order=True, **written)
    assert is_in_order(out) and int((out.insertion_steps[0] > 0).sum()) == 9
    # control
    assert not is_in_order(WIDE.generate(**canvas, **written))


class Drafts:
    """Keeps every state of a text."""

    def __init__(self):
        self.texts = []

    def put_draft(self, texts):
        self.texts.append(texts[0].tolist())

    def put(self, texts):
        pass

    def end(self):
        pass


def prefixes_stay(**options):
    drafts, canvas = Drafts(), canvas_of([[(BOS, False), (4, True), (6, False), (7, False)]])
    WIDE.generate(**canvas, max_new_tokens=8, min_new_tokens=8, streamer=drafts, **options)
    finals = [text[: len(text) - 2] for text in drafts.texts]
    return all(finals[-1][: len(final)] == final for final in finals)


def test_what_stands_left_of_the_last_written_token_is_final():
    sampled = [{"do_sample": True, "seed": seed, "slot_temperature": 9.0} for seed in range(4)]
    assert all(prefixes_stay(reading_order=True, **options) for options in sampled)
    # control
    assert not all(prefixes_stay(**options) for options in sampled)


def test_documents_write_in_reading_order_and_the_next_time_as_they_like(monkeypatch):
    tokenizer = tiny_tokenizer(vocab_size=290, all_bytes=True, add_prefix_space=False)
    model = writing_model(vocab_size=290, max_position_embeddings=128)
    document, places, write = model.open(tokenizer, "the old man"), [], Draft.write

    def noted(draft, slots, tokens, acts):
        places.append(int(draft.ranks[0, slots[0]]))
        write(draft, slots, tokens, acts)

    monkeypatch.setattr(Draft, "write", noted)
    sampled = {"do_sample": True, "seed": 1, "slot_temperature": 9.0, "max_new_tokens": 8, "min_new_tokens": 8}
    document.write(3, reading_order=True, **sampled)
    assert places == list(range(places[0], places[0] + 8))
    places.clear()
    document.write(3, **sampled)
    assert places != sorted(places)


def test_without_insertion_there_is_no_order_to_choose():
    with pytest.raises(ValueError, match="reading_order=True has no meaning left to right"):
        MODEL.generate(torch.tensor([[BOS, 4]]), left_to_right=True, reading_order=True, max_new_tokens=2)
