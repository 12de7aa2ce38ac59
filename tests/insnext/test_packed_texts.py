"""Texts behind one another in a row that only position ids tell apart, as collators without padding send them."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from modeling_insnext import InsNextForSequenceClassification, InsNextForTokenClassification, InsNextModel
from tests.support.equality import difference
from tests.support.insnext import tiny_model


TEXTS = [[1, 5, 9, 4, 2], [1, 7, 7], [1, 3, 8, 11, 20, 4, 2]]
BUDGET = 1e-9


def flattened(**options):
    collator = DataCollatorWithFlattening(return_tensors="pt", **options)
    return collator([{"input_ids": ids} for ids in TEXTS])


def alone(model, ids, **fields):
    return model(torch.tensor([ids]), **fields)


@pytest.mark.parametrize("changes", [{}, {"attn": "sdpa"}, {"position_encoding": "rotary"}], ids=str)
@pytest.mark.parametrize("said", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_flattened_documents_are_documents_alone(changes, said):
    model, batch = tiny_model(**changes), flattened(**said)
    out = model(**batch)
    expected = [alone(model, ids, labels=torch.tensor([ids])) for ids in TEXTS]
    counts = [len(ids) - 1 for ids in TEXTS]
    assert difference(out.logits, torch.cat([one.logits for one in expected], 1)) < BUDGET
    loss = sum(one.loss * count for one, count in zip(expected, counts, strict=True)) / sum(counts)
    assert abs(out.loss - loss) < BUDGET
    # control: without position ids they see one another
    assert abs(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss - loss) > 1e-3


def test_the_gradients_of_flattened_documents_are_those_of_documents_alone():
    model = tiny_model()
    model(**flattened(), num_items_in_batch=1).loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for ids in TEXTS:
        alone(model, ids, labels=torch.tensor([ids]), num_items_in_batch=1).loss.backward()
    assert max(difference(ours, p.grad) for ours, p in zip(packed, model.parameters(), strict=True)) < BUDGET


def test_the_first_token_of_a_packed_text_is_no_target_of_the_text_before():
    model, batch = tiny_model(), flattened()
    unmasked = {**batch, "labels": batch["input_ids"]}
    assert abs(model(**unmasked).loss - model(**batch).loss) < BUDGET
    unmasked["input_ids"] = unmasked["labels"] = torch.where(batch["input_ids"] == 1, 6, batch["input_ids"])
    masked = {**unmasked, "labels": torch.where(batch["position_ids"] == 0, -100, unmasked["labels"])}
    assert abs(model(**unmasked).loss - model(**masked).loss) < BUDGET


@pytest.mark.parametrize("model_class", [InsNextModel, InsNextForTokenClassification])
def test_encoders_read_each_packed_text_as_a_whole(model_class):
    model, batch = tiny_model(model_class), flattened()
    fields = {name: batch[name] for name in ("input_ids", "position_ids")}
    states = [alone(model, ids)[0] for ids in TEXTS]
    assert difference(model(**fields)[0], torch.cat(states, 1)) < BUDGET
    assert difference(model(batch["input_ids"])[0], torch.cat(states, 1)) > 1e-3


def test_one_class_for_several_texts_is_refused():
    model, batch = tiny_model(InsNextForSequenceClassification), flattened()
    with pytest.raises(
        ValueError, match=r"position_ids must rise by one along a text, got \[4, 0\] at column 5 of row 0"
    ):
        model(batch["input_ids"], position_ids=batch["position_ids"])
    ids = torch.tensor(TEXTS[:1])
    assert difference(model(ids, position_ids=torch.arange(5)[None]).logits, model(ids).logits) == 0


@pytest.mark.parametrize("first", [0, 3])
def test_plain_position_ids_change_nothing(first):
    model, ids = tiny_model(), torch.tensor([[1, 5, 9, 4, 2], [0, 0, 1, 8, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    for plain in (torch.arange(5)[None], (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)):
        logits = model(ids, attention_mask=mask, position_ids=plain + first).logits[mask.bool()]
        assert difference(logits, expected) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"position_ids": [[0, 1, 3, 4]]},
            r"must rise by one along a text or begin anew, at 0, .* got \[1, 3\] at col",
        ),
        (
            {"position_ids": [[3, 2, 1, 0]]},
            r"must rise by one along a text or begin anew, at 3, .* got \[3, 2\] at col",
        ),
        ({"position_ids": [[0, 1, 2]]}, r"must be integers \[1, 4\] or \[1, 4\], got torch.int64 \[1, 3\]"),
        ({"position_ids": [[0, 1, 0, 1]], "positions": [[0, 1, 2, 3]]}, "exclude positions, got both"),
        ({"position_ids": [[0, 1, 0, 1]], "start": [[0, 0, 2, 2]]}, "exclude start, got both"),
        ({"seq_idx": [[0, 0, 1, 1]]}, r"need position_ids .*, got \['seq_idx'\] alone"),
        (
            {"position_ids": [[0, 1, 0, 1]], "seq_idx": [[0, 0, 0, 1]]},
            r"seq_idx must say .* from columns \[0, 2\], got",
        ),
        ({"position_ids": [[0, 1, 0, 1]], "cu_seq_lens_q": [0, 3, 4]}, r"cu_seq_lens_q must say .* got \[0, 3, 4\]"),
    ],
)
def test_position_ids_that_are_no_texts_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.tensor([[1, 5, 1, 4]]), **{name: torch.tensor(value) for name, value in fields.items()})


def test_behind_a_cache_position_ids_go_on():
    model, ids = tiny_model(), torch.tensor([[1, 5, 9, 4]])
    cache = model(ids[:, :2], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"must rise by one along a text, got \[2, 0\] at column 1 of row 0"):
        model(ids[:, 2:], past_key_values=cache, position_ids=torch.tensor([[2, 0]]))
    logits = model(ids[:, 2:], past_key_values=cache, position_ids=torch.tensor([[2, 3]])).logits
    assert difference(logits, model(ids).logits[:, 2:]) < BUDGET
