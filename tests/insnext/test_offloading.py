"""Weights that are elsewhere until a module is called, or that no float tensor holds."""

import accelerate
import pytest
import torch
from torch.utils._pytree import tree_map_only

from modeling_insnext import InsNextForInsertionLM
from modeling_insnext.insnext.checkpoint import _check_finite
from modeling_insnext.insnext.slots import InsNextSlotHead
from tests.support.equality import difference
from tests.support.insnext import tiny_model


IDS = torch.tensor([[1, 5, 9, 4], [1, 7, 3, 8]])
POSITIONS = torch.tensor([[0, 2, 1, 3]] * 2)
ON_DISK = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
           "model.norm": "disk", "slot_head": "disk"}  # fmt: skip


def offloaded(how, folder):
    if how == "cpu":
        return accelerate.cpu_offload(tiny_model(), execution_device="cpu")
    if how == "disk":
        return accelerate.disk_offload(tiny_model(), str(folder), execution_device="cpu")
    tiny_model().save_pretrained(folder / "saved")
    return InsNextForInsertionLM.from_pretrained(
        folder / "saved", device_map=ON_DISK, offload_folder=str(folder / "weights"), dtype=torch.float64
    )


@pytest.mark.parametrize("how", ["cpu", "disk", "device_map"])
@torch.no_grad()
def test_an_offloaded_model_is_the_model(how, tmp_path):
    plain, model = tiny_model(), offloaded(how, tmp_path)
    assert model.slot_head.edge.device.type == "meta"
    assert difference(model(IDS).logits, plain(IDS).logits) < 1e-9
    fields = {"positions": POSITIONS, "context_length": 1, "labels": IDS}
    assert abs(model(IDS, **fields).loss - plain(IDS, **fields).loss) < 1e-9
    assert difference(model.score(IDS), plain.score(IDS)) < 1e-9
    for options in (
        {},
        {"left_to_right": True},
        {"num_beams": 2},
        {"do_sample": True, "seed": 3},
        {"ebr": True, "ebr_ratio": 0},
    ):
        options = {"max_new_tokens": 4, "do_sample": False, **options}
        assert model.generate(IDS, **options).tolist() == plain.generate(IDS, **options).tolist()


def test_control_a_weight_that_is_read_while_its_module_is_not_called_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(InsNextSlotHead, "edge_side", lambda head: head.right_proj(head.edge))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        offloaded("disk", tmp_path)(IDS)


class Pair(torch.Tensor):
    """A tensor made of two others, as quantised ones are, that knows nothing but `detach`."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Pair(**parts)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return tree_map_only(Pair, lambda pair: Pair(pair.values, pair.scale), args[0])
        raise NotImplementedError(f"{function} of a quantised tensor")


def test_quantised_weights_are_checked_by_their_parts():
    model = tiny_model()
    pair = Pair(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, dtype=torch.float32))
    with pytest.raises(NotImplementedError, match="quantised"):
        pair.isfinite()
    model.slot_head.left_proj.weight = torch.nn.Parameter(pair, requires_grad=False)
    _check_finite(model)
    pair.scale[3] = torch.nan
    with pytest.raises(ValueError, match="weights must be finite, got 1 that are not in slot_head.left_proj.weight"):
        _check_finite(model)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per")
@torch.no_grad()
def test_a_model_quantised_while_it_runs_scores_and_writes():
    plain, other = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32, seed=1)
    small = tiny_model(dtype=torch.float32)
    small = torch.ao.quantization.quantize_dynamic(small, {torch.nn.Linear}, dtype=torch.qint8)
    fields = {"positions": POSITIONS, "context_length": 1, "labels": IDS}
    loss, exact, wrong = (float(model(IDS, **fields).loss) for model in (small, plain, other))
    assert 0 < abs(loss - exact) < abs(wrong - exact)
    assert small.generate(IDS, max_new_tokens=3, min_new_tokens=3).shape[1] == 7
