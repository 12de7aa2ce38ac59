"""What a step of decoding asks and makes: one question to the device, one window for all layers."""

import pytest
import torch

from modeling_insnext import ChunkMemoryCache
from modeling_insnext.drt import layers
from modeling_insnext.drt.modeling_drt import DrtModel
from tests.support.drt import ROPE, random_ids, tiny_model


ASKING = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy")


def observed_step(monkeypatch, model, masked: bool) -> dict[str, int]:
    """Return how often one step inside a chunk asks the device, makes a tensor of numbers and prepares a window."""
    ids, seen = random_ids(2, 43), {"questions": 0, "tensors": 0, "windows": 0}
    past = ChunkMemoryCache(model.config)
    with torch.no_grad():
        model(ids[:, :42], past_key_values=past)

    def counted(name, function):
        def count(*args, **kwargs):
            seen[name] += 1
            return function(*args, **kwargs)

        return count

    backend = layers.BACKENDS["sdpa"]
    with monkeypatch.context() as patch, torch.no_grad():
        for name in ASKING:
            patch.setattr(torch.Tensor, name, counted("questions", getattr(torch.Tensor, name)))
        patch.setattr(torch, "tensor", counted("tensors", torch.tensor))
        counting = backend._replace(prepare=counted("windows", backend.prepare))
        patch.setitem(layers.BACKENDS, "sdpa", counting)
        mask = torch.ones(2, 43, dtype=torch.long) if masked else None
        model(ids[:, 42:], mask, past_key_values=past)
    return seen


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("changes", [{}, {"landmark_source": "mean"}, {"retrieval_groups": [1, 1, 1, 1]}])
def test_a_step_asks_once_and_prepares_one_window_however_many_groups_there_are(changes, masked, monkeypatch):
    seen = observed_step(monkeypatch, tiny_model(**changes), masked)
    assert seen == {"questions": 1, "tensors": 0, "windows": 1}


def test_rotary_positions_need_two_small_tensors_a_step(monkeypatch):
    seen = observed_step(monkeypatch, tiny_model(**ROPE, retrieval_groups=[1, 1, 1]), masked=True)
    assert seen == {"questions": 1, "tensors": 2, "windows": 1}


def test_where_layers_remember_different_numbers_of_keys_one_window_is_not_enough(monkeypatch):
    """The control: the first full pass of a lower-only prefill."""
    model, windows = tiny_model(), []
    windowed = DrtModel._windowed

    def watched(self, carried, layer, hidden):
        carried = windowed(self, carried, layer, hidden)
        windows.append((layer, carried.window.remembered))
        return carried

    monkeypatch.setattr(DrtModel, "_windowed", watched)
    model.prefill(random_ids(1, 90), lower_only=True, segment_length=30)
    remembered = {layer: {n for other, n in windows if other == layer} for layer in (0, 2)}
    assert 0 in remembered[2] and max(remembered[0]) > 0 and remembered[0] != remembered[2]
