"""Task heads: what they return, and that each reads the whole of its own text and nothing else."""

import pytest
import torch

from modeling_insnext import (
    InsNextForMultipleChoice,
    InsNextForSequenceClassification,
    InsNextForTokenClassification,
    InsNextModel,
)
from tests.support.equality import within_rounding
from tests.support.insnext import random_ids, shipped_model, tiny_config


CLASSES, LABELS = [InsNextForSequenceClassification, InsNextForTokenClassification, InsNextForMultipleChoice], 3
TEXT = random_ids(1, 6)


def double(model_class, **overrides):
    return shipped_model(model_class, num_labels=LABELS, **overrides).double()


def padded(ids, left, right):
    """Return ids between `left` and `right` pads, and the mask."""
    row = torch.cat([ids.new_zeros(len(ids), left), ids, ids.new_zeros(len(ids), right)], 1)
    mask = torch.zeros_like(row)
    mask[:, left : left + ids.shape[1]] = 1
    return row, mask


def text_logits(model, ids, mask=None, left=0, length=None):
    """Return one vector a text, or one a token, whatever the head."""
    if isinstance(model, InsNextForMultipleChoice):
        return model(ids[None], None if mask is None else mask[None]).logits[0][:, None]
    logits = model(ids, mask).logits
    return logits[:, left : left + (length or ids.shape[1])] if logits.ndim == 3 else logits


def test_shapes_of_the_logits():
    ids = random_ids(4, 7)
    assert double(InsNextForSequenceClassification)(ids).logits.shape == (4, LABELS)
    assert double(InsNextForTokenClassification)(ids).logits.shape == (4, 7, LABELS)
    assert double(InsNextForMultipleChoice)(ids.view(2, 2, 7)).logits.shape == (2, 2)


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_tuple_and_the_states_of_every_layer_on_demand(model_class):
    model = double(model_class, attn_implementation="eager")
    ids = TEXT[None] if model_class is InsNextForMultipleChoice else TEXT
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert within_rounding(model(ids, return_dict=False)[0], output.logits)
    assert [state.shape for state in output.hidden_states] == [(1, 6, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(1, 4, 6, 6)] * 2


def test_one_label_is_a_regression():
    model = shipped_model(InsNextForSequenceClassification, num_labels=1).double()
    ids, labels = random_ids(4, 7), torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    output = model(ids, labels=labels)
    assert abs(output.loss - (output.logits[:, 0] - labels).square().mean()) < 1e-12


def test_whole_numbers_are_single_labels_and_rows_of_floats_several():
    ids = random_ids(4, 7)
    single, several = torch.tensor([0, 2, 1, 1]), torch.rand(4, LABELS, dtype=torch.float64).round()
    output = double(InsNextForSequenceClassification)(ids, labels=single)
    expected = -output.logits.log_softmax(1)[torch.arange(4), single].mean()
    assert abs(output.loss - expected) < 1e-12
    output = double(InsNextForSequenceClassification)(ids, labels=several)
    log_p, log_q = torch.nn.functional.logsigmoid(output.logits), torch.nn.functional.logsigmoid(-output.logits)
    assert abs(output.loss + (several * log_p + (1 - several) * log_q).mean()) < 1e-12


def test_token_loss_is_the_mean_over_labelled_tokens():
    model, ids = double(InsNextForTokenClassification), random_ids(2, 5)
    labels = torch.tensor([[-100, 0, 2, -100, 1], [-100, -100, 1, -100, -100]])
    output = model(ids, labels=labels)
    kept = labels != -100
    expected = -output.logits.log_softmax(2)[kept].gather(1, labels[kept][:, None]).mean()
    assert abs(output.loss - expected) < 1e-6  # transformers computes it in float32
    assert abs(model(ids, labels=labels, num_items_in_batch=8).loss - expected * 4 / 8) < 1e-6


def test_without_a_labelled_token_the_loss_is_zero():
    model = double(InsNextForTokenClassification)
    loss = model(TEXT, labels=torch.full_like(TEXT, -100)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_multiple_choice_is_a_softmax_over_the_choices():
    model, ids, labels = double(InsNextForMultipleChoice), random_ids(6, 5).view(2, 3, 5), torch.tensor([2, 0])
    output = model(ids, labels=labels)
    assert abs(output.loss + output.logits.log_softmax(1)[torch.arange(2), labels].mean()) < 1e-12
    swapped = model(ids[:, [1, 0, 2]]).logits
    assert (swapped - output.logits[:, [1, 0, 2]]).abs().max() < 1e-10


@pytest.mark.parametrize(
    "options",
    [{}, {"position_encoding": "sinusoidal"}, {"classifier_pooling": "last"}],
    ids=["", "sinusoidal", "last"],
)
@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 4)])
def test_padding_does_not_change_the_logits(model_class, left, right, options):
    model = double(model_class, **options)
    ids, mask = padded(TEXT, left, right)
    exact = text_logits(model, TEXT)
    assert (text_logits(model, ids, mask, left, TEXT.shape[1]) - exact).abs().max() < 1e-10
    # control: the mask is what does it
    assert (text_logits(model, ids, None, left, TEXT.shape[1]) - exact).abs().max() > 1e-3


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_batch_is_its_rows(model_class):
    model = double(model_class)
    ids, mask = padded(TEXT, 0, 2)
    other = random_ids(1, 8, seed=1)
    batch = text_logits(model, torch.cat([ids, other]), torch.cat([mask, torch.ones_like(other)]))
    alone = text_logits(model, TEXT)
    assert (batch[:1, : TEXT.shape[1]] - alone).abs().max() < 1e-10


@pytest.mark.parametrize("index", [1, 3])
def test_every_token_reads_the_tokens_on_its_right(index):
    model = double(InsNextForTokenClassification)
    changed = TEXT.clone()
    changed[0, index + 1] = 3 + (changed[0, index + 1] - 2) % 50
    difference = (model(changed).logits - model(TEXT).logits).abs().amax(2)[0]
    assert (difference > 1e-6).all()
    # control: the causal encoding of the same weights does not
    causal = [model.model(ids, is_causal=True).last_hidden_state for ids in (changed, TEXT)]
    assert (causal[0] - causal[1]).abs()[0, : index + 1].max() == 0


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_class_is_read_off_the_mean_or_the_last_state(pooling):
    model = double(InsNextForSequenceClassification, classifier_pooling=pooling)
    hidden = model.model(TEXT).last_hidden_state
    state = {"mean": hidden.mean(1), "last": hidden[:, -1]}[pooling]
    assert (model(TEXT).logits - model.score(state)).abs().max() < 1e-12
    ids, mask = padded(TEXT, 2, 3)
    assert (model(ids, mask).logits - model.score(state)).abs().max() < 1e-10


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("model_class", [InsNextForSequenceClassification, InsNextForMultipleChoice])
def test_the_class_of_a_text_depends_on_every_token(model_class, pooling):
    model = double(model_class, classifier_pooling=pooling)
    exact = text_logits(model, TEXT)
    for index in range(TEXT.shape[1]):
        changed = TEXT.clone()
        changed[0, index] = 3 + (changed[0, index] - 2) % 50
        assert (text_logits(model, changed) - exact).abs().max() > 1e-6, index


def test_embeddings_may_take_the_place_of_ids():
    for model_class in CLASSES:
        model = double(model_class)
        ids = TEXT[None] if model_class is InsNextForMultipleChoice else TEXT
        embeds = model.model.embed_tokens(ids)
        assert within_rounding(model(inputs_embeds=embeds).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": TEXT}, r"input_ids or inputs_embeds \[B, C, T\], got \[1, 6\]"),
        ({"inputs_embeds": torch.zeros(2, 6, 32)}, r"input_ids or inputs_embeds \[B, C, T\], got \[2, 6\]"),
        ({"input_ids": TEXT[None], "attention_mask": torch.ones(1, 6)}, r"attention_mask \[B, C, T\], got \[1, 6\]"),
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": TEXT[None], "inputs_embeds": torch.zeros(1, 1, 6, 32)}, "exactly one of"),
    ],
)
def test_multiple_choice_names_what_has_the_wrong_shape(arguments, message):
    with pytest.raises(ValueError, match=message):
        shipped_model(InsNextForMultipleChoice)(**arguments)


@pytest.mark.parametrize("model_class", [InsNextModel, *CLASSES[:2]])
def test_a_mask_of_another_length_is_refused(model_class):
    for mask in (torch.ones(1, 5), torch.ones(1, 7), torch.ones(2, 6)):
        with pytest.raises(ValueError, match=r"attention_mask must be \[1, 6\]"):
            shipped_model(model_class)(TEXT, attention_mask=mask.long())


def test_the_number_of_labels_comes_from_the_configuration():
    for labels in (2, 5):
        assert shipped_model(InsNextForSequenceClassification, num_labels=labels)(TEXT).logits.shape == (1, labels)
    assert tiny_config(id2label={0: "no", 1: "yes"}).num_labels == 2
