"""Kernel tests run natively on a GPU, and in Triton's interpreter where there is none.

`TRITON_INTERPRET` is read when a kernel is defined, so it must stand before the first import of one; collecting this
folder does that. It stays set for the process: nothing outside this folder reads it, and a test that needs the real
compiler starts a process of its own (`helpers_kernels.compiled_for_sm90`).
"""

import os

import pytest
import torch


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Everything that a kernel is to write holds NaN (or the smallest integer) before the launch."""
    from insnext_kernels import common

    monkeypatch.setattr(common, "POISON", True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
