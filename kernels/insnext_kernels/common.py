"""What all operators share: checks, the choice of an implementation, the guard of a launch, memory to write into."""

import functools
import importlib.util
import math
import os
from collections.abc import Callable

import torch


IMPLEMENTATIONS = ("auto", "reference", "triton")
# multiprocessors of a Hopper GPU, for which the tiles were chosen; asked for where there is no GPU
MULTIPROCESSORS = 132
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


def check_tensors(**tensors: torch.Tensor | None) -> None:
    """Refuse what is no tensor, or lies on another device than the first; `None` is an argument that was not given.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If devices differ.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if len({x.device for x in given.values()}) > 1:
        where = ", ".join(f"{name} on {str(x.device)!r}" for name, x in given.items())
        raise ValueError(f"tensors must share a device, got {where}")


def check_positive(name: str, value: float) -> float:
    """Return `value` as a float.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not positive and finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def can_read(tensor: torch.Tensor) -> bool:
    """Return whether values may be looked at: that would make a program wait for a GPU, and break a graph."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not torch.compiler.is_compiling()


def check_range(name: str, tensor: torch.Tensor | None, low: int, high: int) -> None:
    """Refuse integers outside `[low, high]`, on a CPU only.

    Raises:
        ValueError: If there is one.
    """
    if tensor is None or not can_read(tensor):
        return
    least, most = (x.item() for x in tensor.aminmax())
    if least < low or most > high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {least} to {most}")


def operator(name: str) -> Callable:
    """Return a decorator that makes a PyTorch operator of a function: as in :func:`torch.library.custom_op`.

    Triton launches on the current device, which need not be that of the tensors: the operator makes it so.
    """

    def decorate(function: Callable):
        @functools.wraps(function)
        def guarded(*args, **kwargs):
            tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            with torch.cuda.device_of(next(tensors)):
                return function(*args, **kwargs)

        return torch.library.custom_op(f"insnext_kernels::{name}", guarded, mutates_args=())

    return decorate


def full_programs(tensor: torch.Tensor) -> int:
    """Return how many programs fill the device of `tensor` twice."""
    if not tensor.is_cuda:
        return 2 * MULTIPROCESSORS
    return 2 * torch.cuda.get_device_properties(tensor.device).multi_processor_count


def empty(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return memory for a kernel to fill, on the device of `like` and by default of its dtype."""
    memory = torch.empty(shape, device=like.device, dtype=dtype or like.dtype)
    if POISON:
        memory.fill_(torch.nan if memory.is_floating_point() else torch.iinfo(memory.dtype).min)
    return memory


__all__ = [
    "IMPLEMENTATIONS",
    "can_launch",
    "can_read",
    "check_positive",
    "check_range",
    "check_tensors",
    "choose_impl",
    "empty",
    "full_programs",
    "has_triton",
    "interpreting",
    "operator",
]
