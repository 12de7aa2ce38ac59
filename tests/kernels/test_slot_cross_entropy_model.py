"""`slot_cross_entropy` in the model: the same loss and the same gradients as the chunked eager code."""

import pytest
import torch

from insnext_kernels import slot_cross_entropy
from insnext_kernels.slot_cross_entropy import Kind
from modeling_insnext.insnext import slot_losses
from modeling_insnext.insnext.supervision import Supervision, TargetKind
from tests.support.equality import relative_error
from tests.support.insnext import tiny_model
from tests.support.kernels import DEVICE


def packed_texts(generator, lengths=(9, 14, 6), contexts=(3, 5, 6), pads=2):
    """Return positions, start and horizon, `[1, N]`, of texts that are written at random behind one another."""
    positions, start, horizon = [], [], []
    for length, context in zip(lengths, contexts, strict=True):
        first = len(start)
        given = torch.randperm(length - 1, generator=generator)[: context - 1].sort().values + 1
        rest = torch.tensor([p for p in range(1, length) if p not in given.tolist()], dtype=torch.long)
        order = [0, *given.tolist(), *rest[torch.randperm(len(rest), generator=generator)].tolist()]
        positions += order
        start += [first] * length
        horizon += [first + context - 1] * context + list(range(first + context, first + length))
    alone = list(range(len(start), len(start) + pads))
    return [
        torch.tensor([x + y], device=DEVICE) for x, y in ((positions, [0] * pads), (start, alone), (horizon, alone))
    ]


def on_device(dtype, **options):
    shape = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 2}
    return tiny_model(dtype=dtype, attn=None, **shape, **options).train().to(DEVICE)


def batch(soft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    positions, start, horizon = packed_texts(generator)
    N = positions.shape[1]
    ids = torch.randint(3, 23, (1, N), generator=generator).to(DEVICE)
    ids[start == torch.arange(N, device=DEVICE)] = 1
    labels = torch.where(torch.rand(1, N, generator=generator).to(DEVICE) < 0.2, -100, ids)
    inputs = {"input_ids": ids, "positions": positions, "start": start, "horizon": horizon, "labels": labels}
    inputs["stop_targets"] = torch.rand(1, N, generator=generator).to(DEVICE) < 0.7
    if soft:
        inputs["target_kinds"] = torch.randint(0, 3, (1, N), generator=generator).to(DEVICE)
        inputs["unit_starts"] = torch.rand(1, N, generator=generator).to(DEVICE) < 0.7
    return inputs


def losses_and_gradients(model, inputs, implementation):
    """Return the position loss of every state and all gradients of the slot head, from the hidden states on."""
    model.zero_grad()
    model.config._attn_implementation = implementation
    N = inputs["input_ids"].shape[1]
    torch.manual_seed(1)
    hidden = torch.randn(1, N, 64, device=DEVICE, dtype=model.dtype, requires_grad=True)
    interval = model.model.checked_interval(
        None,
        (1, N),
        hidden.device,
        positions=inputs["positions"],
        start=inputs["start"],
        horizon=inputs["horizon"],
        is_causal=True,
    )
    fields = [inputs.get(name) for name in ("labels", "stop_targets", "target_kinds", "unit_starts")]
    position, _, _ = slot_losses.insertion_losses(model, hidden, inputs["input_ids"], interval, Supervision(*fields))
    (position * torch.randn(position.shape, device=DEVICE, dtype=position.dtype)).sum().backward()
    gradients = {name: x.grad for name, x in model.slot_head.named_parameters() if x.grad is not None}
    return {"loss": position.detach(), "hidden": hidden.grad, **gradients}


def test_model_and_kernel_number_the_kinds_of_targets_alike():
    """Neither imports the other's enum: the numbers are the contract."""
    same = {"HARD": "ITS_TARGET", "PROPORTIONAL": "BY_WEIGHT", "EQUAL": "ALIKE"}
    assert {same[kind.name]: int(kind) for kind in TargetKind} == {kind.name: int(kind) for kind in Kind}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_twin_is_the_position_loss_of_the_model(soft, seed, monkeypatch):
    model, inputs = on_device(torch.float64, position_logit_cap=5.0), batch(soft, seed)
    exact = losses_and_gradients(model, inputs, "eager")
    assert (exact["loss"] > 0).sum() > 10

    def twin(*tensors, impl, **options):
        return slot_cross_entropy(*tensors, impl="reference", **options)

    monkeypatch.setattr(slot_losses, "slot_cross_entropy", twin)
    ours = losses_and_gradients(model, inputs, "insnext_triton")
    assert ours.keys() == exact.keys() >= {"hidden", "edge", "stop_key", "key_proj.weight", "query_proj.weight"}
    assert max(relative_error(ours[name], exact[name]) for name in exact) < 1e-13

    # control: slots that outlive their text would be seen
    def undying(query, key, stop_key, births, deaths, *others, **options):
        deaths = torch.where(deaths > 0, query.shape[1], deaths)
        return twin(query, key, stop_key, births, deaths, *others, **options)

    monkeypatch.setattr(slot_losses, "slot_cross_entropy", undying)
    assert relative_error(losses_and_gradients(model, inputs, "insnext_triton")["loss"], exact["loss"]) > 1e-3


@pytest.mark.parametrize("soft", [False, True])
def test_the_kernels_give_the_model_the_same_loss_and_gradients(soft):
    inputs = batch(soft)
    exact = losses_and_gradients(on_device(torch.float64), inputs, "eager")
    model = on_device(torch.float32)
    twin, ours = (losses_and_gradients(model, inputs, name) for name in ("eager", "insnext_triton"))
    for name in exact:
        budget = 2 * relative_error(twin[name], exact[name]) + torch.finfo(torch.float32).eps
        assert relative_error(ours[name], exact[name]) <= budget, name


@pytest.mark.parametrize("soft", [False, True])
def test_training_with_insnext_triton_is_training_with_eager(soft):
    inputs = batch(soft)
    results = []
    for implementation in ("eager", "insnext_triton"):
        model = on_device(torch.float32)
        model.set_attn_implementation(implementation)
        out = model(**inputs)
        out.loss.backward()
        gradients = torch.cat([x.grad.flatten() for x in model.parameters()])
        results.append((out.loss.detach(), out.position_loss, gradients))
    assert all(relative_error(ours, eager) < 1e-5 for eager, ours in zip(*results, strict=True))


def test_the_eager_model_never_calls_the_kernel(monkeypatch):
    monkeypatch.setattr(slot_losses, "slot_cross_entropy", None)
    model, inputs = on_device(torch.float32), batch(False)
    model.set_attn_implementation("sdpa")
    assert model(**inputs).loss.isfinite()
