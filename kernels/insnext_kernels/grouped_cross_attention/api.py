"""What users call: arguments are checked here, and handed to an implementation. Needs torch only."""

import torch

from ..common import check_positive, check_range, check_tensors, choose_impl
from . import ops
from .reference import grouped_cross_attention_reference


MAX_CHUNK_SIZE = 128
MAX_HEAD_DIM = 128
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def grouped_cross_attention(
    q_BHTD: torch.Tensor,
    k_BGNSD: torch.Tensor,
    v_BGNSD: torch.Tensor,
    indices_BCK: torch.Tensor,
    weights_BCK: torch.Tensor,
    *,
    off_by_one: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return what each query reads from the chunks its own chunk retrieved, shape `[B, H, T, D]`.

        out[b, h, t] = sum_i w[b, c, i] * softmax_s(scale * q[b, h, t] . k[b, g, n, s]) @ v[b, g, n]
        with c = t // (T // C), n = indices[b, c, i], g = h // (H // G)

    The softmax runs inside each chunk; `weights` say how much of each chunk is taken, and get a gradient. Chunks are
    read in place through their indices: no tensor of `B * C * K * S * D` elements exists, forward or backward.
    Gradients are deterministic. With Triton the result lies in memory as `[B, T, H, D]`, ready for the output
    projection.

    Args:
        q_BHTD: Queries, `T = C * M`: `C` chunks of `M` queries each, any `M >= 1`.
        k_BGNSD: Keys of `N` chunks of `S` keys, any strides with the last 1; `H` is a multiple of `G`.
        v_BGNSD: Values, the shape of the keys.
        indices_BCK: int32 or int64, the chunks of each query chunk, repetitions allowed. -1 is no chunk: it adds
            nothing and its weight gets gradient 0, so a query chunk without any chunk gives 0. Checked on a CPU;
            on a GPU an index of `N` or more gives NaN.
        weights_BCK: Weight of each chunk, already normalised, any float dtype.
        off_by_one: Add 1 to every softmax denominator, as a key of zeros with a value of zeros would.
        scale: Positive and finite, default `D ** -0.5`.
        impl: "reference", "triton" (chunk size and head dim up to 128) or "auto" (triton on CUDA). An explicit
            choice never falls back.

    Raises:
        TypeError: If an argument is no tensor, or the scale no number.
        ValueError: If shapes, dtypes or devices disagree, an index or the scale is out of range, or `impl` cannot.
    """
    check_tensors(q=q_BHTD, k=k_BGNSD, v=v_BGNSD, indices=indices_BCK, weights=weights_BCK)
    tensors = q_BHTD, k_BGNSD, v_BGNSD, indices_BCK, weights_BCK
    _check(*tensors)
    scale = check_positive("scale", q_BHTD.shape[-1] ** -0.5 if scale is None else scale)
    if choose_impl(impl, q_BHTD) == "reference":
        return grouped_cross_attention_reference(*tensors, off_by_one, scale)
    _check_triton(q_BHTD, k_BGNSD)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not needs_grad and ops.wants_decode(q_BHTD, k_BGNSD, indices_BCK):
        return ops.decode(*tensors, off_by_one, scale)
    return ops.forward(*tensors, off_by_one, scale, needs_grad)[0]


def _check(q, k, v, indices, weights) -> None:
    if q.ndim != 4 or k.ndim != 5 or k.shape != v.shape:
        raise ValueError(f"need q [B, H, T, D] and k, v [B, G, N, S, D], got {_shapes(q, k, v)}")
    if indices.ndim != 3 or indices.shape != weights.shape:
        raise ValueError(f"need indices and weights [B, C, K], got {_shapes(indices, weights)}")
    if not (q.shape[0] == k.shape[0] == indices.shape[0]) or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k and indices must agree in batch, q and k in head dim, got {_shapes(q, k, indices)}")
    if 0 in (*q.shape, *indices.shape, k.shape[1], k.shape[3]):
        raise ValueError(f"only the number of chunks may be 0, got {_shapes(q, k, indices)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}")
    if q.shape[2] % indices.shape[1]:
        raise ValueError(f"queries must be a multiple of query chunks, got {q.shape[2]} and {indices.shape[1]}")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k and v must share a float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if indices.dtype not in (torch.int32, torch.int64) or not weights.is_floating_point():
        raise ValueError(f"need int32 or int64 indices and float weights, got {indices.dtype} and {weights.dtype}")
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError(f"k and v need stride 1 in the last dimension, got {k.stride(-1)} and {v.stride(-1)}")
    check_range("indices", indices, -1, k.shape[2] - 1)


def _check_triton(q, k) -> None:
    if q.dtype not in TRITON_DTYPES:
        raise ValueError(f'impl="triton" needs float32, float16 or bfloat16, got {q.dtype}')
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f'impl="triton" needs a head dim of at most {MAX_HEAD_DIM}, got {q.shape[-1]}')
    if k.shape[3] > MAX_CHUNK_SIZE:
        raise ValueError(f'impl="triton" needs chunks of at most {MAX_CHUNK_SIZE} keys, got {k.shape[3]}')


def _shapes(*tensors: torch.Tensor) -> str:
    return " and ".join(str(list(x.shape)) for x in tensors)


__all__ = ["grouped_cross_attention"]
