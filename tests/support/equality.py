"""Two kinds of equality, and how far two tensors are apart.

`same_bits` is for what is copied, counted or written down: weights, ids, files, a run that is resumed, a kernel that
promises the same result twice. `within_rounding` is for what is computed: the same sums taken over tensors that lie
otherwise in memory, or in another process, take other paths through a processor and round otherwise.
"""

import torch


# a relative error of this many units in the last place, in the norm of the whole tensor: sums of up to a hundred
# products in some twenty layers of matmuls and norms; what is lost by one weight in bfloat16 is a hundred times that
ROUNDINGS = 64


def same_bits(actual, expected) -> bool:
    """Say whether tensors, or containers of tensors, agree in form, dtype and every bit of value (nan never does)."""
    if isinstance(expected, torch.Tensor):
        return actual.dtype == expected.dtype and torch.equal(actual, expected)
    pairs = _pairs(actual, expected)
    return pairs is not None and all(same_bits(*pair) for pair in pairs)


def within_rounding(actual, expected) -> bool:
    """Say whether results agree up to `ROUNDINGS` units in the last place of their norm, infinities included."""
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
        return relative_error(actual, expected) <= ROUNDINGS * torch.finfo(expected.dtype).eps
    pairs = _pairs(actual, expected)
    return pairs is not None and all(within_rounding(*pair) for pair in pairs)


def _pairs(actual, expected):
    """Return the pairs of two containers, or None where they have other names or lengths."""
    if isinstance(expected, dict):
        return [(actual[n], expected[n]) for n in expected] if actual.keys() == expected.keys() else None
    return list(zip(actual, expected, strict=True)) if len(actual) == len(expected) else None


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


def set_error(actual: dict, exact: dict) -> float:
    """Return the root mean square of the relative errors of all tensors of a set."""
    assert actual.keys() == exact.keys()
    errors = [relative_error(actual[name], exact[name]) for name in exact]
    return (sum(error**2 for error in errors) / len(errors)) ** 0.5


def assert_set_as_accurate(ours: dict, twin: dict, exact: dict) -> None:
    """Check that a set of outputs and gradients is at most twice as wrong as the twin's, plus one rounding.

    The error is that of the whole set: of thirty tensors the twin computes one luckily, and that one sets no budget.
    """
    error, budget = set_error(ours, exact), 2 * set_error(twin, exact)
    budget += max(torch.finfo(tensor.dtype).eps for tensor in twin.values())
    assert error <= budget, f"relative error {error:.1e} above budget {budget:.1e}"
