"""What the kernels of both passes share: tile sizes, which tiles meet, and the scores of a tile."""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from ...common import interpreting
from ...language import LOG2_E
from ..kinds import Kind
from ..ops import Slots


# a new length of batch or text is no reason to compile again
COUNTS = ["B", "N", "first", "n_states", "n_tiles", "n_parts"]
ITS_TARGET, ALIKE = tl.constexpr(int(Kind.ITS_TARGET)), tl.constexpr(int(Kind.ALIKE))


class Tiles(NamedTuple):
    """Tile sizes: states, slots, width of the scores' inner product; inner and outer width of the two others."""

    states: int
    slots: int
    width: int
    inner: int
    outer: int
    warps: int
    stages: int


def tiles_for(dtype: torch.dtype) -> Tiles:
    """Return the tile sizes for a dtype; `INSNEXT_SLOT_TILES=128,128,64,64,128,8,3` sets others."""
    chosen = os.environ.get("INSNEXT_SLOT_TILES")
    if chosen:
        return Tiles(*map(int, chosen.split(",")))
    return Tiles(64, 64, 32, 32, 64, 4, 2) if dtype == torch.float32 else Tiles(128, 128, 64, 64, 128, 8, 3)


def live_tiles(slots: Slots, size: Tiles) -> torch.Tensor:
    """Return, `[B, tiles of states, tiles of slots]`, where a state with a loss may meet a slot alive."""
    births_BS, deaths_BS, targets_BN = slots[:3]
    (B, S), N = births_BS.shape, targets_BN.shape[1]
    n_s, n_t = max(1, -(-S // size.slots)), -(-N // size.states)
    never = torch.iinfo(torch.int32).max
    missing = (0, n_s * size.slots - S)
    is_slot = births_BS < deaths_BS
    first = pad(torch.where(is_slot, births_BS, never), missing, value=never)
    last = pad(torch.where(is_slot, deaths_BS, 0), missing, value=0)
    first, last = first.view(B, 1, n_s, -1).amin(3), last.view(B, 1, n_s, -1).amax(3)
    begin = torch.arange(n_t, device=births_BS.device)[:, None] * size.states
    trained = pad(targets_BN >= 0, (0, n_t * size.states - N)).view(B, n_t, 1, -1).any(3)
    return trained & (first < begin + size.states) & (begin < last)


def listed(live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the true entries along the last dimension, in front, and their number."""
    order = torch.sort(live.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return order.int().contiguous(), live.sum(-1, dtype=torch.int32).contiguous()


def upcast(query: torch.Tensor) -> bool:
    # arithmetic on bfloat16 is silently wrong in the interpreter; the values themselves are exact in float32
    return interpreting() and query.dtype == torch.bfloat16


@triton.jit
def tanh(b_x):
    # the quotient loses digits near 0, where logits usually lie: there the Taylor series, exact to rounding
    b_t = tl.exp2(tl.abs(b_x) * (-2.0 * LOG2_E))
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
def scores(query, key, o_t, o_s, N, S, D, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """Return q . k of states o_t and slots o_s, float32 `[BT, BS]`."""
    b_scores = tl.zeros([BT, BS], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_q = (o_t[:, None] < N) & (o_d[None, :] < D)
        m_k = (o_d[:, None] < D) & (o_s[None, :] < S)
        b_q = tl.load(query + o_t[:, None].to(tl.int64) * D + o_d[None, :], mask=m_q, other=0.0)
        b_k = tl.load(key + o_s[None, :].to(tl.int64) * D + o_d[:, None], mask=m_k, other=0.0)
        if UPCAST:
            b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        b_scores = tl.dot(b_q, b_k, b_scores, input_precision="ieee")
    return b_scores


@triton.jit
def alive(births, deaths, o_t, o_s, S):
    """Return which slots o_s are alive at states o_t, `[BT, BS]`."""
    b_birth = tl.load(births + o_s, mask=o_s < S, other=2147483647)
    b_death = tl.load(deaths + o_s, mask=o_s < S, other=0)
    return (b_birth[None, :] <= o_t[:, None]) & (o_t[:, None] < b_death[None, :])


@triton.jit
def kind_weights(b_kind, b_weight):
    """Return what each slot weighs as a target of each state, `[states, slots]`; nothing is said of kind 0."""
    return tl.where((b_kind == ALIKE)[:, None], tl.minimum(b_weight, 1.0)[None, :], b_weight[None, :])
