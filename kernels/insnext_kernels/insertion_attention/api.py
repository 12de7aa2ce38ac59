"""What users call: arguments are checked here, and handed to an implementation. Needs torch only."""

import torch

from ..common import can_read, check_positive, check_range, check_tensors, choose_impl
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
        horizon_BQ: Last visible key of each query; may reach beyond the keys, however far. Any intervals are right,
            those fast where start and horizon ascend and the starts of 64 neighbours are few or near: one text,
            packed texts, blocks, prefixes.
        left_slopes_H: Slopes of the keys left of the query, finite (looked at on a CPU only).
        right_slopes_H: Slopes of the keys right of it, likewise.
        start_BQ: First visible key of each query, by default 0; may lie beyond the keys, however far.
        entries_BQ: Which key each query is, by default the last Q. Must be in [0, K), which is looked at on a CPU
            only: on a GPU Triton takes the nearest key instead.
        scale: Positive and finite, by default `D ** -0.5`.
        table: What :func:`offset_table` returned for the same intervals and `impl`, to make it once for many layers.
            Its shapes and device are checked, its contents are not.
        impl: "reference", "triton" (head dim up to 128) or "auto" (triton on CUDA). An explicit choice never falls
            back.

    Raises:
        TypeError: If an argument is no tensor, or the scale no number.
        ValueError: If shapes, dtypes or devices disagree, a value is out of range, the table belongs to other shapes,
            or `impl` cannot run this.
    """
    check_tensors(
        q=q_BHQD, k=k_BGKD, v=v_BGKD, positions=positions_BK, horizon=horizon_BQ, left_slopes=left_slopes_H,
        right_slopes=right_slopes_H, start=start_BQ, entries=entries_BQ,
    )  # fmt: skip
    _check_heads(q_BHQD, k_BGKD, v_BGKD, left_slopes_H, right_slopes_H)
    K, D = k_BGKD.shape[2:]
    impl = choose_impl(impl, q_BHQD)
    intervals = _checked(positions_BK, horizon_BQ, start_BQ, entries_BQ, K)
    if horizon_BQ.shape != (len(q_BHQD), q_BHQD.shape[2]):
        raise ValueError(f"horizon must be [B, Q], got {list(horizon_BQ.shape)} for q {list(q_BHQD.shape)}")
    scale = check_positive("scale", D**-0.5 if scale is None else scale)
    slopes = left_slopes_H, right_slopes_H
    if table is not None:
        _check_table(table, impl, positions_BK, horizon_BQ, K)
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
        return insertion_decode(q_BHQD, k_BGKD, v_BGKD, *table, *slopes, scale)
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
        TypeError: If an argument is no tensor.
        ValueError: If shapes, dtypes or devices disagree, a value is out of range, the number of keys is not given, or
            `impl` cannot run here.
    """
    check_tensors(positions=positions_BK, horizon=horizon_BQ, start=start_BQ, entries=entries_BQ)
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
        if can_read(slopes) and not slopes.isfinite().all():
            raise ValueError(f"{name} slopes must be finite, got {slopes.tolist()}")


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
    check_range("entries", entries, 0, num_keys - 1)
    return positions, horizon, start, entries


def _check_table(table, impl: str, positions, horizon, num_keys: int) -> None:
    if not isinstance(table, OffsetTable if impl == "triton" else torch.Tensor):
        raise ValueError(
            f"table must come from offset_table with the same impl, got {type(table).__name__} for {impl}"
        )
    numbers, made_for = table, tuple(table.shape) if impl == "reference" else table.made_for
    if impl == "triton":
        numbers, in_text = table.queries_B5Q, table.keys_BK.ndim == 2
        if in_text == (positions is None):
            with_or_not = "with" if in_text else "without"
            raise ValueError(f"table must be made with positions where there are any, got one made {with_or_not} them")
    check_tensors(horizon=horizon, table=numbers)
    if made_for != (*horizon.shape, num_keys):
        raise ValueError(f"table must be for [B, Q, K] = {[*horizon.shape, num_keys]}, got one for {list(made_for)}")


def _shapes(*tensors: torch.Tensor) -> str:
    return " and ".join(str(list(x.shape)) for x in tensors)


__all__ = ["insertion_attention", "offset_table"]
