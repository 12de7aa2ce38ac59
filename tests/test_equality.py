"""The two equalities of the tests are told apart by what they let pass."""

import pytest
import torch

from tests.support import drt, insnext
from tests.support.equality import assert_set_as_accurate, same_bits, within_rounding


MAKERS = {"insnext": insnext.tiny_model, "drt": drt.tiny_model}


def logits(model):
    ids = torch.randint(3, 23, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MAKERS)
def test_the_rounding_of_a_tiny_model_is_within_rounding_and_a_weight_in_bfloat16_is_not(name, seed):
    exact = logits(MAKERS[name](seed=seed)).float()
    model = MAKERS[name](seed=seed, dtype=torch.float32)
    assert within_rounding(logits(model), exact) and not same_bits(logits(model), exact)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight.copy_(weight.bfloat16())
    assert not within_rounding(logits(model), exact)


def test_bits_are_the_dtype_too_and_every_entry_of_a_container():
    one = torch.tensor([1.0, 2.0])
    assert same_bits({"a": [one]}, {"a": [one.clone()]})
    assert not same_bits(one, one.double())
    assert not same_bits({"a": one}, {"b": one}) and not same_bits([one], [one, one])
    assert not same_bits([one, one], [one, one * (1 + 2**-23)])
    assert within_rounding([one, one], [one, one * (1 + 2**-23)])


def test_infinities_must_stand_in_the_same_places():
    one = torch.tensor([1.0, -torch.inf])
    assert within_rounding(one, one * (1 + 2**-23))
    with pytest.raises(AssertionError, match="infinities differ"):
        within_rounding(one, torch.tensor([1.0, torch.inf]))
    with pytest.raises(AssertionError, match="nan"):
        within_rounding(one * torch.nan, one)


def test_a_lucky_tensor_of_the_twin_sets_no_budget_and_a_wrong_one_of_ours_is_seen():
    exact = {str(n): torch.ones(9, dtype=torch.float64) for n in range(30)}
    twin = {name: (tensor * (1 + 1e-6)).float() for name, tensor in exact.items()}
    ours = dict(twin)
    assert_set_as_accurate(ours, {**twin, "0": exact["0"].float()}, exact)
    for wrong in (exact["3"].float() * (1 + 1e-4), exact["3"].float() * 0, exact["3"].float() * 2):
        with pytest.raises(AssertionError, match="above budget"):
            assert_set_as_accurate({**ours, "3": wrong}, twin, exact)
