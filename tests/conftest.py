"""Triton reads `TRITON_INTERPRET` when it is imported, as Transformers may do: it is set before any test is read.

A test that needs the real compiler starts a process of its own (`tests/support/kernels.py`).
"""

import os

import torch


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
