"""Data without a length is read again and again, in other orders each time, and resumed where it was left."""

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from modeling_insnext import InsNextForInsertionLM
from modeling_insnext.data import InsertionCollator, Passes
from modeling_insnext.insertion_trainer import InsertionTrainer
from tests.support.equality import same_bits, within_rounding
from tests.support.insnext import shipped_model
from tests.support.quiet_training import arguments


TEXTS = [{"input_ids": [1, *range(3 + i, 12 + i)]} for i in range(5)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TEXTS)


class Watching(InsertionCollator):
    """Keeps what it made."""

    def __call__(self, features):
        batch = super().__call__(features)
        self.made.append(batch["positions"])
        return batch


def train(folder, resume=None, workers=0, **options):
    collate = Watching(pad_token_id=0, bos_token_id=1)
    collate.made = []
    options = {"max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 4, **options}
    args = arguments(folder, dataloader_num_workers=workers, **options)
    trainer = InsertionTrainer(
        shipped_model(InsNextForInsertionLM), args, train_dataset=Stream(), data_collator=collate
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, collate.made


def test_every_pass_draws_other_orders(tmp_path):
    _, made = train(tmp_path)
    rows = [row for batch in made for row in batch[:, : len(TEXTS[0]["input_ids"])]]
    passes = [rows[first : first + 5] for first in (0, 5, 10)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not all(same_bits(*pair) for pair in zip(passes[one], passes[other], strict=True))
    # control: without the number of the pass the orders come again
    collate = InsertionCollator(pad_token_id=0, bos_token_id=1)
    assert same_bits(collate(TEXTS)["positions"], collate(TEXTS)["positions"])
    assert same_bits(collate(TEXTS)["positions"], torch.stack(passes[0]))


def test_what_a_pass_draws_is_what_that_epoch_draws():
    collate = InsertionCollator(pad_token_id=0, bos_token_id=1)
    stream = iter(Passes(TEXTS))
    drawn = [collate([next(stream) for _ in TEXTS]) for _ in range(3)]
    for epoch, batch in enumerate(drawn):
        collate.set_epoch(epoch)
        assert all(same_bits(value, batch[name]) for name, value in collate(TEXTS).items())


def test_a_resumed_stream_goes_on_in_its_pass(tmp_path):
    whole, _ = train(tmp_path / "whole")
    # step 4 is in the second pass
    resumed, _ = train(tmp_path / "rest", resume=str(tmp_path / "whole" / "checkpoint-4"))
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_workers_read_the_same_stream(tmp_path):
    alone, _ = train(tmp_path / "alone", save_strategy="no")
    worked, _ = train(tmp_path / "worked", workers=1, save_strategy="no")
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (alone, worked)]
    assert within_rounding(*map(torch.tensor, losses))


def test_a_shuffled_stream_is_told_its_pass():
    stream = datasets.Dataset.from_list(TEXTS).to_iterable_dataset().shuffle(seed=0, buffer_size=5)
    rows = [row for row, _ in zip(Passes(stream), range(15), strict=False)]
    orders = [tuple(row["input_ids"][1] for row in rows[first : first + 5]) for first in (0, 5, 10)]
    assert len(set(orders)) > 1 and len({frozenset(order) for order in orders}) == 1
    assert [row["pass_number"] for row in rows] == [0] * 5 + [1] * 5 + [2] * 5


def test_an_empty_stream_ends_and_a_generator_is_refused():
    assert list(Passes([])) == []
    stream = iter(Passes(text for text in TEXTS))
    assert len([next(stream) for _ in TEXTS]) == 5
    with pytest.raises(ValueError, match="data must be there to be read again, got nothing in pass 1"):
        next(stream)


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_a_stream_has_no_epochs_to_act_on(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be no or steps where the data has no length, got "):
        options = {"eval_dataset": TEXTS} if name == "eval_strategy" else {}
        args = arguments(tmp_path, max_steps=2, **{name: "epoch"})
        InsertionTrainer(
            shipped_model(InsNextForInsertionLM),
            args,
            train_dataset=Stream(),
            data_collator=Watching(pad_token_id=0),
            **options,
        )
