"""Triton reads `TRITON_INTERPRET` when it is imported, as Transformers may do: it is set before any test is read.

A test that needs the real compiler starts a process of its own (`tests/support/kernels.py`).
"""

import gc
import os

import pytest
import torch

from tests.support.interpreter import quicken


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    quicken()


def pytest_collection_finish():
    """Leave what was imported and collected out of garbage collection: Accelerate asks for one after each training."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    """Dynamo counts how often it compiled a function for all models of a process, and after a few gives it up."""
    yield
    torch._dynamo.reset()
