"""What training scripts written for other models send: labels of BOS, shifted labels, losses that go past forward."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_insnext import InsNextModel
from tests.support.equality import difference
from tests.support.insnext import BOS, tiny_model


JOINED = torch.tensor([[BOS, 5, 9, 2, BOS, 4, 7, 2], [8, 3, 2, BOS, 11, 6, 2, BOS]])


def test_bos_as_a_label_counts_as_no_label():
    model = tiny_model()
    masked = JOINED.masked_fill(JOINED == BOS, -100)
    assert abs(model(JOINED, labels=JOINED).loss - model(JOINED, labels=masked).loss) == 0
    # control: another token in its place is a target
    other = JOINED.masked_fill(JOINED == BOS, 5)
    assert abs(model(JOINED, labels=other).loss - model(JOINED, labels=masked).loss) > 1e-3


def test_bos_that_is_eos_as_well_is_a_target():
    model = tiny_model(bos_token_id=2, eos_token_id=2)
    ids = torch.tensor([[2, 5, 9, 2]])
    expected = -model(ids).logits[0, range(3), [5, 9, 2]].mean()
    assert abs(model(ids, labels=ids).loss - expected) < 1e-12


def test_shifted_labels_are_labels():
    model = tiny_model()
    shifted = torch.nn.functional.pad(JOINED[:, 1:], (0, 1), value=-100)
    expected = model(JOINED, labels=JOINED).loss
    assert abs(model(JOINED, shift_labels=shifted).loss - expected) < 1e-12
    assert abs(model(JOINED, labels=JOINED, shift_labels=shifted).loss - expected) < 1e-12
    # control: they are not shifted once more
    assert abs(model(JOINED, shift_labels=JOINED).loss - expected) > 1e-3
    with pytest.raises(ValueError, match="shift_labels are for text from left to right, got positions too"):
        model(JOINED, positions=torch.arange(8).expand(2, -1), shift_labels=shifted)


def test_what_describes_a_loss_needs_labels():
    model, positions = tiny_model(), torch.arange(8).expand(2, -1)
    with pytest.raises(ValueError, match="num_items_in_batch need labels, got None; label_smoothing_factor"):
        model(JOINED, num_items_in_batch=7)
    with pytest.raises(ValueError, match="step_weights need labels, got None"):
        model(JOINED, positions=positions, step_weights=torch.ones(2, 8))


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        **options,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in JOINED.tolist()]
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def test_label_smoothing_is_refused_by_the_plain_trainer_in_training_and_evaluation(tmp_path):
    smoothed = trainer(tiny_model(dtype=torch.float32), tmp_path, label_smoothing_factor=0.1)
    for work in (smoothed.train, smoothed.evaluate):
        with pytest.raises(ValueError, match="label_smoothing_factor, which takes them away, must be 0"):
            work()


def test_the_plain_trainer_reports_the_loss_of_forward(tmp_path):
    model = tiny_model(dtype=torch.float32)
    expected = float(model(JOINED, labels=JOINED.masked_fill(JOINED == BOS, -100)).loss)
    plain = trainer(model, tmp_path, label_smoothing_factor=0.0)
    plain.data_collator = lambda rows: {
        "input_ids": torch.tensor([row["input_ids"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]).masked_fill(JOINED == BOS, -100),
    }
    assert plain.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    plain.train()
    assert plain.state.log_history[-1]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_encoder_of_a_language_model_does_not_guess_how_it_is_read():
    """A fused loss takes `base_model` for causal and `lm_head` for the map from its states to logits."""
    model = tiny_model()
    for encoder in (model.base_model, model.model, model.get_decoder()):
        with pytest.raises(ValueError, match="is_causal must be True or False, got None.*trl >= 1.7.*forward"):
            encoder(JOINED, attention_mask=torch.ones_like(JOINED), use_cache=False)
    whole, causal = (model.model(JOINED, is_causal=way).last_hidden_state for way in (False, True))
    assert difference(whole, causal) > 1e-3
    alone = InsNextModel(model.config).double().eval()
    alone.load_state_dict(model.model.state_dict())
    assert difference(alone(JOINED).last_hidden_state, whole) < 1e-12
