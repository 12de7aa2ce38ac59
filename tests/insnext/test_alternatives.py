"""What the model chooses before it writes: which of its forms a keyword has."""

import re

import pytest
import torch

from modeling_insnext.insnext.canvas_choice import choose_forms
from tests.support.generation_twins import TextTwin
from tests.support.insnext import BOS, shipped_model
from tests.support.one_canvas import MODEL
from tests.support.tokenizers import tiny_tokenizer


# pieces that continue a word
GLUES = torch.zeros(MODEL.config.vocab_size, dtype=torch.bool)
GLUES[6:] = True


def form_log_p(left, form, right, glues=GLUES):
    """Return by the definition log p of the pieces of a form, one after the other, and of no piece behind them."""
    total = 0.0
    for cut in range(len(form) + 1):
        ids = [*left, *form[:cut], *right]
        log_p = TextTwin(MODEL, ids, range(len(ids))).scores()[2][len(left) + cut - 1].log_softmax(0)
        total += float(log_p[form[cut]] if cut < len(form) else log_p[~glues].logsumexp(0))
    return total


def likeliest_forms(keywords, glues=GLUES):
    chosen = [0] * len(keywords)
    for place, forms in enumerate(keywords):
        if len(forms) > 1:
            standing = [mine[form] for mine, form in zip(keywords, chosen, strict=True)]
            left = [BOS, *(piece for phrase in standing[:place] for piece in phrase)]
            right = [piece for phrase in standing[place + 1 :] for piece in phrase]
            scores = [form_log_p(left, form, right, glues) for form in forms]
            chosen[place] = scores.index(max(scores))
    return chosen


def random_keywords(generator, most_forms):
    """Four keywords of one to `most_forms` forms; a form is one to three pieces, and may begin like another."""
    keywords = []
    for _ in range(4):
        forms = []
        for _ in range(int(torch.randint(1, most_forms + 1, (1,), generator=generator))):
            first = forms[0] if forms and torch.rand(1, generator=generator) < 0.5 else []
            more = torch.randint(3, 13, (int(torch.randint(1, 3, (1,), generator=generator)),), generator=generator)
            forms.append([*first, *more.tolist()])
        keywords.append(forms)
    return keywords


def test_every_keyword_has_the_form_that_is_likeliest_between_the_others():
    generator = torch.Generator().manual_seed(2)
    firsts, differ = 0, 0
    for _ in range(20):
        keywords = random_keywords(generator, most_forms=3)
        chosen = choose_forms(MODEL, BOS, keywords, GLUES)
        assert chosen == likeliest_forms(keywords)
        firsts += chosen.count(0)
        # control: without the end of the word shorter forms win
        differ += chosen != likeliest_forms(keywords, torch.zeros_like(GLUES))
    assert firsts < 20 * 4 and differ > 0


@pytest.mark.parametrize("options", [{"keywords": [["old", "older"], "man"]}, {"keywords": ["man"], "ordered": False}])
def test_a_foreign_vocabulary_is_refused_before_anything_is_chosen(options):
    with pytest.raises(ValueError, match="vocabulary mismatch: the tokenizer has ids up to 59, the model 40"):
        shipped_model(vocab_size=40).canvas(tiny_tokenizer(), **options)


@pytest.mark.parametrize("sets", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_sets_of_keywords_stand_whole_each_in_one_of_its_forms(sets):
    tokenizer, model = tiny_tokenizer(), shipped_model()
    words = [["old", "older"], "man", ["sea", "seas", "the sea"], ["dog", "dogs"], "fox", "quick brown"]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(sets):
        count = int(torch.randint(2, 5, (1,), generator=generator))
        rows.append([words[index] for index in torch.randperm(len(words), generator=generator)[:count].tolist()])
    canvas = model.canvas(tokenizer, keywords=[[*row, "cat"] for row in rows])
    out = model.generate(**canvas, max_new_tokens=4, do_sample=True, seed=1, return_dict_in_generate=True)
    for ids, steps, row in zip(out.sequences, out.insertion_steps, rows, strict=True):
        text = tokenizer.decode(ids[steps == -1][1:])
        forms = [[word] if isinstance(word, str) else word for word in [*row, "cat"]]
        assert stands(text, forms), (text, forms)
    # control: a keyword too few, in two forms, or in another order is no such text
    for text in (" old", " old older man", " man old"):
        assert not stands(text, [["old", "older"], ["man"]])


@pytest.mark.parametrize("options", [{"seed": 1, "do_sample": True}, {"num_beams": 3}])
def test_keywords_beside_a_text_stand_in_its_gaps_and_nowhere_else(options):
    tokenizer, model = tiny_tokenizer(), shipped_model()
    texts, words = ["the old fox ___ the dog", "a ___ man ___"], [[["sea", "seas"]], ["fish", ["dog", "dogs"]]]
    canvas = model.canvas(tokenizer, texts, words, ordered=False)
    out = model.generate(**canvas, max_new_tokens=10, **options)
    for text, pattern in zip(
        tokenizer.batch_decode(out, skip_special_tokens=True),
        (r" ?the old fox .*\b(sea|seas)\b.* the dog", r" ?a (?=.*\bfish\b)(?=.*\b(dog|dogs)\b).*\bman\b.*"),
        strict=True,
    ):
        assert re.fullmatch(pattern, text), text


def stands(text, forms):
    """Whether a text is made of one form of each keyword, in order."""
    if not forms:
        return text == ""
    return any(stands(text.removeprefix(f" {form}"), forms[1:]) for form in forms[0] if text.startswith(f" {form}"))
