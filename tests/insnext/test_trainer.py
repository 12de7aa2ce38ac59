"""Training under `Trainer`: the loss is the same however a batch is cut, resumed or checkpointed."""

import copy

import datasets
import pytest
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer

from modeling_insnext import (
    InsNextForInsertionLM,
    InsNextForMultipleChoice,
    InsNextForSequenceClassification,
    InsNextForTokenClassification,
)
from modeling_insnext.data import ContextMixture, InsertionCollator
from modeling_insnext.insertion_trainer import InsertionTrainer
from tests.support.equality import same_bits
from tests.support.insnext import SHIPPED_VOCAB, shipped_model
from tests.support.quiet_training import arguments, losses, weights
from tests.support.tokenizers import tiny_tokenizer


def texts(count=8, seed=0):
    """Texts of unequal lengths, so that a mean of means is not the mean."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [4 + 3 * (i % 4) for i in range(count)]
    return [{"input_ids": [1, *torch.randint(3, SHIPPED_VOCAB, (n,), generator=generator).tolist()]} for n in lengths]


def collator(**options):
    options = {"contexts": ContextMixture(words=0.3), **options}
    return InsertionCollator(pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)


def insertion_trainer(folder, model=None, trainer_class=InsertionTrainer, data=None, collate=None, **options):
    extra = {name: options.pop(name) for name in ("eval_dataset", "eval_data_collator") if name in options}
    return trainer_class(
        model=model or shipped_model(InsNextForInsertionLM),
        args=arguments(folder, **options),
        train_dataset=texts() if data is None else data,
        data_collator=collate or collator(),
        **extra,
    )


@pytest.mark.parametrize("trainer_class", [InsertionTrainer, Trainer])
def test_a_small_set_is_learnt_by_heart(tmp_path, trainer_class):
    model = shipped_model(InsNextForInsertionLM, initializer_range=0.02)
    options = {
        "per_device_train_batch_size": 8,
        "max_steps": 80,
        "learning_rate": 1e-2,
        "remove_unused_columns": False,
    }
    collate = collator(order="left_to_right", contexts=ContextMixture())
    trainer = insertion_trainer(tmp_path, model, trainer_class, collate=collate, **options)
    trainer.train()
    assert losses(trainer)[0] > 3.5
    assert losses(trainer)[-1] < 0.5


def test_the_two_losses_are_logged_apart_and_add_up(tmp_path):
    trainer = insertion_trainer(tmp_path, max_steps=4, eval_dataset=texts(4, seed=1))
    trainer.train()
    position, token = losses(trainer, "position_loss"), losses(trainer, "token_loss")
    assert len(position) == 4 and min(position) > 0 and min(token) > 0
    for total, *parts in zip(losses(trainer), position, token, strict=True):
        assert abs(total - sum(parts)) < 1e-4 * total
    metrics = trainer.evaluate()
    assert abs(metrics["eval_loss"] - metrics["eval_position_loss"] - metrics["eval_token_loss"]) < 1e-4


def test_weighted_steps_change_the_loss_but_not_its_parts(tmp_path):
    trainers = []
    for weight in (1.0, 0.0):
        collate = collator(context_step_weight=weight, contexts=ContextMixture(words=1.0))
        trainers.append(insertion_trainer(tmp_path, collate=collate))
        trainers[-1].train()
    plain, weighted = trainers
    assert losses(plain, "token_loss") == losses(weighted, "token_loss")
    assert losses(weighted)[0] < losses(plain)[0] - 1e-3


def one_step(folder, model, trainer_class, data, collate, accumulate, **options):
    """Train one step of plain SGD in float64 over four texts; return the logged loss and the gradient."""
    trained = copy.deepcopy(model).double()
    args = arguments(
        folder,
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=1.0,
        **options,
    )
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = trainer_class(
        model=trained, args=args, train_dataset=data, data_collator=collate, optimizers=(optimizer, schedule)
    )
    trainer.train()
    return losses(trainer)[0], weights(model.double()) - weights(trained)


class IgnoresTheCount(InsNextForInsertionLM):
    """Control: a mean over each micro-batch, which `Trainer` does not divide."""

    def forward(self, *args, num_items_in_batch=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    def run(model_class, accumulate):
        model = shipped_model(model_class)
        return one_step(tmp_path, model, InsertionTrainer, texts(4), collator(), accumulate)

    (whole, gradient), (parts, summed) = (run(InsNextForInsertionLM, accumulate) for accumulate in (1, 4))
    assert abs(whole - parts) < 1e-6 * whole  # the log is float32
    assert gradient.abs().max() > 1e-3
    assert (gradient - summed).abs().max() < 1e-10
    wrong, wrong_gradient = run(IgnoresTheCount, 4)
    assert wrong > 2 * whole
    assert (wrong_gradient - gradient).abs().max() > 0.1 * gradient.abs().max()


class Labelled(Dataset):
    """Padded texts with labels of one kind."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def labelled(kind, count=4):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SHIPPED_VOCAB, (count, 6), generator=generator)
    rows = []
    for index in range(count):
        row = {"input_ids": ids[index], "attention_mask": torch.ones(6, dtype=torch.long)}
        if kind == "tokens":
            row["labels"] = torch.where(torch.arange(6) <= index, ids[index] % 3, -100)
        elif kind == "choice":
            row = {name: torch.stack([tensor, tensor.flip(0)]) for name, tensor in row.items()}
            row["labels"] = torch.tensor(index % 2)
        elif kind == "number":
            row["labels"] = torch.tensor(index / 2, dtype=torch.float64)
        elif kind == "several":
            row["labels"] = torch.tensor([index % 2, 1, index // 2], dtype=torch.float64)
        else:
            row["labels"] = torch.tensor(index % 3)
        rows.append(row)
    return Labelled(rows)


HEADS = {
    "class": (InsNextForSequenceClassification, {"num_labels": 3}),
    "several": (InsNextForSequenceClassification, {"num_labels": 3}),
    "number": (InsNextForSequenceClassification, {"num_labels": 1}),
    "tokens": (InsNextForTokenClassification, {"num_labels": 3}),
    "choice": (InsNextForMultipleChoice, {}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_accumulate_gradients_too(tmp_path, kind):
    model_class, options = HEADS[kind]

    def run(accumulate):
        return one_step(tmp_path, shipped_model(model_class, **options), Trainer, labelled(kind), None, accumulate)

    (whole, gradient), (parts, summed) = run(1), run(4)
    assert abs(whole - parts) < 1e-5 * whole
    assert (gradient - summed).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("kind", HEADS)
def test_heads_predict_and_are_measured(tmp_path, kind):
    model_class, options = HEADS[kind]
    data = labelled(kind, 6)

    def measure(prediction):
        assert prediction.predictions.shape[0] == prediction.label_ids.shape[0] == 6
        return {"mean": float(prediction.predictions.mean())}

    model = shipped_model(model_class, **options).double()
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = Trainer(model=model, args=args, eval_dataset=data, compute_metrics=measure)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_mean"} <= metrics.keys()
    predicted = trainer.predict(data)
    with torch.no_grad():
        batch = {name: torch.stack([row[name] for row in data.rows]) for name in ("input_ids", "attention_mask")}
        logits = model(**batch).logits
    assert (torch.as_tensor(predicted.predictions) - logits).abs().max() < 1e-10


def test_left_to_right_it_is_any_causal_language_model(tmp_path):
    tokenizer = tiny_tokenizer()
    data = [{"input_ids": text["input_ids"] + [2]} for text in texts()]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = shipped_model(InsNextForInsertionLM, initializer_range=0.02)
    args = arguments(tmp_path, max_steps=60, per_device_train_batch_size=8, learning_rate=1e-2)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=collate)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    # the first training loss is the evaluation loss: both are means over the same tokens
    assert abs(losses(trainer)[0] - before) < 1e-5 * before
    assert before > 3.5 and trainer.evaluate()["eval_loss"] < 0.5
    output = trainer.predict(data)
    assert output.predictions.shape[::2] == (8, SHIPPED_VOCAB)


def test_left_to_right_gradients_accumulate(tmp_path):
    collate = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)

    def run(accumulate):
        return one_step(tmp_path, shipped_model(InsNextForInsertionLM), Trainer, texts(4), collate, accumulate)

    (whole, gradient), (parts, summed) = run(1), run(4)
    assert abs(whole - parts) < 1e-6 * whole
    assert (gradient - summed).abs().max() < 1e-10


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_ends_where_the_whole_run_does(tmp_path, stop):
    """Twelve texts in batches of four: step 3 ends an epoch, step 4 is inside one."""
    data, options = texts(12), {"max_steps": 7, "save_strategy": "steps", "save_steps": stop, "attention_dropout": 0.1}
    dropout = options.pop("attention_dropout")

    def run(folder, seed, resume=None):
        model = shipped_model(InsNextForInsertionLM, seed=seed, attention_dropout=dropout)
        trainer = insertion_trainer(folder, model, data=data, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", seed=0)
    resumed = run(tmp_path / "rest", seed=1, resume=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    for name in ("loss", "position_loss", "token_loss"):
        assert losses(resumed, name) == losses(whole, name)
        assert len(losses(resumed, name)) == 7
    assert same_bits(weights(resumed.model), weights(whole.model))
    assert not same_bits(weights(run(tmp_path / "other", seed=1).model), weights(whole.model))


@pytest.mark.parametrize("left_to_right", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, left_to_right):
    collate = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False) if left_to_right else collator()
    trainer_class = Trainer if left_to_right else InsertionTrainer

    def run(**options):
        return one_step(tmp_path, shipped_model(InsNextForInsertionLM), trainer_class, texts(4), collate, 2, **options)

    (_, plain), (_, checkpointed) = run(), run(gradient_checkpointing=True)
    assert (plain - checkpointed).abs().max() < 1e-12


def test_the_flags_of_a_text_reach_the_collator(tmp_path):
    """Columns that are no argument of `forward` (`given`) would be dropped by a plain `Trainer`."""
    rows = [{**text, "given": [True] * 3 + [False] * (len(text["input_ids"]) - 3), "text": "x"} for text in texts()]
    seen = []

    class Watching(InsertionCollator):
        def __call__(self, features):
            seen.append(set(features[0]))
            return super().__call__(features)

    collate = Watching(pad_token_id=0, bos_token_id=1)
    for data in (rows, datasets.Dataset.from_list(rows)):
        for trainer_class in (InsertionTrainer, Trainer):
            seen.clear()
            trainer = insertion_trainer(
                tmp_path, trainer_class=trainer_class, data=data, collate=collate, eval_dataset=data
            )
            next(iter(trainer.get_train_dataloader()))
            assert ("given" in seen[0]) == (trainer_class is InsertionTrainer)
            next(iter(trainer.get_test_dataloader(data)))
            trainer.evaluate()


def test_evaluation_draws_the_same_orders_in_every_epoch(tmp_path):
    trainer = insertion_trainer(tmp_path, eval_dataset=texts(4, seed=1))
    first = trainer.evaluate()["eval_loss"]
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.data_collator.set_epoch(3)
    assert trainer.evaluate()["eval_loss"] == first
    assert trainer.data_collator.epoch == 3
    # control: training draws anew
    assert any(not same_bits(batch[name], other) for name, other in trainer.data_collator(texts()[:4]).items())


def test_the_epochs_of_training_differ(tmp_path):
    drawn = []

    class Watching(InsertionCollator):
        def __call__(self, features):
            drawn.append(self.epoch)
            return super().__call__(features)

    collate = Watching(pad_token_id=0, bos_token_id=1)
    insertion_trainer(tmp_path, collate=collate, max_steps=6, eval_dataset=texts(2)).train()
    assert drawn == [0, 0, 1, 1, 2, 2]


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0, got 0.1"):
        insertion_trainer(tmp_path, label_smoothing_factor=0.1)


BATCH = collator()(texts(2))
SHORT = {name: tensor[:, :-1] for name, tensor in BATCH.items()}
WRITTEN = (BATCH["labels"] != -100).nonzero()[0].tolist()


def with_token(name, token):
    tensor = BATCH[name].clone()
    tensor[WRITTEN[0], WRITTEN[1]] = token
    return tensor


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(
            ({name: SHORT[name]}, rf"{name} must be \[2, 8\], one for each token, got \[2, 7\]")
            for name in ("labels", "stop_targets", "target_kinds", "unit_starts", "step_weights")
        ),
        ({"labels": with_token("labels", 77)}, "labels must be input_ids, or -100, got label 77"),
        (
            {"labels": with_token("labels", 2), "input_ids": with_token("input_ids", 2)},
            r"ids \[0, 1, 2\] are structure and never written, got label 2 for id 2",
        ),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 8, 32)}, "need input_ids, got inputs_embeds"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"positions": None}, "need positions, got None"),
        ({"unit_starts": None}, "target_kinds need unit_starts"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        shipped_model(InsNextForInsertionLM)(**{**BATCH, **changed})


@pytest.mark.parametrize(
    ("label", "rule"), [(60, r"\[0, 60\) or -100, got label 60"), (-3, "got label -3"), (0, "structure")]
)
def test_left_to_right_labels_outside_the_vocabulary_are_refused(label, rule):
    ids = torch.tensor([[1, 5, 6]])
    with pytest.raises(ValueError, match=rule):
        shipped_model(InsNextForInsertionLM)(ids, labels=torch.tensor([[1, 5, label]]))


@pytest.mark.parametrize("num_items", [None, 1, 0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("stops", [False, True])
def test_a_batch_without_a_supervised_token_has_a_finite_loss_and_gradient(stops, num_items):
    """`Trainer` counts zero tokens then, and what a text ends with may be supervised all the same."""
    model = shipped_model(InsNextForInsertionLM)
    batch = collator()(texts(2))
    batch["labels"].fill_(-100)
    batch["stop_targets"] &= stops
    output = model(**batch, num_items_in_batch=num_items)
    output.loss.backward()
    assert (output.loss > 0) == stops
    assert weights(model).isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    left_to_right = model(batch["input_ids"], labels=batch["labels"], num_items_in_batch=num_items)
    assert left_to_right.loss == 0


def test_a_step_without_a_supervised_token_does_no_harm(tmp_path):
    data = [{**text, "given": [True] * len(text["input_ids"]), "complete": False} for text in texts(4)]
    trainer = insertion_trainer(tmp_path, data=data, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert losses(trainer) == [0, 0]
    assert same_bits(weights(trainer.model), before)


def test_the_parts_of_one_data_set_do_not_leak_into_another(tmp_path):
    first, second = texts(4, seed=1), texts(6, seed=2)
    trainer = insertion_trainer(tmp_path, eval_dataset={"a": first, "b": second})
    metrics = trainer.evaluate()
    predicted = trainer.predict(first).metrics
    for name in ("loss", "position_loss", "token_loss"):
        assert predicted[f"test_{name}"] == metrics[f"eval_a_{name}"] != metrics[f"eval_b_{name}"]
        assert trainer.evaluate(second)[f"eval_{name}"] == metrics[f"eval_b_{name}"]


def test_evaluation_may_draw_from_a_collator_of_its_own(tmp_path):
    data, (first, second) = texts(4, seed=1), (collator(order=order) for order in ("uniform", "left_to_right"))
    options = {"max_steps": 3, "num_train_epochs": 3, "eval_dataset": data}
    alone = insertion_trainer(tmp_path, collate=second, eval_dataset=data).evaluate()["eval_loss"]
    both = insertion_trainer(tmp_path, collate=first, eval_data_collator=second, **options)
    assert both.evaluate()["eval_loss"] == alone
    # the training draws are the other collator's, as without one for evaluation
    both.train()
    plain = insertion_trainer(tmp_path, collate=collator(order="uniform"), **options)
    plain.train()
    assert losses(both) == losses(plain)
    # control: the orders have other losses
    assert plain.evaluate()["eval_loss"] != both.evaluate()["eval_loss"]
