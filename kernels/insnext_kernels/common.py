"""What all operators share: the choice of an implementation, and memory for what a kernel writes."""

import importlib.util
import os

import torch


IMPLEMENTATIONS = ("auto", "reference", "triton")
# tests set this: memory then holds NaN, or the smallest integer, until a kernel has written it
POISON = False


def interpreting() -> bool:
    """Return whether Triton kernels run in its CPU interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def can_launch(tensor: torch.Tensor) -> bool:
    """Return whether a Triton kernel can work on `tensor`."""
    return tensor.is_cuda or interpreting()


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose_impl(impl: str, tensor: torch.Tensor) -> str:
    """Return `"reference"` or `"triton"` for `impl`; `"auto"` is Triton where it runs natively.

    Raises:
        ValueError: If `impl` is unknown, or `"triton"` was asked for where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "auto":
        return "triton" if tensor.is_cuda and has_triton() else "reference"
    if impl == "triton":
        if not has_triton():
            raise ValueError('impl="triton" needs the package triton, which is not installed')
        if not can_launch(tensor):
            raise ValueError(
                'impl="triton" needs a GPU, or TRITON_INTERPRET=1 set before the first import of a kernel; '
                f"got tensors on {tensor.device}"
            )
    return impl


def empty(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return memory for a kernel to fill, on the device of `like` and by default of its dtype."""
    memory = torch.empty(shape, device=like.device, dtype=dtype or like.dtype)
    if POISON:
        memory.fill_(torch.nan if memory.is_floating_point() else torch.iinfo(memory.dtype).min)
    return memory


__all__ = ["IMPLEMENTATIONS", "can_launch", "choose_impl", "empty", "has_triton", "interpreting"]
