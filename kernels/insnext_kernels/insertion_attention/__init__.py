"""Attention over intervals, biased by the signed distance in the text as it stood. Needs torch only.

Operations and bytes for n queries and keys, head dim d, H heads, tiles of 64 (forward; half of it when causal):

    products   2 n^2 H (2 d) for scores and values + 2 n^2 64 H for the distances
    memory     q, k, v, out once per 64 queries from the second-level cache; table 2 n^2 / 64 * 2 bytes, once per batch

At n = 4096, d = 64, H = 12 that is 52 + 26 GFLOP, 79 us of a H200's 989 TFLOP/s; its memory needs 25 MB of q, k, v and
out and 1 MB of table, 6 us of 4.8 TB/s: bound by arithmetic. An (n, n) matrix of offsets, 32 MB in int16 and read by
each of 12 heads, would cost one load a score on top. What is scarce is not the tensor core but ordinary arithmetic
(softmax, bias, comparison). Hence tiles of 64 queries: the count costs as much as one of the two products
and no more, and four warps hold it; hence unmasked inner blocks that need neither `right` nor flags. Counted in the
machine code for sm_90 (bfloat16, d = 64), such a block of 64 x 64 takes 709 instructions a warp forward with Triton
3.9 (683 with 3.6), of which 12 are products; without a table, as for plain ALiBi, it takes 507 (572). Two heads that
share a count in one program take 584 (554) each, but spill registers: `config_for` has a switch.
"""

from __future__ import annotations

import torch

from ..common import choose_impl
from .ops import FEW_QUERIES, OffsetTable, insertion_decode, insertion_forward, make_table
from .reference import insertion_attention_reference, offsets_reference, visible_reference


MAX_HEAD_DIM = 128
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def insertion_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKD: torch.Tensor,
    positions_BK: torch.Tensor | None,
    horizon_BQ: torch.Tensor,
    left_slopes_H: torch.Tensor,
    right_slopes_H: torch.Tensor,
    start_BQ: torch.Tensor | None = None,
    *,
    entries_BQ: torch.Tensor | None = None,
    scale: float | None = None,
    table: OffsetTable | torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return softmax(scale * q k^T + bias) v over the keys start_i <= j <= horizon_i of each query, `[B, H, Q, D]`.

        offset(i, j) = #{k in [start_i, horizon_i] : p_k < p_j} - #{k in [start_i, horizon_i] : p_k < p_(entry_i)}
        bias(h, i, j) = -left_h * max(-offset, 0) - right_h * max(offset, 0)

    A query whose interval is empty gets 0 and passes no gradient. Keys are shared by H / G heads. Gradients reach q, k
    and v, and do not depend on the run; slopes get none. With Triton no tensor of Q * K elements exists and the result
    lies in memory as `[B, Q, H, D]`, ready for the output projection.

    Args:
        q_BHQD: Queries, any strides.
        k_BGKD: Keys; H is a multiple of G.
        v_BGKD: Values, the shape of the keys.
        positions_BK: Integers whose order is the order of the text; `None`: the order of storage, which is cheaper.
        horizon_BQ: Last visible key of each query; may reach beyond the keys. Any intervals are right, those fast
            where start and horizon ascend and the starts of 64 neighbours are few or near: one text, packed
            texts, blocks, prefixes.
        left_slopes_H: Slopes of the keys left of the query.
        right_slopes_H: Slopes of the keys right of it.
        start_BQ: First visible key of each query, by default 0.
        entries_BQ: Which key each query is, by default the last Q.
        scale: By default `D ** -0.5`.
        table: What :func:`offset_table` returned for the same intervals and `impl`, to make it once for many layers.
        impl: "reference", "triton" (head dim up to 128) or "auto" (triton on CUDA). An explicit choice never falls
            back.

    Raises:
        ValueError: If shapes, dtypes or devices disagree, or `impl` cannot run this.
    """
    _check_heads(q_BHQD, k_BGKD, v_BGKD, left_slopes_H, right_slopes_H)
    K, D = k_BGKD.shape[2:]
    impl = choose_impl(impl, q_BHQD)
    intervals = _checked(positions_BK, horizon_BQ, start_BQ, entries_BQ, K)
    if horizon_BQ.shape != (len(q_BHQD), q_BHQD.shape[2]):
        raise ValueError(f"horizon must be [B, Q], got {list(horizon_BQ.shape)} for q {list(q_BHQD.shape)}")
    if len({x.device for x in (q_BHQD, k_BGKD, v_BGKD, horizon_BQ, left_slopes_H, right_slopes_H)}) > 1:
        raise ValueError(f"tensors must share a device, got q on {q_BHQD.device}, horizon on {horizon_BQ.device}")
    scale = D**-0.5 if scale is None else float(scale)
    slopes = left_slopes_H, right_slopes_H
    if table is not None and isinstance(table, OffsetTable) != (impl == "triton"):
        raise ValueError(
            f"table must come from offset_table with the same impl, got {type(table).__name__} for {impl}"
        )
    if impl == "reference":
        offsets_BQK = offsets_reference(*intervals, K) if table is None else table
        visible_BQK = visible_reference(*intervals[1:3], K)
        return insertion_attention_reference(q_BHQD, k_BGKD, v_BGKD, offsets_BQK, visible_BQK, *slopes, scale)
    if q_BHQD.dtype not in TRITON_DTYPES:
        raise ValueError(f'impl="triton" needs float32, float16 or bfloat16, got {q_BHQD.dtype}')
    if D > MAX_HEAD_DIM:
        raise ValueError(f'impl="triton" needs a head dim of at most {MAX_HEAD_DIM}, got {D}')
    table = make_table(*intervals, K) if table is None else table
    slopes = [x.float().contiguous() for x in slopes]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHQD, k_BGKD, v_BGKD))
    if not needs_grad and q_BHQD.shape[2] <= FEW_QUERIES:
        return insertion_decode(q_BHQD, k_BGKD, v_BGKD, *table[:5], *slopes, scale)
    return insertion_forward(q_BHQD, k_BGKD, v_BGKD, *table, *slopes, scale)[0]


def offset_table(
    positions_BK: torch.Tensor | None,
    horizon_BQ: torch.Tensor,
    start_BQ: torch.Tensor | None = None,
    *,
    entries_BQ: torch.Tensor | None = None,
    num_keys: int | None = None,
    impl: str = "auto",
) -> OffsetTable | torch.Tensor:
    """Return what `insertion_attention(..., table=)` reads: made once, it serves all layers and heads of a batch.

    With Triton an :class:`OffsetTable` of O(Q K / 64) numbers; the reference's is the offsets, int64 `[B, Q, K]`.

    Args:
        positions_BK: As in :func:`insertion_attention`.
        horizon_BQ: Likewise.
        start_BQ: Likewise.
        entries_BQ: Likewise.
        num_keys: K, needed where `positions` is `None`.
        impl: Likewise.

    Raises:
        ValueError: If shapes or dtypes disagree, the number of keys is not given, or `impl` cannot run here.
    """
    if positions_BK is None and num_keys is None:
        raise ValueError("positions or num_keys must be given, got None and None")
    num_keys = positions_BK.shape[-1] if num_keys is None else num_keys
    intervals = _checked(positions_BK, horizon_BQ, start_BQ, entries_BQ, num_keys)
    make = offsets_reference if choose_impl(impl, horizon_BQ) == "reference" else make_table
    return make(*intervals, num_keys)


def _check_heads(q, k, v, left, right) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"need q [B, H, Q, D] and k, v [B, G, K, D], got {_shapes(q, k, v)}")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"there must be queries and keys, got {_shapes(q, k)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k and v must share a float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    for name, slopes in (("left", left), ("right", right)):
        if slopes.shape != (q.shape[1],):
            raise ValueError(f"{name} slopes must be [{q.shape[1]}], one for each head, got {list(slopes.shape)}")
        if slopes.requires_grad:
            raise ValueError(f"slopes get no gradient, got {name} slopes that require one")


def _checked(positions, horizon, start, entries, num_keys: int) -> tuple:
    """Return positions, horizon, start and entries with the defaults filled in."""
    if horizon.ndim != 2:
        raise ValueError(f"horizon must be [B, Q], got {list(horizon.shape)}")
    B, Q = horizon.shape
    if positions is not None and positions.shape != (B, num_keys):
        raise ValueError(f"positions must be [{B}, {num_keys}], got {list(positions.shape)}")
    if start is None:
        start = torch.zeros_like(horizon)
    if entries is None:
        if Q > num_keys:
            raise ValueError(f"without entries queries are the last keys, got {Q} queries and {num_keys} keys")
        entries = torch.arange(num_keys - Q, num_keys, device=horizon.device).expand(B, Q)
    for name, tensor in (("start", start), ("entries", entries)):
        if tensor.shape != (B, Q):
            raise ValueError(f"{name} must be [{B}, {Q}], got {list(tensor.shape)}")
    for name, tensor in (("positions", positions), ("horizon", horizon), ("start", start), ("entries", entries)):
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
    # reading values would synchronise a GPU and break a graph
    if entries.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (x.item() for x in entries.aminmax())
        if low < 0 or high >= num_keys:
            raise ValueError(f"entries must be in [0, {num_keys}), got {low} to {high}")
    return positions, horizon, start, entries


def _shapes(*tensors: torch.Tensor) -> str:
    return " and ".join(str(list(x.shape)) for x in tensors)


__all__ = ["OffsetTable", "insertion_attention", "insertion_attention_reference", "offset_table"]
