"""copying_heads.py looks at the tokens that an answer is copied from, and tells what is read from what is found."""

import pydoc_data.topics
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.examples.test_drt_examples import ROOT
from tests.support.drt import MEMORY, tiny_model
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture
def study(monkeypatch):
    for room in ("studies", "checkpoints"):
        monkeypatch.syspath_prepend(str(ROOT / "examples" / room))
    import copying_heads

    yield copying_heads
    for name in ("copying_heads", "frozen_lower", "train_memory", "memory_training", "report"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def text():
    tokenizer = tiny_tokenizer(300, bos_in_front=False, all_bytes=True, add_prefix_space=False)
    return tokenizer, np.array(tokenizer.encode(" ".join(pydoc_data.topics.topics.values())[:40_000]))


class Looking:
    """A source with one head, which looks at every token that is the next one, or `shift` tokens behind them."""

    def __init__(self, shift: int = 0):
        self.shift = shift

    def __call__(self, ids, **_):
        following = ids.roll(-1)
        alike = (following[0, :, None] == ids[0]).float().roll(self.shift, 1)
        return SimpleNamespace(attentions=(alike[None, None],))


@pytest.mark.parametrize("kind", ["passkey", "multi_key"])
def test_attention_is_read_off_the_tokens_that_the_answer_becomes(study, text, kind):
    arguments = study.Arguments(memories=[], corpus="-", head_texts=3, head_length=640)
    assert study.attention_to_answers(Looking(), *text, kind, arguments).tolist() == [[1.0]]
    # control: one that looks beside them
    assert study.attention_to_answers(Looking(1), *text, kind, arguments).item() < 0.5


def test_a_memory_that_finds_the_right_chunk_only_reads_otherwise_than_one_that_reads_nothing(study, text):
    small = {"chunk_size": 32, "sliding_window": 48, "vocab_size": 300, "initializer_range": 0.1}
    model = tiny_model(**{**MEMORY, "retrieval_groups": [3], "cross_attention_layers": 2}, **small)
    args = study.parse("--model - --corpus - --output_dir - --chunks 20 --kinds passkey --book_share 0".split())
    result = study.reading(model, study.Rows(model, *text, args, 0), range(4), tail=3)
    assert all(len(result[part]) == 4 for part in ("found", "of", "finds", "right", "nothing"))
    # a row's own chunks before the one that asks, of each other one all but its question and what would answer, too
    assert all(18 < number <= 18 * 4 for number in result["of"])
    nats = [[each for each, _ in result[part]] for part in ("finds", "right", "nothing")]
    assert nats[0] != nats[1] != nats[2] != nats[0]
    # the gates are shut now
    again = study.reading(model, study.Rows(model, *text, args, 0), range(4), tail=3)
    assert [each for each, _ in again["finds"]] == pytest.approx(nats[2]) == [each for each, _ in again["right"]]
