"""`torch.export`: one graph for every batch, padded as it likes, that computes what the model does."""

import pytest
import torch

from tests.support.drt import padded, random_ids, tiny_model, whole


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(ids, mask, use_cache=False).logits


SMALL = {"num_lower_layers": 1, "retrieval_groups": [1]}


@pytest.mark.parametrize(
    ("changes", "strict"),
    [
        pytest.param({}, False, id="token", marks=pytest.mark.slow),
        pytest.param({"landmark_source": "mean", "position_encoding": "rope"}, True, id="mean, rope, strict"),
        pytest.param({"retriever": "fixed"}, False, id="fixed", marks=pytest.mark.slow),
    ],
)
def test_a_graph_takes_any_batch_and_any_padding(changes, strict):
    model = tiny_model(**SMALL, **changes)
    ids, mask = padded(random_ids(3, 24), [24, 17, 20], "left")
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    shapes = {"ids": rows, "mask": rows}
    exported = torch.export.export(Logits(model), (ids, mask), dynamic_shapes=shapes, strict=strict).module()
    for side, lengths in (("left", [24, 3]), ("right", [5, 24, 23, 11]), ("right", [24] * 3)):
        other, mask = padded(random_ids(len(lengths), 24, seed=1), lengths, side)
        with torch.no_grad():
            assert (exported(other, mask) - whole(model, other, mask)).abs().max() < 1e-9
    # control: the mask is no constant of the graph
    assert (exported(other, mask) - exported(other, mask.fliplr().triu())).abs().max() > 1e-3


def test_without_a_mask_the_batch_is_free_as_well():
    model = tiny_model(**SMALL)
    shapes = {"ids": {0: torch.export.Dim("rows", min=2, max=64)}}
    exported = torch.export.export(Logits(model), (random_ids(3, 24),), dynamic_shapes=shapes).module()
    other = random_ids(5, 24, seed=1)
    with torch.no_grad():
        assert (exported(other) - whole(model, other)).abs().max() < 1e-9
        assert (exported(other) - exported(other.flip(0))).abs().max() > 1e-3
