"""`torch.export`: one graph for every batch and length, padded on either side or packed."""

import pytest
import torch

from tests.support.equality import difference
from tests.support.insnext import tiny_model


IDS = torch.tensor([[1, 5, 9, 4, 8, 8, 7], [1, 7, 3, 8, 9, 4, 4]])
MASKS = {
    "all ones": torch.ones_like(IDS),
    "left": torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]]),
}


def exported(model, **fields):
    rows, columns = torch.export.Dim("rows", min=2, max=16), torch.export.Dim("columns", min=3, max=64)
    shapes = {name: {0: rows, 1: columns} for name in fields}
    return torch.export.export(
        model, (), {**fields, "use_cache": False}, dynamic_shapes={**shapes, "use_cache": None}, strict=False
    ).module()


@pytest.mark.parametrize("attn", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
def test_the_exported_model_reads_other_batches_lengths_and_padding(attn):
    model = tiny_model(attn=attn)
    graph = exported(model, input_ids=IDS, attention_mask=MASKS["all ones"])
    for mask in MASKS.values():
        ids, mask = torch.cat([IDS, IDS[:1]])[:, :6], torch.cat([mask, mask[:1]])[:, :6]
        logits = graph(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        assert difference(logits, model(ids, attention_mask=mask).logits[mask.bool()]) < 1e-9


def test_the_exported_model_keeps_packed_texts_apart():
    model, plain, packed = tiny_model(), torch.arange(7).expand(2, -1), torch.arange(7).expand(2, -1) % 4
    graph = exported(model, input_ids=IDS, position_ids=plain.contiguous())
    for position_ids in (plain, packed):
        logits = graph(input_ids=IDS, position_ids=position_ids, use_cache=False).logits
        assert difference(logits, model(IDS, position_ids=position_ids).logits) < 1e-9
    # control: they would see one another
    assert difference(model(IDS, position_ids=packed).logits, model(IDS).logits) > 1e-3
