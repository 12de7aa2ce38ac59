"""Grouped cross-attention compiled for Hopper without a GPU: tensor cores, asynchronous loads, memory, spills."""

from itertools import product

import pytest
import torch

from insnext_kernels.grouped_cross_attention.triton.tiles import Tiles, tiles
from tests.support.kernels import SHARED_MEMORY, compiled_for_sm90


CODE = """
import os
import torch, triton
from insnext_kernels import grouped_cross_attention

os.environ.update({environment})
compile_ = triton.compile

def checked(source, **options):
    compiled = compile_(source, **options)
    if source.fn.__name__ in {tensor_core_kernels}:
        ptx = compiled.asm["ptx"]
        assert "wgmma.mma_async" in ptx, source.fn.__name__ + " has no wgmma"
        assert "cp.async" in ptx, source.fn.__name__ + " waits for each load"
    return compiled

triton.compile = checked
D, S, M, H, G, C, K, N = {D}, {S}, {M}, 2 * {group}, 2, 32, 8, 32
q = torch.randn(1, C * M, H, D).to(torch.{dtype}).transpose(1, 2).requires_grad_()
k, v = (torch.randn(1, N, S, G, D).to(torch.{dtype}).permute(0, 3, 1, 2, 4).requires_grad_() for _ in range(2))
indices, weights = torch.zeros(1, C, K, dtype=torch.int64), torch.rand(1, C, K).requires_grad_()
out = grouped_cross_attention(q, k, v, indices, weights, off_by_one=True, impl="triton")
out.backward(torch.randn_like(out))
with torch.no_grad():
    args = q, k, v, indices, weights
    grouped_cross_attention(*args, impl="triton")
    grouped_cross_attention(q[:, :, :1], k, v, indices[:, :1], weights[:, :1], off_by_one=True, impl="triton")
"""


def reports(dtype: str, D: int, S: int, M: int = 64, group: int = 1, **environment: str) -> list[dict]:
    kernels = []
    if dtype != "float32" and M * group >= 64:
        # 32 keys are too few for the first operand of wgmma
        kernels = ["_gca_fwd_kernel", "_gca_bwd_q_kernel"] + ["_gca_bwd_kv_kernel"] * (S > 32)
    values = {"dtype": dtype, "D": D, "S": S, "M": M, "group": group}
    return compiled_for_sm90(CODE.format(**values, environment=environment, tensor_core_kernels=kernels))


def check(found: list[dict], dtype: str, D: int, S: int) -> None:
    names = [report["name"] for report in found]
    kernels = ["_gca_fwd_kernel", "_gca_bwd_q_kernel", "_gca_bwd_kv_kernel", "_gca_part_kernel", "_gca_join_kernel"]
    # forward with and without normalisers; the first and the other segments of a list
    assert sorted(names) == sorted([*kernels, "_gca_fwd_kernel", "_gca_bwd_kv_kernel"])
    # bytes of a thread: where chunk and head are both 128 wide, a little more than the registers hold
    both_wide = D == 128 and S > 64
    allowed = (256 if dtype == "float32" else 64) if both_wide else 8
    for report in found:
        assert report["shared"] <= SHARED_MEMORY, report
        assert report["registers"] <= 255 and report["stack"] <= allowed, report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "D", "S", "M", "group"),
    [("bfloat16", 64, 64, 65, 1), ("float16", 128, 65, 64, 4), ("float32", 64, 64, 64, 1)],
)
def test_every_kernel_compiles_for_hopper(dtype, D, S, M, group):
    check(reports(dtype, D, S, M, group), dtype, D, S)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("D", "S"), product([32, 64, 128], [32, 64, 65, 128]))
def test_every_size_compiles_for_hopper(dtype, D, S):
    check(reports(dtype, D, S), dtype, D, S)


@pytest.mark.slow
@pytest.mark.parametrize(("M", "group"), [(17, 1), (65, 1), (65, 2), (64, 4), (43, 3)])
@pytest.mark.parametrize(("D", "S"), product([64, 128], [64, 65, 128]))
def test_every_tile_compiles_for_hopper(D, S, M, group):
    check(reports("bfloat16", D, S, M, group), "bfloat16", D, S)


@pytest.mark.slow
def test_a_tile_that_is_too_large_is_found():
    found = reports("bfloat16", 128, 128, INSNEXT_GCA_BACKWARD_KV="128,4,2")
    with pytest.raises(AssertionError):
        check(found, "bfloat16", 128, 128)


def test_a_configuration_can_be_set_from_outside(monkeypatch):
    arguments = 65, 64, 64, torch.bfloat16
    assert tiles("forward", *arguments) == Tiles(64, 1, 16, 4, 3)
    monkeypatch.setenv("INSNEXT_GCA_FORWARD", "128,8,2")
    assert tiles("forward", *arguments) == Tiles(128, 1, 0, 8, 2)
    assert tiles("backward_q", *arguments) == Tiles(64, 1, 16, 4, 3)
