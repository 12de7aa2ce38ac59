"""Interval attention with direction-aware insertion ALiBi: offsets, slopes and the backends that read them.

Shape suffixes: B rows, H heads, Q queries, K keys, D head width. Tokens are stored in insertion order; `positions` are
integers whose order is the left-to-right order of the text. Query i sees the keys start_i <= j <= horizon_i, and the
distance

    offset(i, j) = #{k in [start_i, horizon_i] : p_k < p_j} - #{k in [start_i, horizon_i] : p_k < p_i}

is the signed distance from i to j in the text as it stood when i was encoded. It never changes afterwards, which is
what makes a key/value cache exact. Two given tokens (context) and three written ones, `x` visible and `.` hidden:

    key      0 1 2 3 4
    query 0  x x . . .      horizon 1
    query 1  x x . . .      horizon 1
    query 2  x x x . .      horizon 2
    query 3  x x x x .      horizon 3
    query 4  x x x x x      horizon 4

Head h adds -left_h * max(-offset, 0) - right_h * max(offset, 0) to its scores.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as uncompiled_flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_triton import prepare_triton, triton_attention
from .cache import InsertionCache


class Interval(NamedTuple):
    """What every layer of one forward pass needs to know about who sees whom, and from how far.

    Attributes:
        positions_BK: Integers whose order is the order of the text.
        start_BQ: First key that each query sees.
        horizon_BQ: Last key that it sees.
        entries_BQ: Which key each query is.
        ranked: Whether offset(i, j) = positions_j - positions_i for every key that a query sees, as where positions
            are ranks in the text and each query sees all of it that is there.
        causal_blocks: Whether tokens that are encoded together see only what stands left of them among each other.
            The last one, whose hidden state is the state, sees all of them.
    """

    positions_BK: torch.Tensor
    start_BQ: torch.Tensor
    horizon_BQ: torch.Tensor
    entries_BQ: torch.Tensor
    ranked: bool = False
    causal_blocks: bool = False


class FlexInterval(NamedTuple):
    offsets_BQK: torch.Tensor
    slopes_2H: torch.Tensor
    block_mask: BlockMask


def alibi_slopes(num_heads: int, ratio: float, device=None) -> torch.Tensor:
    """Return the left and right slopes, float64 `[2, H]`.

    The base slope of head h is 2^(-8 (h + 1) / H); even heads multiply their left slope by `ratio`, odd heads their
    right one.
    Source of the symmetric form: Press et al., arXiv:2108.12409, section 3.
    """
    head_H = torch.arange(num_heads, device=device)
    slopes_2H = torch.pow(2.0, -8.0 * (head_H + 1).double() / num_heads).repeat(2, 1)
    steep_2H = torch.stack([head_H % 2 == 0, head_H % 2 == 1])
    return torch.where(steep_2H, slopes_2H * ratio, slopes_2H)


def visible_keys(interval: Interval) -> torch.Tensor:
    """Return the boolean `[B, Q, K]` table of start_i <= j <= horizon_i, in causal blocks without what is right."""
    key_K = torch.arange(interval.positions_BK.shape[1], device=interval.positions_BK.device)
    visible_BQK = (key_K >= interval.start_BQ[..., None]) & (key_K <= interval.horizon_BQ[..., None])
    return visible_BQK & ~right_in_block(interval) if interval.causal_blocks else visible_BQK


def right_in_block(interval: Interval) -> torch.Tensor:
    """Return the boolean `[B, Q, K]` table of keys that are encoded together with a query and stand right of it.

    A block's last entry has none.
    """
    positions_BK, entries_BQ, horizon_BQ = interval.positions_BK, interval.entries_BQ, interval.horizon_BQ
    right_BQK = positions_BK[:, None] > positions_BK.gather(1, entries_BQ)[..., None]
    # what is in the cache is in no block of the queries
    block_BK = torch.full_like(positions_BK, -1).scatter(1, entries_BQ, horizon_BQ)
    together_BQK = block_BK[:, None] == horizon_BQ[..., None]
    return right_BQK & together_BQK & (entries_BQ < horizon_BQ)[..., None]


def insertion_offsets(interval: Interval) -> torch.Tensor:
    """Return offset(i, j), int64 `[B, Q, K]`; entries of invisible keys are meaningless.

    One sort of the keys per row, then a running count of visible keys in text order: O(K log K + Q K).
    """
    visible_BQK = visible_keys(interval)
    by_text_BK = interval.positions_BK.argsort(dim=1, stable=True)
    rank_BK = by_text_BK.argsort(dim=1)
    in_text_order_BQK = visible_BQK.gather(2, by_text_BK[:, None].expand_as(visible_BQK)).long()
    before_BQK = in_text_order_BQK.cumsum(2) - in_text_order_BQK
    count_BQK = before_BQK.gather(2, rank_BK[:, None].expand_as(before_BQK))
    return count_BQK - count_BQK.gather(2, interval.entries_BQ[..., None])


def alibi_bias(offsets: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return -left * max(-offset, 0) - right * max(offset, 0), slopes not negative."""
    return torch.minimum(left * offsets, -right * offsets)


def text_offsets(interval: Interval) -> torch.Tensor:
    """Return what `insertion_offsets` does; where positions are ranks, without counting."""
    if not interval.ranked:
        return insertion_offsets(interval)
    rank_BK = interval.positions_BK
    return rank_BK[:, None] - rank_BK.gather(1, interval.entries_BQ)[..., None]


def dense_bias(interval: Interval, slopes_2H: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive `[B, H, Q, K]` mask of `eager`: insertion ALiBi, `-inf` on invisible keys."""
    return _additive(insertion_offsets(interval), interval, slopes_2H, dtype)


def text_bias(interval: Interval, slopes_2H: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask of `sdpa`: the same, by `text_offsets`."""
    return _additive(text_offsets(interval), interval, slopes_2H, dtype)


def _additive(offsets_BQK, interval: Interval, slopes_2H, dtype):
    left_H11, right_H11 = slopes_2H.to(torch.promote_types(dtype, torch.float32))[..., None, None]
    bias_BHQK = alibi_bias(offsets_BQK[:, None], left_H11, right_H11)
    return bias_BHQK.masked_fill(~visible_keys(interval)[:, None], -torch.inf).to(dtype)


def flex_interval(interval: Interval, slopes_2H: torch.Tensor, dtype: torch.dtype) -> FlexInterval:
    """Return what `flex_attention` reads: offsets, shared by all heads, slopes and a block mask."""
    start_BQ, horizon_BQ = interval.start_BQ, interval.horizon_BQ
    hidden_BQK = right_in_block(interval) if interval.causal_blocks else None

    def sees(b, h, q, k):
        inside = (k >= start_BQ[b, q]) & (k <= horizon_BQ[b, q])
        return inside if hidden_BQK is None else inside & ~hidden_BQK[b, q, k]

    B, Q = start_BQ.shape
    block_mask = create_block_mask(sees, B, None, Q, interval.positions_BK.shape[1], device=start_BQ.device)
    return FlexInterval(
        insertion_offsets(interval).int(), slopes_2H.to(torch.promote_types(dtype, torch.float32)), block_mask
    )


def eager_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(scaling * q k^T + mask) v as `[B, Q, H, D]` and the weights: the definition."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sdpa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """PyTorch's attention, which on CPUs reads keys that heads share in place; Transformers' copies them a head."""
    if torch.is_grad_enabled() or query.device.type != "cpu":
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)
    shares = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=shares
    )
    return out.transpose(1, 2), None


def flex_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: FlexInterval,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """FlexAttention over integer offsets, uncompiled on CPUs.

    There PyTorch (as of 2.13) has no backward of it, and the code it generates does not compile once shapes vary.
    """
    if dropout:
        raise ValueError(f"flex_attention has no dropout, got attention_dropout={dropout}; use eager or sdpa")
    offsets_BQK, (left_H, right_H), block_mask = attention_mask

    def add_bias(score, b, h, q, k):
        return score + alibi_bias(offsets_BQK[b, q, k], left_H[h], right_H[h])

    on_cpu = query.device.type == "cpu"
    attend = (
        uncompiled_flex_attention if on_cpu else partial(compile_friendly_flex_attention, training=module.training)
    )
    out_BHQD = attend(
        query,
        key,
        value,
        score_mod=add_bias,
        block_mask=block_mask,
        enable_gqa=query.shape[1] != key.shape[1],
        scale=scaling,
    )
    return out_BHQD.transpose(1, 2).contiguous(), None


class IntervalBackend(NamedTuple):
    """How an attention implementation reads an interval.

    `prepare(interval, slopes_2H, dtype)` runs once a forward pass; its result reaches `attend` of every layer in the
    place of `attention_mask`. `attend=None` takes the function that Transformers holds under the same name.
    """

    prepare: Callable
    attend: Callable | None = None


INTERVAL_BACKENDS = {
    "eager": IntervalBackend(dense_bias, eager_attention),
    "sdpa": IntervalBackend(text_bias, sdpa_attention),
    "flex_attention": IntervalBackend(flex_interval, flex_attention),
}


def refuse_other_models(module: torch.nn.Module, *args, **kwargs):
    """What Transformers holds under such a name: models that know it compute it themselves, each in its own way.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"this attn_implementation is for the models that define it, got a {type(module).__name__}; use eager, sdpa "
        "or flex_attention"
    )


def register_interval_backend(name: str, prepare: Callable, attend: Callable) -> None:
    """Make `attn_implementation=name` available to InsNeXt models. See :class:`IntervalBackend`.

    Transformers refuses names it does not know before a model can say anything, so the name is registered there too;
    InsNeXt never calls what stands there, and any other model gets an error from it.
    """
    AttentionInterface.register(name, refuse_other_models)
    AttentionMaskInterface.register(name, AttentionMaskInterface()["eager"])
    INTERVAL_BACKENDS[name] = IntervalBackend(prepare, attend)


register_interval_backend("insnext_triton", prepare_triton, triton_attention)


def interval_backend(name: str) -> IntervalBackend:
    """Return the backend of an implementation; one that InsNeXt does not know gets the dense additive mask."""
    return INTERVAL_BACKENDS.get(name, IntervalBackend(text_bias))


def full_interval(attention_mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return first and last token of the text that each entry of an `attention_mask` belongs to, int64 `[B, T]`.

    The ones of a row are contiguous, padded on either side. Padding is a text of its own: seen by nobody else.
    """
    real_BT = attention_mask_BT.bool()
    index_BT = torch.arange(real_BT.shape[1], device=real_BT.device).expand_as(real_BT)
    first_B1 = real_BT.long().argmax(1, keepdim=True)
    last_B1 = first_B1 + real_BT.sum(1, keepdim=True) - 1
    return torch.where(real_BT, first_B1, index_BT), torch.where(real_BT, last_B1, index_BT)


def build_interval(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    context_length: int | torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    horizon: torch.Tensor | None = None,
    past: Cache | None = None,
    is_causal: bool = False,
) -> Interval:
    """Return who sees whom for `shape` = (B, Q) new tokens behind a cache; arguments as in `InsNextModel.forward`.

    Raises:
        ValueError: If an argument has holes, another shape or another type, `context_length` and `horizon` are both
            given, or the result is no text (:func:`check_interval`).
    """
    B, Q = shape
    check_arguments(shape, positions, context_length, start, horizon)
    if context_length is not None and horizon is not None:
        raise ValueError("context_length and horizon exclude each other, got both")
    if attention_mask is not None and not torch.compiler.is_compiling():
        held = 0 if past is None or isinstance(past, InsertionCache) else int(past.get_seq_length())
        if attention_mask.shape != (B, held + Q):
            raise ValueError(f"attention_mask must be [{B}, {held + Q}], got {list(attention_mask.shape)}")
        check_contiguous(attention_mask, may_rest=isinstance(past, InsertionCache))
    real_BQ = torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(past, InsertionCache):
        entries_BQ, K = past.entries(Q), past.key_length(Q)
        if attention_mask is not None:
            real_BQ = attention_mask.bool()
        first_BQ = torch.zeros_like(entries_BQ)
        last_BQ = (past.lengths + real_BQ.sum(1) - 1)[:, None].expand(B, Q)
    else:
        held = 0 if past is None else past.get_seq_length()
        K = Q if past is None else past.get_mask_sizes(Q, 0)[0]
        entries_BQ = (torch.arange(Q, device=device) + held).expand(B, Q)
        first_BQ, last_BQ = torch.zeros_like(entries_BQ), torch.full_like(entries_BQ, K - 1)
        if attention_mask is not None:
            padded_BK = torch.nn.functional.pad(attention_mask, (0, K - attention_mask.shape[1]))
            real_BQ = padded_BK.bool().gather(1, entries_BQ)
            first_BQ, last_BQ = (side.gather(1, entries_BQ) for side in full_interval(padded_BK))
    start_BQ = first_BQ if start is None else start
    if horizon is None:
        horizon = entries_BQ if is_causal or context_length is not None else last_BQ
    if context_length is not None:
        context_length = torch.as_tensor(context_length, device=device).reshape(-1, 1)
        horizon = torch.maximum(horizon, start_BQ + context_length - 1)
    # tokens as stored stand side by side in every interval
    ranked = positions is None
    if ranked:
        positions = torch.arange(K, device=device).expand(B, K)
    if positions.shape != (B, K):
        raise ValueError(f"positions must cover cached and new tokens, [{B}, {K}], got {list(positions.shape)}")
    interval = Interval(
        positions,
        torch.where(real_BQ, start_BQ, entries_BQ),
        torch.where(real_BQ, horizon, entries_BQ),
        entries_BQ,
        ranked,
    )
    if not torch.compiler.is_compiling():
        check_interval(interval)
    return interval


def check_arguments(
    shape: tuple[int, int],
    positions: torch.Tensor | None,
    context_length: int | torch.Tensor | None,
    start: torch.Tensor | None,
    horizon: torch.Tensor | None,
) -> None:
    """Raise a `ValueError` if there is no token, or an argument of `build_interval` has another type or shape."""
    if 0 in shape:
        raise ValueError(f"there must be at least one token, got input of shape {list(shape)}")
    if positions is not None and positions.is_floating_point():
        raise ValueError(f"positions must be integers, got {positions.dtype}")
    for name, tensor in (("start", start), ("horizon", horizon)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, one for each new token, got {list(tensor.shape)}")
    if isinstance(context_length, torch.Tensor) and context_length.numel() not in (1, shape[0]):
        raise ValueError(
            f"context_length must be one integer or one for each of the {shape[0]} rows, got {context_length.tolist()}"
        )
    if context_length is not None and not torch.compiler.is_compiling() and torch.as_tensor(context_length).min() < 1:
        raise ValueError(f"context_length must be at least 1 (BOS), got {context_length}")


def check_contiguous(attention_mask_BT: torch.Tensor, may_rest: bool = False) -> None:
    """Raise a `ValueError` unless every row has its ones in one run and at least one of them.

    Rows behind an `InsertionCache` may rest (no ones), and their run comes first.
    """
    real_BT = attention_mask_BT.long()
    runs_B = real_BT[:, 0] + (real_BT.diff(dim=1) == 1).sum(1)
    wrong_B = runs_B != real_BT[:, 0] if may_rest else runs_B != 1
    if wrong_B.any():
        row = int(wrong_B.nonzero()[0])
        rule = "come first behind an InsertionCache" if may_rest else "form one run"
        padded = (
            "" if may_rest else " (behind virtual tokens of PEFT, texts of several lengths are padded on the right)"
        )
        raise ValueError(
            f"the ones of an attention_mask row must {rule}, got {int(runs_B[row])} runs in row {row}: "
            f"{attention_mask_BT[row].tolist()}{padded}"
        )


def check_interval(interval: Interval) -> None:
    """Raise a `ValueError` if intervals make no text: a horizon below its query, a start above it, tied positions."""
    positions_BK, start_BQ, horizon_BQ, entries_BQ, *_ = interval
    for name, bad_BQ, values in (
        ("horizon must not lie below the query", horizon_BQ < entries_BQ, horizon_BQ),
        ("start must not lie above the query", start_BQ > entries_BQ, start_BQ),
        ("start must not be negative", start_BQ < 0, start_BQ),
        ("horizon must lie inside the keys", horizon_BQ >= positions_BK.shape[1], horizon_BQ),
    ):
        if bad_BQ.any():
            b, i = bad_BQ.nonzero()[0].tolist()
            raise ValueError(
                f"{name}, got {int(values[b, i])} for query {int(entries_BQ[b, i])} of row {b} "
                f"({positions_BK.shape[1]} keys)"
            )
    if positions_BK.shape[1] == horizon_BQ.shape[1]:
        strays_BQ = start_BQ.gather(1, horizon_BQ) != start_BQ
        if strays_BQ.any():
            b, i = strays_BQ.nonzero()[0].tolist()
            raise ValueError(
                f"horizon (or context_length) must not reach beyond the text, got horizon {int(horizon_BQ[b, i])} for "
                f"query {i} of row {b}, in the text from {int(start_BQ[b, i])} on"
            )
        check_no_ties(positions_BK, start_BQ)


def check_no_ties(positions_BN: torch.Tensor, start_BN: torch.Tensor) -> None:
    """Raise a `ValueError` if two tokens of one text (same start) hold the same position."""
    low = positions_BN.min()
    key_BN = start_BN * (positions_BN.max() - low + 1) + positions_BN - low
    sorted_BN, order_BN = key_BN.sort(dim=1)
    tied_BN = sorted_BN[:, 1:] == sorted_BN[:, :-1]
    if tied_BN.any():
        b, i = tied_BN.nonzero()[0].tolist()
        first, second = order_BN[b, i : i + 2].tolist()
        raise ValueError(
            f"positions of one text must differ, got {int(positions_BN[b, first])} for both token {first} and token "
            f"{second} of row {b}"
        )
