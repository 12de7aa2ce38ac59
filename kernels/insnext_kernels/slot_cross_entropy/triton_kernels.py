"""Triton backend of `slot_cross_entropy`.

Forward: a program scores one tile of states against a few tiles of slots and leaves partial sums; a second kernel adds
STOP and the partial sums up. Backward, for a chunk of states at a time: the gradients of the scores by recomputation,
then two products with the keys and the queries, each program owning what it writes. Lists of live tiles say where
there is anything to do.
"""

import triton
import triton.language as tl


# a new length of batch or text is no reason to compile again
COUNTS = ["B", "N", "first", "n_states", "n_tiles", "n_parts"]


@triton.jit
def _tanh(b_x):
    # the quotient loses digits near 0, where logits usually lie: there the Taylor series, exact to rounding
    b_t = tl.exp2(-2.8853900817779268 * tl.abs(b_x))
    b_far = (1.0 - b_t) / (1.0 + b_t)
    b_y = b_x * b_x
    b_c = -0.0014558343870513183 * b_y + 0.003592128036572481
    b_c = b_c * b_y - 0.008863235529902197
    b_c = b_c * b_y + 0.021869488536155203
    b_c = b_c * b_y - 0.053968253968253971
    b_c = b_c * b_y + 0.133333333333333333
    b_c = b_c * b_y - 0.333333333333333333
    b_near = b_x + b_x * b_y * b_c
    return tl.where(b_y < 0.25, b_near, tl.where(b_x < 0, -b_far, b_far))


@triton.jit
def _log1p(b_x):
    # Kahan: the rounding of 1 + x is made good by the quotient
    b_u = 1.0 + b_x
    return tl.where(b_u == 1.0, b_x, tl.log(b_u) * (b_x / tl.where(b_u == 1.0, 1.0, b_u - 1.0)))


@triton.jit
def _scores(query, key, o_t, o_s, N, S, D, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    # [BT, BS]
    b_scores = tl.zeros([BT, BS], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_q = (o_t[:, None] < N) & (o_d[None, :] < D)
        m_k = (o_d[:, None] < D) & (o_s[None, :] < S)
        b_q = tl.load(query + o_t[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
        b_k = tl.load(key + o_s[None, :] * D + o_d[:, None], mask=m_k, other=0.0)
        if UPCAST:
            b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        b_scores = tl.dot(b_q, b_k, b_scores, input_precision="ieee")
    return b_scores


@triton.jit
def _alive(births, deaths, o_t, o_s, S):
    # [BT, BS]
    b_birth = tl.load(births + o_s, mask=o_s < S, other=2147483647)
    b_death = tl.load(deaths + o_s, mask=o_s < S, other=0)
    return (b_birth[None, :] <= o_t[:, None]) & (o_t[:, None] < b_death[None, :])


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    query, key, births, deaths, targets, weights, kinds, tiles, counts, parts,
    cap, rate, B, N, S, D, n_tiles, TILES: tl.constexpr, SOFT: tl.constexpr, UPCAST: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_t, i_part, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    i_row = i_b * tl.num_programs(0) + i_t
    n_live = tl.load(counts + i_row)
    # the target of a hard state is left to the second kernel, which so keeps the digits of a loss near 0
    b_own = tl.load(targets + i_b * N + o_t, mask=o_t < N, other=-1)
    if SOFT:
        b_kind = tl.load(kinds + i_b * N + o_t, mask=o_t < N, other=0)
        b_own = tl.where(b_kind > 0, -1, b_own)
    b_sum = tl.zeros([BT], dtype=tl.float32)
    b_dot = tl.zeros([BT], dtype=tl.float32)
    for i in range(i_part * TILES, tl.minimum(n_live, (i_part + 1) * TILES)):
        o_s = tl.load(tiles + i_row * n_tiles + i) * BS + tl.arange(0, BS)
        b_scores = _scores(query + i_b * N * D, key + i_b * S * D, o_t, o_s, N, S, D, BT, BS, BD, UPCAST)
        b_z = cap * _tanh(b_scores * rate)
        b_alive = _alive(births + i_b * S, deaths + i_b * S, o_t, o_s, S)
        if SOFT:
            b_weight = tl.load(weights + i_b * S + o_s, mask=o_s < S, other=0).to(tl.float32)
            b_weight = tl.where((b_kind == 2)[:, None], tl.minimum(b_weight, 1.0)[None, :], b_weight[None, :])
            b_dot += tl.sum(tl.where(b_alive, b_weight * b_z, 0.0), 1)
        # logits are in [-cap, cap], so float32 holds the sum of the exponentials as they are
        b_others = b_alive & (o_s[None, :] != b_own[:, None])
        b_sum += tl.sum(tl.where(b_others, tl.exp2(b_z * 1.4426950408889634), 0.0), 1)
    # parts [1 or 2, n_parts, B, N]
    p_part = parts + (i_part * B + i_b) * N + o_t
    tl.store(p_part, b_sum, mask=o_t < N)
    if SOFT:
        tl.store(p_part + tl.num_programs(1) * B * N.to(tl.int64), b_dot, mask=o_t < N)


@triton.jit(do_not_specialize=COUNTS)
def _finish_kernel(
    query, key, stop_key, targets, kinds, inverse, parts, loss, lse, stops,
    cap, rate, B, N, S, D, n_parts, SOFT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < N
    b_target = tl.load(targets + i_b * N + o_t, mask=m_t, other=-1)
    m_slot = (b_target >= 0) & (b_target < S)
    b_stop = tl.zeros([BT], dtype=tl.float32)
    b_hard = tl.zeros([BT], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d[None, :] < D
        p_q = query + (i_b * N + o_t[:, None]) * D + o_d[None, :]
        b_q = tl.load(p_q, mask=m_t[:, None] & m_d, other=0.0).to(tl.float32)
        p_k = key + (i_b * S + b_target[:, None]) * D + o_d[None, :]
        b_k = tl.load(p_k, mask=m_slot[:, None] & m_d, other=0.0).to(tl.float32)
        b_key = tl.load(stop_key + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_stop += tl.sum(b_q * b_key[None, :], 1)
        b_hard += tl.sum(b_q * b_k, 1)
    b_stop = cap * _tanh(b_stop * rate)
    b_dot = tl.where(b_target == S, b_stop, cap * _tanh(b_hard * rate))

    b_sum = tl.where(b_target == S, 0.0, tl.exp2(b_stop * 1.4426950408889634))
    b_soft_dot = tl.zeros([BT], dtype=tl.float32)
    for i_part in range(0, n_parts):
        p_part = parts + (i_part * B + i_b) * N + o_t
        b_sum += tl.load(p_part, mask=m_t, other=0.0)
        if SOFT:
            b_soft_dot += tl.load(p_part + n_parts * B * N.to(tl.int64), mask=m_t, other=0.0)

    b_inverse = tl.load(inverse + i_b * N + o_t, mask=m_t, other=0.0)
    b_own = tl.where(b_inverse > 0, tl.exp2(b_dot * 1.4426950408889634), 0.0)
    b_idle = b_target < 0
    if SOFT:
        b_kind = tl.load(kinds + i_b * N + o_t, mask=m_t, other=0)
        m_soft = m_slot & (b_kind > 0)
        b_own = tl.where(m_soft, 0.0, b_own)
        b_dot = tl.where(m_soft, b_soft_dot, b_dot)
        b_idle = b_idle | (m_soft & (b_inverse == 0))
    b_odds = b_sum / tl.where(b_own > 0, b_own, 1.0)
    m_sure = (b_own > 0) & (b_odds < 0.5)
    b_lse = tl.log(tl.where(b_idle, 1.0, b_sum + b_own))
    b_loss = tl.where(m_sure, _log1p(tl.where(m_sure, b_odds, 0.0)), b_lse - b_dot * b_inverse)
    b_loss = tl.where(b_inverse > 0, b_loss, float("inf"))
    p_t = i_b * N + o_t
    tl.store(loss + p_t, tl.where(b_idle, 0.0, b_loss), mask=m_t)
    # with an infinite normaliser every probability is 0, and so is every gradient of a state without loss
    tl.store(lse + p_t, tl.where(b_idle, float("inf"), b_lse), mask=m_t)
    tl.store(stops + p_t, b_stop, mask=m_t)


@triton.jit(do_not_specialize=COUNTS)
def _score_gradient_kernel(
    query, key, births, deaths, targets, weights, kinds, live, loss, lse, inverse, gain, grad,
    cap, rate, scale, N, S, D, first, n_states, SOFT: tl.constexpr, UPCAST: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # states first to first + n_states; first is a multiple of BT
    i_s, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_tiles_t = tl.cdiv(N, BT)
    if tl.load(live + (i_b * n_tiles_t + first // BT + i_t) * tl.num_programs(0) + i_s) == 0:
        return
    o_local = i_t * BT + tl.arange(0, BT)
    o_t = first + o_local
    o_s = i_s * BS + tl.arange(0, BS)
    b_target = tl.load(targets + i_b * N + o_t, mask=o_t < N, other=-1)
    b_loss = tl.load(loss + i_b * N + o_t, mask=o_t < N, other=0.0)
    b_lse = tl.load(lse + i_b * N + o_t, mask=o_t < N, other=float("inf"))
    b_inverse = tl.load(inverse + i_b * N + o_t, mask=o_t < N, other=0.0)
    b_gain = tl.load(gain + i_b * N + o_t, mask=o_t < N, other=0.0) * scale

    b_scores = _scores(query + i_b * N * D, key + i_b * S * D, o_t, o_s, N, S, D, BT, BS, BD, UPCAST)
    b_tanh = _tanh(b_scores * rate)
    b_alive = _alive(births + i_b * S, deaths + i_b * S, o_t, o_s, S)
    b_own = b_target
    if SOFT:
        b_kind = tl.load(kinds + i_b * N + o_t, mask=o_t < N, other=0)
        b_own = tl.where(b_kind > 0, -1, b_target)
    # of its target's probability a hard state knows more digits
    b_own_grad = tl.exp2(-b_loss * 1.4426950408889634) - b_inverse
    b_p = tl.exp2((cap * b_tanh - b_lse[:, None]) * 1.4426950408889634)
    b_grad = tl.where(o_s[None, :] == b_own[:, None], b_own_grad[:, None], b_p)
    if SOFT:
        b_inverse = tl.where((b_target >= 0) & (b_target < S), b_inverse, 0.0)
        b_weight = tl.load(weights + i_b * S + o_s, mask=o_s < S, other=0).to(tl.float32)
        b_grad -= tl.where(b_kind == 1, b_inverse, 0.0)[:, None] * b_weight[None, :]
        b_grad -= tl.where(b_kind == 2, b_inverse, 0.0)[:, None] * tl.minimum(b_weight, 1.0)[None, :]
    b_grad *= (1.0 - b_tanh * b_tanh) * b_gain[:, None]
    b_grad = tl.where(b_alive, b_grad, 0.0)
    p_grad = grad + (i_b * n_states + o_local[:, None]) * S + o_s[None, :]
    m_grad = (o_local[:, None] < n_states) & (o_s[None, :] < S)
    tl.store(p_grad, b_grad.to(grad.dtype.element_ty), mask=m_grad)


@triton.jit(do_not_specialize=COUNTS)
def _query_gradient_kernel(
    grad, key, stop_key, stop_grad, tiles, counts, dquery,
    N, S, D, first, n_states, n_tiles, UPCAST: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_d, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_local = i_t * BT + tl.arange(0, BT)
    o_d = i_d * BD + tl.arange(0, BD)
    m_t = o_local < n_states
    i_row = i_b * tl.cdiv(N, BT) + first // BT + i_t
    n_live = tl.load(counts + i_row)
    # [BT, BD]
    b_stop_grad = tl.load(stop_grad + i_b * N + first + o_local, mask=m_t, other=0.0)
    b_stop = tl.load(stop_key + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dq = b_stop_grad[:, None] * b_stop[None, :]
    for i in range(0, n_live * (BS // BK)):
        o_s = tl.load(tiles + i_row * n_tiles + i // (BS // BK)) * BS + (i % (BS // BK)) * BK + tl.arange(0, BK)
        p_grad = grad + (i_b * n_states + o_local[:, None]) * S + o_s[None, :]
        b_grad = tl.load(p_grad, mask=m_t[:, None] & (o_s[None, :] < S), other=0.0)
        p_k = key + i_b * S * D + o_s[:, None] * D + o_d[None, :]
        b_k = tl.load(p_k, mask=(o_s[:, None] < S) & (o_d[None, :] < D), other=0.0)
        if UPCAST:
            b_grad, b_k = b_grad.to(tl.float32), b_k.to(tl.float32)
        b_dq = tl.dot(b_grad, b_k, b_dq, input_precision="ieee")
    p_dq = dquery + (i_b * N + first + o_local[:, None]) * D + o_d[None, :]
    tl.store(p_dq, b_dq.to(dquery.dtype.element_ty), mask=m_t[:, None] & (o_d[None, :] < D))


@triton.jit(do_not_specialize=COUNTS)
def _key_gradient_kernel(
    grad, query, tiles, counts, dkey,
    N, S, D, first, n_states, n_tiles, UPCAST: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # tiles and counts: of states, counted from `first`, for every tile of slots
    i_d, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_s = i_s * BS + tl.arange(0, BS)
    o_d = i_d * BD + tl.arange(0, BD)
    i_row = i_b * tl.num_programs(1) + i_s
    n_live = tl.load(counts + i_row)
    m_dk = (o_s[:, None] < S) & (o_d[None, :] < D)
    p_dk = dkey + (i_b * S + o_s[:, None]) * D + o_d[None, :]
    # [BS, BD]; the sum goes on from the chunk of states before
    b_dk = tl.zeros([BS, BD], dtype=tl.float32)
    if first > 0:
        b_dk = tl.load(p_dk, mask=m_dk, other=0.0).to(tl.float32)
    for i in range(0, n_live * (BT // BK)):
        o_local = tl.load(tiles + i_row * n_tiles + i // (BT // BK)) * BT + (i % (BT // BK)) * BK + tl.arange(0, BK)
        m_t = o_local < n_states
        p_grad = grad + (i_b * n_states + o_local[None, :]) * S + o_s[:, None]
        b_grad = tl.load(p_grad, mask=(o_s[:, None] < S) & m_t[None, :], other=0.0)
        p_q = query + (i_b * N + first + o_local[:, None]) * D + o_d[None, :]
        b_q = tl.load(p_q, mask=m_t[:, None] & (o_d[None, :] < D), other=0.0)
        if UPCAST:
            b_grad, b_q = b_grad.to(tl.float32), b_q.to(tl.float32)
        b_dk = tl.dot(b_grad, b_q, b_dk, input_precision="ieee")
    tl.store(p_dk, b_dk.to(dkey.dtype.element_ty), mask=m_dk)
