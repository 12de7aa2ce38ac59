"""How far two tensors are apart: in the largest entry, and in the Euclidean norm."""

import torch


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference; nan and different patterns of infinity are errors."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert not actual.isnan().any() and not expected.isnan().any(), "nan in a result"
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite]) and actual[finite].isfinite().all(), "infinities differ"
    return (actual[finite] - expected[finite]).abs().max().item() if finite.any() else 0.0


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return |actual - exact| / |exact|; nan and different patterns of infinity are errors."""
    difference(actual, exact)
    finite = exact.isfinite()
    actual, exact = actual.detach().double()[finite], exact.detach().double()[finite]
    return ((actual - exact).norm() / exact.norm().clamp_min(1e-300)).item()
