"""Training under `Trainer`: the loss is the same however a batch is cut, resumed, checkpointed or compiled."""

import copy

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer

from modeling_insnext import DrtForCausalLM, DrtForSequenceClassification
from tests.support import quiet_training
from tests.support.drt import drt_tokenizer, random_ids, shipped_model, tiny_model
from tests.support.equality import same_bits
from tests.support.quiet_training import losses, weights


LENGTHS = [14, 23, 32, 9, 27, 18, 30, 11]


def texts(count=8, seed=0):
    """Texts of unequal lengths, so that a mean of means is not the mean."""
    return [{"input_ids": row[:n].tolist()} for row, n in zip(random_ids(count, 32, seed), LENGTHS, strict=False)]


def collator(padding_side="right"):
    """Right padding: `Trainer` counts a label for the first token of every row that does not begin in column 0."""
    tokenizer = drt_tokenizer()
    tokenizer.padding_side = padding_side
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def arguments(folder, **options):
    return quiet_training.arguments(folder, **{"remove_unused_columns": False, **options})


def make_trainer(folder, model=None, data=None, collate=None, eval_dataset=None, **options):
    return Trainer(
        model=model or shipped_model(),
        args=arguments(folder, **options),
        train_dataset=texts() if data is None else data,
        eval_dataset=eval_dataset,
        data_collator=collate or collator(),
    )


@pytest.mark.parametrize("baseline", [None, "landmark_attention"])
def test_a_small_set_is_learnt_by_heart(tmp_path, baseline):
    config = tiny_model(initializer_range=0.02).config
    torch.manual_seed(0)
    model = DrtForCausalLM(config if baseline is None else config.baseline(baseline))
    options = {"per_device_train_batch_size": 8, "max_steps": 20, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, model, eval_dataset=texts(), **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert 3.5 < losses(trainer)[0] < 4.5 and abs(losses(trainer)[0] - before) < 0.1
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    predicted = trainer.predict(texts()).predictions
    assert predicted.shape == (8, 32, 50)


def one_step(folder, model, accumulate, **options):
    """Train one step of plain SGD over four texts; return the logged loss and the gradient."""
    trained = copy.deepcopy(model)
    args = arguments(
        folder,
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=1.0,
        **options,
    )
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = Trainer(
        model=trained, args=args, train_dataset=texts(4), data_collator=collator(), optimizers=(optimizer, schedule)
    )
    trainer.train()
    return losses(trainer)[0], weights(model) - weights(trained)


class IgnoresTheCount(DrtForCausalLM):
    """Control: a mean over each micro-batch, which `Trainer` does not divide."""

    def forward(self, *args, num_items_in_batch=None, **kwargs):
        return super().forward(*args, **kwargs)


def noiseless(model_class=DrtForCausalLM, **changes):
    """Return a float64 model that chooses every chunk: noise in the choice changes nothing."""
    torch.manual_seed(0)
    return model_class(tiny_model(num_retrieved_chunks=8, **changes).config).double()


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    (whole, gradient), (parts, summed) = (one_step(tmp_path, noiseless(), accumulate) for accumulate in (1, 4))
    # the log is float32
    assert abs(whole - parts) < 1e-6 * whole
    assert gradient.abs().max() > 1e-3
    assert (gradient - summed).abs().max() < 1e-10
    wrong, wrong_gradient = one_step(tmp_path, noiseless(IgnoresTheCount), 4)
    assert wrong > 2 * whole
    assert (wrong_gradient - gradient).abs().max() > 0.1 * gradient.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, reentrant):
    """Chunks are chosen outside of what is computed twice: the noise of the choice is drawn once."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model = tiny_model(attention_dropout=0.2)
    _, plain = one_step(tmp_path, model, 2)
    _, checkpointed = one_step(tmp_path, model, 2, **options)
    assert plain.abs().max() > 1e-3
    assert (plain - checkpointed).abs().max() < 1e-12
    # control: another choice is another gradient
    _, other = one_step(tmp_path, model, 2, seed=1, data_seed=42)
    assert (plain - other).abs().max() > 1e-6


def test_checkpointed_layers_are_run_twice_and_a_cache_is_refused():
    model = shipped_model(retrieval_groups=[], num_lower_layers=2).train()
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    ids = random_ids(1, 20)
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2
    with pytest.raises(ValueError, match="use_cache must be False under gradient checkpointing"):
        model(ids, labels=ids, use_cache=True)


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_ends_where_the_whole_run_does(tmp_path, stop):
    """Eight texts in batches of three: step 3 ends an epoch, step 4 is inside one. The noise of the choice goes on."""

    def run(folder, seed, resume=None):
        options = {"per_device_train_batch_size": 3, "max_steps": 6, "save_strategy": "steps", "save_steps": stop}
        trainer = make_trainer(folder, shipped_model(seed=seed, attention_dropout=0.1), **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", seed=0)
    resumed = run(tmp_path / "rest", seed=1, resume=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    assert same_bits(weights(resumed.model), weights(whole.model))
    assert not same_bits(weights(run(tmp_path / "other", seed=1).model), weights(whole.model))


def test_smoothed_labels_are_shifted(tmp_path):
    """`Trainer` shifts labels itself then, for classes it knows by name."""
    model, epsilon = noiseless(), 0.1
    trainer = make_trainer(tmp_path, model, eval_dataset=texts(4), label_smoothing_factor=epsilon)
    batch = collator()(texts(4))
    with torch.no_grad():
        logp = model.eval()(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    smooth = (1 - epsilon) * -logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0] - epsilon * logp.mean(-1)
    expected = float(smooth[labels != -100].mean())
    assert abs(trainer.evaluate()["eval_loss"] - expected) < 1e-6 * expected


def labelled(kind):
    ids = random_ids(6, 20)
    labels = {
        "class": torch.arange(6) % 3,
        "several": torch.stack([torch.arange(6) % 2, torch.arange(6) // 3, torch.ones(6)], 1).double(),
        "number": torch.arange(6).double() / 2,
    }[kind]
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]


@pytest.mark.parametrize(("kind", "num_labels"), [("class", 3), ("several", 3), ("number", 1)])
def test_a_classifier_learns_and_is_measured(tmp_path, kind, num_labels):
    torch.manual_seed(0)
    config = tiny_model(initializer_range=0.05).config
    config.num_labels = num_labels
    model = DrtForSequenceClassification(config).double()
    args = arguments(tmp_path, max_steps=12, learning_rate=1e-2, per_device_train_batch_size=6)
    data = labelled(kind)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda prediction: {"rows": len(prediction.predictions)},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_rows"] == 6
    assert after["eval_loss"] < 0.7 * before["eval_loss"]


def test_a_classifier_accumulates_gradients(tmp_path):
    config = noiseless().config
    config.num_labels = 3
    torch.manual_seed(0)
    model = DrtForSequenceClassification(config).double()
    gradients = []
    for accumulate in (1, 3):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
        args = arguments(tmp_path, per_device_train_batch_size=6 // accumulate, gradient_accumulation_steps=accumulate)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        Trainer(model=trained, args=args, train_dataset=labelled("class"), optimizers=(optimizer, schedule)).train()
        gradients.append(weights(model) - weights(trained))
    assert gradients[0].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6


def test_training_compiles_into_one_graph():
    """No mask and no cache: nothing that a graph would have to be broken for."""
    model, ids = noiseless(num_lower_layers=1, retrieval_groups=[1]), random_ids(2, 30)

    def loss(ids):
        return model(ids, labels=ids).loss

    torch._dynamo.reset()
    value, compiled_value = loss(ids), torch.compile(loss, backend="eager", fullgraph=True)(ids)
    assert abs(value - compiled_value) < 1e-12
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(x, parameters) for x in (value, compiled_value)), strict=True):
        assert (one - other).abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"retrieval_groups": []}, {"landmark_source": "mean", "fusion": "cca"}, {"retriever": "fixed"}]
)
def test_training_compiles_with_inductor(changes):
    model, ids = noiseless(**changes).float(), random_ids(2, 40)
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model(ids, labels=ids).loss, fullgraph=True)(ids)
    expected = model(ids, labels=ids).loss
    assert abs(compiled - expected) < 1e-5
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(
        *(torch.autograd.grad(x, parameters, allow_unused=True) for x in (compiled, expected)), strict=True
    ):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() < 1e-4 * (1 + other.abs().max())


def test_bfloat16_is_close_and_trains():
    model, ids = shipped_model(), random_ids(2, 40)
    with torch.no_grad():
        expected = model(ids).logits
        half = copy.deepcopy(model).bfloat16()
        error = (half(ids).logits.float() - expected).abs().mean() / expected.std()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = (model(ids).logits.float() - expected).abs().mean() / expected.std()
    assert error < 0.1 and mixed < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_losses_without_a_supervised_token_do_no_harm():
    model, ids = shipped_model(), random_ids(2, 20)
    labels = torch.full_like(ids, -100)
    for count in (0, torch.tensor(0), torch.tensor(5)):
        output = model(ids, labels=labels, num_items_in_batch=count)
        assert output.loss == 0
        output.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
