"""Insertion attention compiled for Hopper without a GPU: tensor cores, memory, spills."""

import pytest

from tests.support.kernels import SHARED_MEMORY, compiled_for_sm90


CODE = """
import torch, triton
from insnext_kernels.insertion_attention import insertion_attention

compile_ = triton.compile
KERNELS = {wgmma}

def checked(source, **options):
    compiled = compile_(source, **options)
    if source.fn.__name__ in KERNELS:
        assert "wgmma.mma_async" in compiled.asm["ptx"], source.fn.__name__ + " has no wgmma"
    if source.fn.__name__ in ["_decode_kernel", *KERNELS]:
        assert "cp.async" in compiled.asm["ptx"], source.fn.__name__ + " waits for each load"
    return compiled

triton.compile = checked
n, H, G = 1024, 4, {G}
q = torch.randn(2, n, H, {D}).to(torch.{dtype}).transpose(1, 2).requires_grad_()
k, v = (torch.randn(2, n, G, {D}).to(torch.{dtype}).transpose(1, 2).requires_grad_() for _ in range(2))
horizon, slopes = torch.arange(n).repeat(2, 1), torch.rand(2, H)
for positions in {positions}:
    out = insertion_attention(q, k, v, positions, horizon, *slopes, impl="triton")
    out.backward(torch.randn_like(out))
    with torch.no_grad():
        insertion_attention(q[:, :, :1], k, v, positions, horizon[:, -1:], *slopes, impl="triton")
"""
HALF = ["_forward_kernel", "_queries_kernel", "_keys_kernel"]
TABLE = ["_plan_kernel", "_plan_kernel", "_rows_kernel", "_rows_kernel", "_blocks_kernel"]


def reports(dtype: str, D: int, G: int = 4, positions: str = "[horizon]") -> list[dict]:
    wgmma = [] if dtype == "float32" else HALF
    return compiled_for_sm90(CODE.format(dtype=dtype, D=D, G=G, positions=positions, wgmma=wgmma), timeout=3000)


def check(found: list[dict], names: list[str], stack: int) -> None:
    assert sorted(report["name"] for report in found) == sorted(names)
    for report in found:
        assert report["shared"] <= SHARED_MEMORY, report
        assert report["registers"] <= 255 and report["stack"] <= stack, report


STEP = """
import torch
from insnext_kernels import insertion_attention

q, k = (torch.zeros(1, 4, n, 64, dtype=torch.bfloat16) for n in (1, 1024))
if {wide}:
    k = torch.empty_strided(k.shape, (1024 << 21, 64, 1 << 21, 1), dtype=k.dtype)
insertion_attention(q, k, k, None, torch.full((1, 1), 1023), *torch.rand(2, 4), impl="triton")
"""


@pytest.mark.parametrize(
    "wide", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["rows near", "rows far apart"]
)
def test_a_step_of_decoding_compiles_for_hopper(wide):
    """The compiler itself, in a few seconds; `make slow` compiles everything."""
    check(compiled_for_sm90(STEP.format(wide=wide)), ["_plan_kernel", "_decode_kernel", "_merge_kernel"], stack=0)


@pytest.mark.slow
def test_the_kernels_of_training_and_decoding_compile_for_hopper():
    found = reports("bfloat16", 64)
    # the few bytes of the keys' kernel are spilled outside its loops
    check(found, [*HALF, *TABLE, "_decode_kernel", "_merge_kernel"], stack=128)


@pytest.mark.slow
@pytest.mark.parametrize("D", [32, 96, 128])
def test_other_head_dims_compile_for_hopper(D):
    found = reports("float16", D, G=2, positions="[horizon, None]")
    names = [*HALF, *HALF, *TABLE, "_decode_kernel", "_decode_kernel", "_merge_kernel", "_plan_kernel", "_plan_kernel"]
    check(found, names, stack=256)


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128])
def test_full_precision_compiles_for_hopper(D):
    found = reports("float32", D)
    # without tensor cores, operands of products lie in registers, and there are not enough of these
    check(found, [*HALF, *TABLE, "_decode_kernel", "_merge_kernel"], stack=8192)
