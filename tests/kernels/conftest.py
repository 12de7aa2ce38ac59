"""Kernel tests run natively on a GPU, and in Triton's interpreter where there is none (`tests/conftest.py`)."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Everything that a kernel is to write holds NaN (or the smallest integer) before the launch."""
    from insnext_kernels import common

    monkeypatch.setattr(common, "POISON", True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
