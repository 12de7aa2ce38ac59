"""What the Triton kernels of all operators share. Importing it needs Triton."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


# exponentials and logarithms are taken in powers of two
LOG2_E = tl.constexpr(math.log2(math.e))


class Matrices(NamedTuple):
    """A tensor `[B, heads, N, D]` as kernels take it: strides count elements, that of the last dimension is 1."""

    data: torch.Tensor
    batch: int
    head: int
    row: int


def matrices(x: torch.Tensor) -> Matrices:
    return Matrices(x, *x.stride()[:3])


def contiguous_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors with stride 1 in the last dimension."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def is_wide(*tensors: torch.Tensor) -> bool:
    """Return whether the rows of a tensor reach further than 32 bits count; 64 bits for each row take registers."""
    return any(x.stride(-2) * x.shape[-2] >= 2**31 for x in tensors)


def block(size: int) -> int:
    """Return the tile that holds `size`: a power of two, at least the 16 that a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def widened(stride, WIDE: tl.constexpr):
    """Return the stride between rows such that multiples of it are exact; see `is_wide`."""
    return tl.cast(stride, tl.int64) if WIDE else stride
