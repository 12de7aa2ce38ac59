"""needle_in_a_haystack.py asks for needles in words at every depth of a grid; scores are whole answers."""

import sys

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm

from tests.examples.test_drt_examples import ROOT
from tests.support.drt import MEMORY, tiny_model
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    import needle_in_a_haystack

    yield needle_in_a_haystack
    for name in ("needle_in_a_haystack", "report"):
        sys.modules.pop(name, None)


def test_needles_in_words_are_asked_for_at_every_depth(study, monkeypatch):
    tokenizer = tiny_tokenizer(300, bos_in_front=False, all_bytes=True, add_prefix_space=False)
    model = tiny_model(vocab_size=len(tokenizer), **{**MEMORY, "chunk_size": 32, "sliding_window": 40})
    arguments = study.Arguments(models=["m=m"], haystack="noise", depths=[0.0, 1.0], batch_tokens=2048)
    tasks = study.make_tasks("word_passkey", model, tokenizer, arguments)
    haystack = study.read_haystack("noise", tokenizer)
    with tqdm(disable=True) as progress:
        cell = study.evaluate(model, tasks, haystack, 512, 5, arguments, progress)
    assert (cell["exact"]["n"], cell["published"]["n"]) == (5, 0) and study.in_words(cell["published"]) == "-"
    assert [(depth, one["n"]) for depth, one in cell["depths"].items()] == [("0.0", 3), ("1.0", 2)]
    assert cell["exact"]["right"] == 0
    # control: one that reads the answers is right
    monkeypatch.setattr(study, "last_logits", lambda model, samples, arguments: knowing(samples, len(tokenizer)))
    with tqdm(disable=True) as progress:
        cell = study.evaluate(model, tasks, haystack, 512, 5, arguments, progress)
    assert cell["exact"]["right"] == 5 and all(one["right"] == one["n"] for one in cell["depths"].values())


def knowing(samples, vocab_size):
    end = samples[0].questions[0].end
    following = np.stack([np.append(sample.input_ids[end + 1 :], 0) for sample in samples])
    return torch.nn.functional.one_hot(torch.from_numpy(following), vocab_size).float()


def test_depths_are_for_needles_in_words(study):
    arguments = study.Arguments(models=["m=m"], haystack="noise", depths=[0.5])
    with pytest.raises(ValueError, match=r"depths are for needles in words, got \[0.5\] and passkey"):
        study.make_tasks("passkey", tiny_model(), None, arguments)
