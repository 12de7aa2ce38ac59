"""An interrupted and resumed `Trainer` run sees the batches that it would have seen."""

import pytest
import torch
import transformers

from modeling_insnext.data import ContextMixture, InsertionCollator
from tests.support.equality import same_bits


FEATURES = [{"input_ids": [1, *range(3 + i, 12 + i)]} for i in range(12)]


class Recorder(torch.nn.Module):
    """Keeps every batch it is called with."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = []

    def forward(self, input_ids, positions, horizon, labels=None, **columns):
        self.batches.append(torch.stack([input_ids, positions, horizon]))
        return {"loss": self.weight.square()}


class EpochCallback(transformers.TrainerCallback):
    """What a loop must do at the start of each epoch."""

    def __init__(self, collator):
        self.collator = collator

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(self.epoch)
        self.epoch += 1


class CountingCollator(InsertionCollator):
    """Control: draws that depend on the number of calls."""

    def __call__(self, features):
        self.seed += 1
        return super().__call__(features)


def train(folder, collator_class, workers=0, resume=None, max_steps=-1):
    collator = collator_class(pad_token_id=0, contexts=ContextMixture(words=0.5, reencode=0.5))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        max_steps=max_steps,
        save_steps=4,
        logging_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_num_workers=workers,
    )
    model = Recorder()
    trainer = transformers.Trainer(
        model, arguments, data_collator=collator, train_dataset=FEATURES, callbacks=[EpochCallback(collator)]
    )
    trainer.train(resume_from_checkpoint=resume)
    return model.batches


@pytest.mark.parametrize(("step", "workers"), [(4, 0), (8, 2)])
def test_a_resumed_run_sees_the_same_batches(tmp_path, step, workers):
    whole = train(tmp_path, InsertionCollator)
    rest = train(tmp_path, InsertionCollator, workers, resume=str(tmp_path / f"checkpoint-{step}"))
    assert len(whole) == 12
    assert same_bits(torch.stack(rest), torch.stack(whole[step:]))


def test_the_epochs_differ(tmp_path):
    batches = torch.stack(train(tmp_path, InsertionCollator))
    first, second = (sorted(map(str, half.transpose(1, 2).reshape(-1, 3, 10).tolist())) for half in batches.chunk(2))
    assert first != second


def test_control_a_collator_that_counts_its_calls_does_not_resume(tmp_path):
    whole = train(tmp_path, CountingCollator)
    rest = train(tmp_path, CountingCollator, resume=str(tmp_path / "checkpoint-4"))
    assert not same_bits(torch.stack(rest), torch.stack(whole[4:]))
