"""The share of texts that are plainly left to right, by how far the training is."""

import pytest
import torch

from modeling_insnext.data import ContextMixture, InsertionCollator, Passes, Shuffled
from tests.support.equality import same_bits


TEXTS = [{"input_ids": [1, *range(3 + i, 15 + i)]} for i in range(400)]


def collator(**options):
    return InsertionCollator(pad_token_id=0, contexts=ContextMixture(words=0.5, reencode=0.5), **options)


def plain_share(batch):
    rows = torch.arange(batch["positions"].shape[1]).expand_as(batch["positions"])
    return float(((batch["positions"] == rows) & (batch["horizon"] == rows)).all(1).double().mean())


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0, None])
def test_the_share_is_linear_in_the_progress_of_a_text(progress):
    rows = TEXTS if progress is None else [{**text, "progress": progress} for text in TEXTS]
    expected = 0.9 - 0.8 * (1.0 if progress is None else progress)
    found = plain_share(collator(left_to_right_share=(0.9, 0.1))(rows))
    # four standard deviations of 400 draws
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5
    assert plain_share(collator()(rows)) < 0.02


def test_without_a_share_nothing_is_drawn_otherwise():
    plain, shared = collator()(TEXTS), collator(left_to_right_share=(1.0, 0.0))(TEXTS)
    assert all(same_bits(value, shared[name]) for name, value in plain.items())


def test_what_is_given_stays_given():
    given = {"given": [True, False, True] + [False] * 10, "progress": 0.0}
    batch = collator(left_to_right_share=(1.0, 0.0))([{**TEXTS[0], **given}])
    assert batch["positions"][0].tolist() == [0, 2, 1, *range(3, 13)]
    assert batch["horizon"][0, :2].tolist() == [1, 1] and batch["labels"][0, 2] != -100


def test_a_stream_says_how_far_the_training_is():
    stream = iter(Passes(TEXTS[:3], num_texts=6))
    assert [next(stream)["progress"] for _ in range(8)] == [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1]
    assert "progress" not in next(iter(Passes(TEXTS)))


def test_every_pass_has_an_order_of_its_own_and_the_same_texts():
    def read(seed):
        return [row["input_ids"][1] for row, _ in zip(Passes(Shuffled(TEXTS[:20], seed)), range(40), strict=False)]

    first, second = read(0)[:20], read(0)[20:]
    assert sorted(first) == sorted(second) == list(range(3, 23)) and first != second
    assert read(0) == read(0) != read(1)


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 1.5), (-0.1, 0.5)])
def test_bad_shares_are_refused(shares):
    with pytest.raises(ValueError, match="left_to_right_share must be two shares in "):
        collator(left_to_right_share=shares)


def test_a_stream_of_no_texts_has_no_progress():
    with pytest.raises(ValueError, match="num_texts must be at least 1, got 0"):
        Passes(TEXTS, num_texts=0)
