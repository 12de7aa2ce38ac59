"""`insertion_attention` as PyTorch operators: launches, shapes for `torch.compile`, and the rule for gradients.

Triton is imported where a launch happens, so this module needs torch only.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import empty, interpreting


# queries of a tile, and the longest window counted in one product; part of the table's format
TILE = 64
# so many queries decode: keys are divided among programs, and a key's place is not worth a sort
FEW_QUERIES = 16
# programs that fill the 132 multiprocessors of a Hopper GPU twice
FULL = 264
# tiles that a program of the table goes through
TABLE_STEPS = 32


class OffsetTable(NamedTuple):
    """What the kernels need to know about positions and intervals; see triton_table for `left`, window and `right`.

    Attributes:
        keys_BK: Numbers in the order of the text.
        queries_5BQ: int32, start, horizon, keys left of the query itself, and the ends of its interval in the window.
        tiles_BT6: int32, keys that a tile of 64 queries sees, its window, keys that all its queries see.
        windows_BTW: The keys of each window, empty if positions are those of storage.
        rows_BT2K: int16, or int32 from 32768 keys on: `left` and `right`; empty likewise.
        blocks_BN6: int32, tiles that see a block of 64 keys, those that see it in full, those with a long window;
            empty for few queries.
    """

    keys_BK: Tensor
    queries_5BQ: Tensor
    tiles_BT6: Tensor
    windows_BTW: Tensor
    rows_BT2K: Tensor
    blocks_BN6: Tensor


class Launch(NamedTuple):
    keys: int
    warps: int
    stages: int


class Config(NamedTuple):
    """Keys of a block, warps and pipeline stages of each kernel, and heads of a program of the forward pass."""

    forward: Launch
    backward_queries: Launch
    backward_keys: Launch
    decode: Launch
    heads: int


def config_for(head_dim: int, dtype: torch.dtype) -> Config:
    """Return the launch parameters; `INSNEXT_INSERTION_TILES`, the 13 numbers in this order, sets others."""
    chosen = os.environ.get("INSNEXT_INSERTION_TILES")
    if chosen:
        numbers = [int(x) for x in chosen.split(",")]
        return Config(*(Launch(*numbers[i : i + 3]) for i in (0, 3, 6, 9)), numbers[12])
    if dtype == torch.float32:
        # products in full precision run on ordinary units, whose operands lie in registers
        return Config(Launch(32, 8, 1), Launch(32, 8, 1), Launch(64, 8, 1), Launch(32, 4, 2), 1)
    if head_dim <= 64:
        return Config(Launch(64, 4, 3), Launch(64, 4, 2), Launch(128, 8, 2), Launch(64, 4, 3), 1)
    return Config(Launch(64, 8, 2), Launch(32, 4, 2), Launch(64, 8, 2), Launch(64, 4, 2), 1)


def _tiles(n: int) -> int:
    return -(-n // TILE)


def _padded(n: int) -> int:
    """Return the next power of two that a tensor core takes."""
    return max(16, 1 << (n - 1).bit_length())


def _last(dtype: torch.dtype) -> float | int:
    """Return what stands right of every key."""
    return float("inf") if dtype.is_floating_point else torch.iinfo(dtype).max


def text_order(positions_BK: Tensor, num_queries: int) -> Tensor:
    """Return numbers in the order of positions: fast to compare, float32, unless there are few queries."""
    if num_queries <= FEW_QUERIES:
        return positions_BK.contiguous()
    sorted_BK = positions_BK.sort(1).values
    return torch.searchsorted(sorted_BK, positions_BK.contiguous()).float()


@torch.library.custom_op("insnext_kernels::insertion_table", mutates_args=())
def insertion_table(
    keys: Tensor | None, horizon: Tensor, start: Tensor, entries: Tensor, num_keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import triton_table as kernels

    (B, Q), K, T = horizon.shape, num_keys, _tiles(horizon.shape[1])
    outputs = _table_outputs(keys, horizon, num_keys)
    queries, tiles, windows, rows, blocks = outputs
    table, few = keys is not None, Q <= FEW_QUERIES
    order = {"LAST": _last(keys.dtype)} if table else {"LAST": 0}
    keys, windows_or_any = (keys, windows) if table else (tiles, tiles)
    with torch.cuda.device_of(horizon):
        kernels._plan_kernel[(T, B)](
            keys, start, horizon, entries, queries, tiles, windows_or_any, Q, K, B * Q,
            W=TILE, M=FEW_QUERIES if few else TILE, BK=256 if few else 128, TABLE=table, **order, num_warps=8,
        )  # fmt: skip
        if table:
            # one step waits for this: few long strides, and many programs
            block, stride, warps = (32, 256, 8) if few else (64, 64, 4)
            kernels._rows_kernel[(-(-K // block), -(-T // TABLE_STEPS), B)](
                keys, tiles, rows, K, T, STEPS=TABLE_STEPS, BJ=block, BK=stride, **order, num_warps=warps
            )
        if blocks.numel():
            kernels._blocks_kernel[(_tiles(K), B)](tiles, blocks, T, W=TILE, BT=128, num_warps=4)
    return outputs


def _table_outputs(keys: Tensor | None, horizon: Tensor, num_keys: int):
    (B, Q), K, T = horizon.shape, num_keys, _tiles(horizon.shape[1])
    ints = {"like": horizon, "dtype": torch.int32}
    windows, rows = (0,), (0,)
    if keys is not None:
        windows, rows = (B, T, TILE), (B, T, 2, K)
    blocks = (B, _tiles(K), 6) if Q > FEW_QUERIES else (0,)
    return (
        empty(5, B, Q, **ints),
        empty(B, T, 6, **ints),
        empty(*windows, like=horizon, dtype=torch.float32 if keys is None else keys.dtype),
        empty(*rows, like=horizon, dtype=torch.int16 if K < 2**15 else torch.int32),
        empty(*blocks, **ints),
    )


@insertion_table.register_fake
def _(keys, horizon, start, entries, num_keys):
    return _table_outputs(keys, horizon, num_keys)


def make_table(
    positions_BK: Tensor | None, horizon_BQ: Tensor, start_BQ: Tensor, entries_BQ: Tensor, num_keys: int
) -> OffsetTable:
    keys_BK = None if positions_BK is None else text_order(positions_BK, horizon_BQ.shape[1])
    intervals = (x.contiguous() for x in (horizon_BQ, start_BQ, entries_BQ))
    table = insertion_table(keys_BK, *intervals, num_keys)
    return OffsetTable(horizon_BQ.new_empty(0) if keys_BK is None else keys_BK, *table)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(q: Tensor, k: Tensor, keys: Tensor) -> dict:
    D = q.shape[-1]
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": D,
        "BD": _padded(D),
        "W": TILE,
        "TABLE": keys.numel() > 0,
        "LAST": _last(keys.dtype) if keys.numel() else 0,
        "UP": interpreting() and q.dtype == torch.bfloat16,
    }


LOG2_E = 1.4426950408889634


@torch.library.custom_op("insnext_kernels::insertion_attention", mutates_args=())
def insertion_forward(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, queries: Tensor, tiles: Tensor, windows: Tensor, rows: Tensor,
    blocks: Tensor, left: Tensor, right: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .triton_forward import _forward_kernel

    (B, H, Q, D), K, T = q.shape, k.shape[2], tiles.shape[1]
    q, k, v = (_rows_of(x) for x in (q, k, v))
    out, lse = empty(B, Q, H, D, like=q), empty(B, H, Q, like=q, dtype=torch.float32)
    block, warps, stages = (config := config_for(D, q.dtype)).forward
    heads = config.heads if H % config.heads == 0 else 1
    with torch.cuda.device_of(q):
        _forward_kernel[(T, H // heads, B)](
            q, k, v, out, lse, keys, queries, tiles, windows, rows, left, right, scale * LOG2_E, H, Q, K, T,
            queries[0].numel(), *_strides(q, k, v), **_constants(q, k, keys), HEADS=heads, BN=block,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out.transpose(1, 2), lse


@insertion_forward.register_fake
def _(q, k, v, keys, queries, tiles, windows, rows, blocks, left, right, scale):
    B, H, Q, D = q.shape
    return q.new_empty(B, Q, H, D).transpose(1, 2), q.new_empty(B, H, Q, dtype=torch.float32)


@torch.library.custom_op("insnext_kernels::insertion_attention_backward", mutates_args=())
def insertion_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, keys: Tensor, queries: Tensor,
    tiles: Tensor, windows: Tensor, rows: Tensor, blocks: Tensor, left: Tensor, right: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import triton_backward as kernels
    from .triton_table import _blocks_kernel

    (B, H, Q, D), (G, K), T = q.shape, k.shape[1:3], tiles.shape[1]
    dout, q, k, v = (_rows_of(x) for x in (dout, q, k, v))
    # as the forward pass left it
    out = out.transpose(1, 2).contiguous()
    dq, delta = empty(B, Q, H, D, like=q), empty(B, H, Q, like=lse)
    dk, dv = (empty(B, K, G, D, like=k) for _ in range(2))
    constants, config = _constants(q, k, keys), config_for(D, q.dtype)
    strides = queries[0].numel(), *_strides(q, k, v, dout)
    with torch.cuda.device_of(q):
        if blocks.numel() == 0:
            blocks = empty(B, _tiles(K), 6, like=tiles)
            _blocks_kernel[(_tiles(K), B)](tiles, blocks, T, W=TILE, BT=128, num_warps=4)
        block, warps, stages = config.backward_queries
        kernels._queries_kernel[(T, H, B)](
            q, k, v, out, dout, lse, delta, dq, keys, queries, tiles, windows, rows, left, right, scale,
            scale * LOG2_E, H, Q, K, T, *strides, **constants, BN=block, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        block, warps, stages = config.backward_keys
        kernels._keys_kernel[(-(-K // block), G, B)](
            q, k, v, dout, lse, delta, dk, dv, keys, queries, tiles, blocks, windows, rows, left, right, scale,
            scale * LOG2_E, H, G, Q, K, T, *strides, **constants, BN=block, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@insertion_backward.register_fake
def _(dout, q, k, v, out, lse, keys, queries, tiles, windows, rows, blocks, left, right, scale):
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *others, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, *others)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _dlse):
    dq, dk, dv = insertion_backward(dout, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, *[None] * 9


insertion_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("insnext_kernels::insertion_attention_decode", mutates_args=())
def insertion_decode(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, queries: Tensor, tiles: Tensor, windows: Tensor, rows: Tensor,
    left: Tensor, right: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    from . import triton_decode as kernels

    (B, H, Q, D), (G, K) = q.shape, k.shape[1:3]
    q, k, v = (_rows_of(x) for x in (q, k, v))
    block, warps, stages = config_for(D, q.dtype).decode
    constants = _constants(q, k, keys)
    M, BD = _padded(constants["GROUP"] * Q), constants["BD"]
    # values alone decide nothing here: lengths may change from step to step, shapes may not
    n_parts = min(-(-FULL // (B * G)), -(-K // block))
    parts = empty(B, G, n_parts, M, BD, like=q, dtype=torch.float32)
    sums = empty(2, B, G, n_parts, M, like=q, dtype=torch.float32)
    out = empty(B, Q, H, D, like=q)
    with torch.cuda.device_of(q):
        kernels._decode_kernel[(n_parts, G, B)](
            q, k, v, parts, sums, keys, queries, tiles, windows, rows, left, right, scale * LOG2_E, G, Q, K,
            queries[0].numel(), *_strides(q, k, v), **constants, M=M, BN=block, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        kernels._merge_kernel[(H // G * Q, G, B)](
            parts, sums, out, H, G, Q, n_parts, GROUP=H // G, M=M, D=D, BD=BD, S=_padded(n_parts), num_warps=4
        )
    return out.transpose(1, 2)


@insertion_decode.register_fake
def _(q, k, v, keys, queries, tiles, windows, rows, left, right, scale):
    B, H, Q, D = q.shape
    return q.new_empty(B, Q, H, D).transpose(1, 2)
