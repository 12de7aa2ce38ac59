"""One small case of each operator, forward and backward, to be run under a memory checker:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=kernels compute-sanitizer python kernels/benchmarks/memory_check.py
"""

import sys

import torch
from timing import DEVICE

from insnext_kernels import grouped_cross_attention, insertion_attention, slot_cross_entropy


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float16).requires_grad_()


def check_insertion_attention() -> torch.Tensor:
    N = 70
    positions = torch.randperm(N, device=DEVICE)[None]
    horizon = torch.arange(N, device=DEVICE).clamp_min(5)[None]
    slopes = torch.rand(2, device=DEVICE)
    q, k, v = tensor(1, 2, N, 64), tensor(1, 1, N, 64), tensor(1, 1, N, 64)
    return insertion_attention(q, k, v, positions, horizon, slopes, slopes)


def check_slot_cross_entropy() -> torch.Tensor:
    N, S = 70, 140
    births = torch.arange(S, device=DEVICE)[None] % N
    targets = torch.arange(N, device=DEVICE)[None]
    return slot_cross_entropy(tensor(1, N, 72), tensor(1, S, 72), tensor(72), births, births + 20, targets, cap=30.0)


def check_grouped_cross_attention() -> torch.Tensor:
    indices = torch.tensor([[[-1, -1, -1], [0, -1, -1], [0, 1, 2]]], device=DEVICE)
    weights = torch.rand(1, 3, 3, device=DEVICE).requires_grad_()
    k, v = tensor(1, 1, 3, 63, 64), tensor(1, 1, 3, 63, 64)
    return grouped_cross_attention(tensor(1, 2, 3 * 65, 64), k, v, indices, weights)


CHECKS = {
    "insertion_attention": check_insertion_attention,
    "slot_cross_entropy": check_slot_cross_entropy,
    "grouped_cross_attention": check_grouped_cross_attention,
}


if __name__ == "__main__":
    for name in sys.argv[1:] or CHECKS:
        torch.manual_seed(0)
        CHECKS[name]().sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(name, "ran", flush=True)
