"""The interpreter as the tests quicken it computes what Triton's own does, and leaves the language as it was."""

import inspect

import pytest
import torch
import triton.language as tl

from insnext_kernels.insertion_attention import insertion_attention
from tests.support.equality import same_bits
from tests.support.interpreter import REPLACED


pytestmark = pytest.mark.skipif(not REPLACED, reason="a GPU runs the kernels, or a Triton that is not quickened")


def attended():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 16, generator=generator).requires_grad_() for _ in range(3))
    slopes, places = torch.tensor([0.5, 0.25]), torch.arange(20)[None]
    out = insertion_attention(q, k, v, 7 * places % 20, places, slopes, slopes, impl="triton")
    out.square().sum().backward()
    return {"out": out.detach(), "q": q.grad, "k": k.grad, "v": v.grad}


def restore(monkeypatch):
    for (owner, name), original in REPLACED.items():
        monkeypatch.setattr(owner, name, original)


def test_the_quick_interpreter_gives_the_bits_of_the_slow_one_with_fewer_searches(monkeypatch):
    calls = []
    members = inspect.getmembers
    monkeypatch.setattr(inspect, "getmembers", lambda *args: calls.append(1) or members(*args))
    language = {name: getattr(tl, name) for name in dir(tl)}
    quick, searched = attended(), len(calls)
    assert {name: getattr(tl, name) for name in dir(tl)} == language
    restore(monkeypatch)
    assert same_bits(attended(), quick)
    assert 10 * searched < len(calls) - searched
