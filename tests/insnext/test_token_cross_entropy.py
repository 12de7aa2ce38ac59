"""The loss of tokens over an embedding that is not trained: the same numbers, and no logits are kept."""

from unittest import mock

import pytest
import torch
from torch import nn

from modeling_insnext.insnext import slot_losses, token_cross_entropy
from modeling_insnext.insnext.token_cross_entropy import frozen_cross_entropy, is_frozen
from tests.support.built_text import random_text
from tests.support.equality import difference
from tests.support.insnext import tiny_model


BUDGET = 1e-9


def frozen_model():
    model = tiny_model(num_hidden_layers=1)
    model.lm_head.weight.requires_grad_(False)
    return model


def losses_and_gradients(model):
    """Return losses of states, weighted unlike one another, and their gradient, by the function and plainly."""
    states = torch.randn(11, model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target, weight = torch.arange(11) % 8 + 5, torch.arange(11) - 3.0
    found = []
    for function in (frozen_cross_entropy, plainly):
        leaf = states.clone().requires_grad_()
        loss = function(model, leaf, target)
        (loss * weight).sum().backward()
        found.append((loss.detach(), leaf.grad))
    return found


def plainly(model, states, target):
    return nn.functional.cross_entropy(model.token_logits(states), target, reduction="none")


@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_loss_and_gradient_of_every_state_are_those_of_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(token_cross_entropy, "STATES_PER_CHUNK", chunk)
    (loss, gradient), (expected_loss, expected_gradient) = losses_and_gradients(frozen_model())
    assert difference(loss, expected_loss) < BUDGET and difference(gradient, expected_gradient) < BUDGET


def test_control_a_gradient_that_forgets_the_weights_of_states_is_another(monkeypatch):
    forgets = staticmethod(lambda ctx, grad_M: (ctx.saved_tensors[0], None, None, None))
    monkeypatch.setattr(token_cross_entropy._FrozenCrossEntropy, "backward", forgets)
    (_, gradient), (_, expected) = losses_and_gradients(frozen_model())
    assert difference(gradient, expected) > 1e-3


@pytest.mark.parametrize("stays", [True, False])
def test_training_takes_it_where_the_embedding_stays_and_finds_the_same(stays):
    ids, positions = random_text(12, 3, torch.Generator().manual_seed(1))
    found = []
    for asked in (is_frozen, lambda head: False):
        model = frozen_model()
        model.lm_head.weight.requires_grad_(not stays)
        taken = mock.Mock(wraps=frozen_cross_entropy)
        with mock.patch.multiple(slot_losses, is_frozen=asked, frozen_cross_entropy=taken):
            model(ids, positions=positions, context_length=3, labels=ids).loss.backward()
        assert taken.called == (stays and asked is is_frozen)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert difference(found[0], found[1]) < BUDGET


@pytest.mark.parametrize("change", ["trained", "hook", "wrapped", "bias", "adapter"])
def test_a_head_with_anything_around_it_takes_the_common_way(change):
    head = frozen_model().lm_head
    assert is_frozen(head)
    if change == "trained":
        head.weight.requires_grad_(True)
    elif change == "hook":
        head.register_forward_hook(lambda module, args, out: out)
    elif change == "wrapped":
        head.forward = head.forward
    elif change == "bias":
        head.bias = nn.Parameter(torch.zeros(len(head.weight)))
    else:
        head = type("Adapted", (nn.Linear,), {})(2, 2, bias=False).requires_grad_(False)
    assert not is_frozen(head)


@pytest.mark.parametrize(("function", "waits"), [(frozen_cross_entropy, False), (plainly, True)])
def test_nothing_of_the_size_of_logits_waits_for_the_way_back(function, waits):
    model, kept = frozen_model(), []
    states = torch.randn(9, model.config.hidden_size, dtype=torch.float64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        function(model, states, torch.full((9,), 5))
    assert ((9, model.config.vocab_size) in kept) == waits
