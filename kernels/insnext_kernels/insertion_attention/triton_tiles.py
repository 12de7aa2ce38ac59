"""What the forward, backward and decode kernels do with one tile: load rows, find blocks, count."""

import triton
import triton.language as tl


@triton.jit
def load_rows(p_x, o_n, i_lo, i_hi, stride, D: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr, UP: tl.constexpr):
    """Return rows o_n of a matrix `[*, D]`; with MASK 0 where a row lies outside [i_lo, i_hi)."""
    o_d = tl.arange(0, BD)
    p_x += o_n[:, None] * stride + o_d[None, :]
    if MASK:
        m_x = (o_n >= i_lo) & (o_n < i_hi)
        b_x = tl.load(p_x, mask=m_x[:, None] & (o_d[None, :] < D), other=0.0)
    elif BD != D:
        b_x = tl.load(p_x, mask=o_d[None, :] < D, other=0.0)
    else:
        b_x = tl.load(p_x)
    # the interpreter cannot compute in bfloat16
    return b_x.to(tl.float32) if UP else b_x


@triton.jit
def block_ranges(p_tile, BN: tl.constexpr, W: tl.constexpr):
    """Return what a tile of queries sees, in keys and in blocks of keys.

    Keys [i_lo, i_hi) and the window [i_w0, i_w1); the first block; the first of the `n_full` blocks that need no mask;
    the number of edge blocks around those, or of all blocks if the window is wide.
    """
    i_lo, i_hi, i_w0, i_w1 = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3)
    i_first, i_last = i_lo // BN, tl.cdiv(i_hi, BN)
    i_full, i_part = tl.cdiv(tl.load(p_tile + 4), BN), tl.load(p_tile + 5) // BN
    n_full = tl.maximum(i_part - i_full, 0)
    i_full = tl.where(n_full > 0, i_full, i_last)
    return i_lo, i_hi, i_w0, i_w1, i_first, i_full, n_full, i_last - i_first - n_full


@triton.jit
def block_index(i_n, i_first, i_full, n_full, KIND: tl.constexpr):
    """Return the i_n-th block (or tile) of a kind: 1 is full; the others lie on both sides of the full ones."""
    return i_full + i_n if KIND == 1 else i_first + i_n + tl.where(i_first + i_n < i_full, 0, n_full)


@triton.jit
def within(b_first, b_last, W: tl.constexpr, FLIP: tl.constexpr = False):
    """Return `[queries, W]`, flipped `[W, queries]`: 1 where a query sees a key of the window."""
    o_w = tl.arange(0, W)
    if FLIP:
        m_w = (o_w[:, None] >= b_first[None, :]) & (o_w[:, None] <= b_last[None, :])
    else:
        m_w = (o_w[None, :] >= b_first[:, None]) & (o_w[None, :] <= b_last[:, None])
    return m_w.to(tl.float16)


@triton.jit
def left_of(b_window, p_key, m_key, W: tl.constexpr, LAST: tl.constexpr, MASK: tl.constexpr):
    """Return `[W, keys]`: 1 where a key of the window stands left of a key of the block.

    The keys are loaded once for each row: threads then hold four neighbours, and store what they find in one go.
    """
    p_keys = p_key[None, :] + tl.zeros([W, 1], tl.int32)
    b_keys = tl.load(p_keys, mask=m_key[None, :], other=LAST) if MASK else tl.load(p_keys)
    return (b_window[:, None] < b_keys).to(tl.float16)


@triton.jit
def stands_left(b_window, b_key, FLIP: tl.constexpr):
    """Return the same for keys in registers, `[W, keys]`, flipped `[keys, W]`."""
    # compared the other way round and transposed: a thread then keeps few of the values that the loop keeps
    m_w = b_window[:, None] < b_key[None, :] if FLIP else b_window[None, :] < b_key[:, None]
    return tl.trans(m_w.to(tl.float16))


@triton.jit
def add_wide_window(
    b_offset, keys, b_key, b_start, b_horizon, i_w0, i_w1,
    W: tl.constexpr, LAST: tl.constexpr, FLIP: tl.constexpr = False,
):  # fmt: skip
    """Return offsets `[queries, keys]`, flipped `[keys, queries]`, plus the counts of a window of any length."""
    for i_w in range(i_w0, i_w1, W):
        o_w = i_w + tl.arange(0, W)
        b_window = tl.load(keys + o_w, mask=o_w < i_w1, other=LAST)
        b_within = within(b_start - i_w, b_horizon - i_w, W, FLIP)
        b_left_of = stands_left(b_window, b_key, FLIP)
        b_offset = tl.dot(b_left_of, b_within, b_offset) if FLIP else tl.dot(b_within, b_left_of, b_offset)
    return b_offset


@triton.jit
def load_bounds(queries, o_i, m_i, stride_f):
    """Return start, horizon and own count of queries; those beyond the last one see nothing."""
    b_start = tl.load(queries + o_i, mask=m_i, other=0)
    b_horizon = tl.load(queries + o_i + stride_f, mask=m_i, other=-1)
    return b_start, b_horizon, tl.load(queries + o_i + 2 * stride_f, mask=m_i, other=0).to(tl.float32)


@triton.jit
def load_window_bounds(queries, o_i, m_i, stride_f, W: tl.constexpr):
    """Return first and last key of the window that queries see, and whether they need the left and the right row."""
    b_first = tl.load(queries + o_i + 3 * stride_f, mask=m_i, other=0)
    b_last = tl.load(queries + o_i + 4 * stride_f, mask=m_i, other=0)
    return b_first, b_last, (b_first < 0).to(tl.float32), (b_last == W).to(tl.float32)


@triton.jit
def block_offsets(
    keys, p_row, o_j, K, b_start, b_horizon, b_own, b_from_left, b_to_right, b_within, b_window, i_w0, i_w1,
    WINDOW: tl.constexpr, MASK: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Return offset(i, j), float32 `[queries, keys]`. WINDOW is 0 if it is empty, 1 up to W keys, 2 for any number."""
    if MASK:
        b_left = tl.load(p_row + o_j, mask=o_j < K, other=0).to(tl.float32)
        b_right = tl.load(p_row + K + o_j, mask=o_j < K, other=0).to(tl.float32)
        b_offset = b_to_right[:, None] * b_right[None, :] - b_own[:, None]
        b_offset = b_from_left[:, None] * b_left[None, :] + b_offset
    else:
        b_offset = tl.load(p_row + o_j).to(tl.float32)[None, :] - b_own[:, None]
    if WINDOW == 1:
        b_offset = tl.dot(b_within, left_of(b_window, keys + o_j, o_j < K, W, LAST, MASK), b_offset)
    elif WINDOW == 2:
        b_key = tl.load(keys + o_j, mask=o_j < K, other=LAST)
        b_offset = add_wide_window(b_offset, keys, b_key, b_start, b_horizon, i_w0, i_w1, W, LAST)
    return b_offset


@triton.jit
def log2_slopes(left, right, i_h):
    """Return the slopes of a head for scores in powers of two."""
    return tl.load(left + i_h) * 1.4426950408889634, tl.load(right + i_h) * 1.4426950408889634
