"""Grouped cross-attention: every kernel against the float64 twin, gradients included, and what upstream got wrong."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from insnext_kernels import common
from insnext_kernels.common import full_programs
from insnext_kernels.grouped_cross_attention import grouped_cross_attention, grouped_cross_attention_reference, ops
from tests.support.equality import relative_error, same_bits, within_rounding
from tests.support.kernels import DEVICE, DTYPES, assert_as_accurate


def inputs(B=1, H=2, G=2, C=3, M=8, N=5, S=32, K=3, D=16, missing=0.2, popular=False):
    """Return q, k, v, indices, weights and an output gradient, in float64; q and k lie as a model's projections do."""
    q = torch.randn(B, C * M, H, D).transpose(1, 2)
    k = torch.randn(B, N, S, G, D).permute(0, 3, 1, 2, 4)
    v = torch.randn(B, G, N, S, D)
    indices = torch.randint(N, (B, C, K)) if N else torch.zeros(B, C, K, dtype=torch.int64)
    if popular:
        indices[torch.rand(B, C, K) < 0.7] = N - 1
    indices[torch.rand(B, C, K) < missing] = -1
    weights = torch.randn(B, C, K).softmax(-1)
    tensors = [q, k, v, indices, weights, torch.randn(B, H, C * M, D)]
    return [x.to(DEVICE, torch.float64) if x.is_floating_point() else x.to(DEVICE) for x in tensors]


def run(tensors, dtype, impl, rounded=None, **options):
    """Return output and gradients; what is float64 sees the same numbers as `rounded`."""
    rounded = rounded or dtype
    leaves = [x.to(rounded).to(dtype).requires_grad_() for x in tensors[:3]]
    weights = tensors[4].float().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out = grouped_cross_attention(*leaves, tensors[3], weights, impl=impl, **options)
    out.backward(tensors[5].to(rounded).to(dtype))
    grads = {f"d{name}": x.grad for name, x in zip("qkvw", [*leaves, weights], strict=True)}
    return {"out": out.detach(), **grads}


def check(tensors, dtype=torch.float32, **options):
    """Compare Triton with the twin in float64; return Triton's results."""
    exact = run(tensors, torch.float64, "reference", dtype, **options)
    ours = run(tensors, dtype, "triton", **options)
    assert_as_accurate(ours, run(tensors, dtype, "reference", **options), exact, dtype)
    return ours


def with_dtypes(cases, each):
    """Give every case all dtypes on a GPU; in the interpreter `each` of them in turn, all but one slow."""
    number = len(DTYPES) if DEVICE == "cuda" else each
    return [
        pytest.param(*case, DTYPES[(i + j) % len(DTYPES)], marks=pytest.mark.slow if j and DEVICE == "cpu" else [])
        for i, case in enumerate(cases)
        for j in range(number)
    ]


SHAPES = [
    (dict(M=64, S=64, K=2, D=32), False),
    (dict(M=65, S=64, K=3, D=32), True),
    (dict(M=65, S=65, K=2, D=64, H=4), True),
    (dict(M=64, S=63, K=8, C=2), False),
    (dict(M=1, S=128, K=1, D=128, C=2), False),
    (dict(M=512, S=32, K=2, H=1, G=1, C=1), False),
    (dict(M=3, S=33, K=64, D=24, H=3, G=1, C=1), True),
    (dict(M=9, S=5, K=5, H=8, C=2), False),
    (dict(M=65, S=33, K=2, D=128, B=2, H=1, G=1, C=2), False),
]


@pytest.mark.parametrize(("shape", "off_by_one", "dtype"), with_dtypes(SHAPES, 2), ids=str)
def test_triton_is_as_accurate_as_the_twin(shape, off_by_one, dtype):
    tensors = inputs(**shape)
    ours = check(tensors, dtype, off_by_one=off_by_one)
    # control: the same measure rejects a wrong index
    wrong = [*tensors[:3], (tensors[3] + 1) % tensors[1].shape[2], *tensors[4:]]
    exact = run(wrong, torch.float64, "reference", dtype, off_by_one=off_by_one)
    assert all(relative_error(ours[name], exact[name]) > 0.1 for name in exact)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2), G=st.integers(1, 2), group=st.integers(1, 3), C=st.integers(1, 2), M=st.integers(1, 9),
    N=st.integers(0, 4), S=st.integers(1, 40), K=st.integers(1, 4), D=st.integers(1, 20),
    off_by_one=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_small_shape_agrees_with_the_twin(B, G, group, C, M, N, S, K, D, off_by_one, seed):
    torch.manual_seed(seed)
    tensors = inputs(B, G * group, G, C, M, N, S, K, D, missing=0.3 if N else 1.0)
    check(tensors, off_by_one=off_by_one, scale=0.7)
    exact = run(tensors, torch.float64, "reference", torch.float32, off_by_one=off_by_one, scale=0.7)
    with torch.no_grad():
        floats = [x.float() if x.is_floating_point() else x for x in tensors[:5]]
        decoded = grouped_cross_attention(*floats, off_by_one=off_by_one, scale=0.7, impl="triton")
    assert relative_error(decoded, exact["out"]) < 1e-6


def test_gradients_of_the_twin_are_those_of_finite_differences():
    *tensors, _ = inputs(B=2, H=2, G=1, C=2, M=2, N=3, S=3, K=2, D=2)
    tensors[3][0, 0, 0], tensors[3][1, 1, 1] = -1, 2
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in tensors]
    for off_by_one in (False, True):
        assert torch.autograd.gradcheck(lambda *x, o=off_by_one: grouped_cross_attention_reference(*x, o, 0.7), leaves)


def test_the_twin_is_the_formula_written_as_loops():
    q, k, v, indices, weights, _ = inputs(B=2, H=4, G=2, C=2, M=3, N=4, S=5, K=3, D=4)
    out = torch.zeros_like(q)
    for b, h, t, i in product(range(2), range(4), range(6), range(3)):
        n = indices[b, t // 3, i]
        if n >= 0:
            probs = torch.softmax(0.5 * k[b, h // 2, n] @ q[b, h, t], 0)
            out[b, h, t] += weights[b, t // 3, i] * probs @ v[b, h // 2, n]
    ours = grouped_cross_attention(q, k, v, indices, weights, impl="reference")
    assert relative_error(ours, out) < 1e-14


# what the published kernel gets wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_off_by_one_is_a_key_and_a_value_of_zeros(impl):
    """Upstream: switching it on changes nothing, since the first rescaling multiplies the 1 by exp(-inf)."""
    tensors = inputs(S=31)
    off_by_one = run(tensors, torch.float32, impl, off_by_one=True)
    zeros = [tensors[0], *(pad(x, (0, 0, 0, 1)) for x in tensors[1:3]), *tensors[3:]]
    same = run(zeros, torch.float64, "reference", torch.float32)
    same["dk"], same["dv"] = same["dk"][..., :-1, :], same["dv"][..., :-1, :]
    plain = run(tensors, torch.float32, impl)
    for name in same:
        assert relative_error(off_by_one[name], same[name]) < 1e-6
        assert relative_error(plain[name], same[name]) > 1e-3


def test_off_by_one_holds_where_all_scores_are_far_below_zero():
    tensors = inputs(M=4, H=1, G=1)
    tensors[0] = 8 * tensors[0].abs()
    tensors[1] = -tensors[1].abs()
    check(tensors, torch.float16, off_by_one=True)
    with torch.no_grad():
        floats = [x.float() if x.is_floating_point() else x for x in tensors[:5]]
        assert grouped_cross_attention(*floats, off_by_one=True, impl="triton").norm() < 0.1
        assert grouped_cross_attention(*floats, impl="triton").norm() > 1


@pytest.mark.parametrize("M", [65, 66, 80, 81, 129])
def test_the_last_query_of_a_chunk_gets_its_gradient(M):
    """Upstream: with 65 queries the gradient of the last one, the landmark, is never written."""
    ours = check(inputs(M=M, H=1, G=1, C=2, missing=0), torch.float16)
    assert ours["dq"].unflatten(2, (2, M))[:, :, :, -1].abs().amin() > 0


@pytest.mark.parametrize("K", [3, 5, 20])
def test_the_number_of_slots_need_not_divide_128(K):
    check(inputs(K=K, C=2))


def test_fewer_candidates_than_slots():
    tensors = inputs(C=4, K=5, N=4, missing=0)
    # chunk c may choose from the c chunks before it: none for the first
    for c in range(4):
        tensors[3][:, c] = torch.tensor([*range(c), -1, -1, -1, -1, -1][:5])
    ours = check(tensors)
    assert ours["out"].unflatten(2, (4, 8))[:, :, 0].eq(0).all()
    assert ours["dq"].unflatten(2, (4, 8))[:, :, 0].eq(0).all()
    assert ours["dw"][tensors[3] < 0].eq(0).all() and ours["dw"][tensors[3] >= 0].ne(0).all()


# slots --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["forward", "decode"])
def test_a_slot_without_a_chunk_reads_nothing_not_even_nan(path):
    q, k, v, indices, weights, grad = inputs(M=1, missing=0)
    indices[:, :, 1] = -1
    dropped = grouped_cross_attention(q, k, v, indices[:, :, ::2], weights[:, :, ::2], impl="reference")
    # chunk 4 is nobody's; a clamped index would read chunk 0, a wrapped one the last
    indices.clamp_(max=3)
    dropped = grouped_cross_attention(q, k, v, indices[:, :, ::2], weights[:, :, ::2], impl="reference")
    k[:, :, 4], v[:, :, 4], weights[:, :, 1] = torch.nan, torch.nan, torch.nan
    q, k, v, weights = (x.float().requires_grad_(path == "forward") for x in (q, k, v, weights))
    out = grouped_cross_attention(q, k, v, indices, weights, impl="triton")
    assert relative_error(out.detach(), dropped) < 1e-6
    if path == "forward":
        dq, dw = torch.autograd.grad(out, (q, weights), grad.float())
        assert not dq.isnan().any() and dw[:, :, 1].eq(0).all()


def test_no_chunk_anywhere():
    for tensors in (inputs(missing=1.0), inputs(N=0, missing=1.0)):
        ours = check(tensors)
        assert all(x.eq(0).all() for x in ours.values())


def test_a_chunk_in_several_slots_counts_several_times():
    tensors = inputs(K=4, missing=0)
    tensors[3][..., 1:] = tensors[3][..., :1]
    once = [*tensors[:3], tensors[3][..., :1], tensors[4].sum(-1, keepdim=True), tensors[5]]
    ours, exact = check(tensors), run(once, torch.float64, "reference", torch.float32)
    assert all(relative_error(ours[name], exact[name]) < 1e-6 for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("seed", range(2))
def test_popular_chunks_are_summed_in_segments(seed):
    torch.manual_seed(seed)
    tensors = inputs(B=2, C=18, M=1, K=3, N=4, S=16, H=2, G=1, popular=True, missing=0.1 * seed)
    chosen = tensors[3].flatten(1).eq(3).sum(1)
    assert chosen.min() > 2 * 16, "the point of the test: more than two segments"
    check(tensors)


def test_two_runs_give_the_same_bits():
    tensors = inputs(C=12, M=2, K=3, H=1, G=1, popular=True)
    first, second = (run(tensors, torch.float16, "triton") for _ in range(2))
    assert same_bits(first, second)


def test_32_bit_indices_give_the_same():
    tensors = inputs()
    long = run(tensors, torch.float32, "triton")
    short = run([*tensors[:3], tensors[3].int(), *tensors[4:]], torch.float32, "triton")
    assert same_bits(long, short)


def test_an_index_too_large_gives_nan_where_it_cannot_be_checked():
    q, k, v, indices, weights, _ = (x.float() if x.is_floating_point() else x for x in inputs(M=1))
    indices[0, 1, 2] = 5
    forward, _ = ops.forward(q, k, v, indices, weights, False, 1.0, False)
    for out in (forward, ops.decode(q, k, v, indices, weights, False, 1.0)):
        assert out[:, :, 1].isnan().all() and not out[:, :, [0, 2]].isnan().any()


# memory -------------------------------------------------------------------------------------------------------------


def test_strides_do_not_matter():
    tensors = inputs(B=2, M=4, S=16)
    exact = run(tensors, torch.float64, "reference", torch.float32)
    q, k, v, indices, weights, grad = (x.float() if x.is_floating_point() else x for x in tensors)
    q = q.transpose(2, 3).contiguous().transpose(2, 3)
    k = pad(k, (3, 2, 1, 1))[..., 1:-1, 3:-2]
    v = v.flip(1).transpose(1, 3).contiguous().transpose(1, 3).flip(1)
    indices, weights = (
        pad(x, (1, 1))[..., 1:-1].transpose(0, 1).contiguous().transpose(0, 1) for x in (indices, weights)
    )
    grad = grad.transpose(1, 3).contiguous().transpose(1, 3)
    ours = run([q, k, v, indices, weights, grad], torch.float32, "triton")
    assert all(relative_error(ours[name], exact[name]) < 1e-6 for name in exact)


def test_rows_of_a_batch_may_share_their_memory():
    tensors = inputs(B=1)
    k, v = (x.expand(2, -1, -1, -1, -1) for x in tensors[1:3])
    both = [torch.cat([x, x]) for x in tensors]
    check([both[0], k, v, *both[3:]])


class Largest(TorchDispatchMode):
    """Record how many elements the largest tensor made in between has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("popular", [False, True])
def test_chunks_are_never_gathered(popular, monkeypatch):
    B, G, C, S, K, D = 1, 1, 6, 32, 6, 16
    tensors = inputs(B, G, G, C, 2, 5, S, K, D, popular=popular)
    sizes = []
    empty = common.empty
    monkeypatch.setattr(common, "empty", lambda *shape, **kw: sizes.append(shape) or empty(*shape, **kw))
    largest = {}
    for impl in ("triton", "reference"):
        leaves = [x.float().requires_grad_() if x.is_floating_point() else x for x in tensors[:5]]
        with Largest() as spy:
            out = grouped_cross_attention(*leaves, impl=impl)
            out.backward(tensors[5].float())
        largest[impl] = spy.elements
    # what the operators allocate inside, which a dispatch mode may not see
    largest["triton"] = max(largest["triton"], *(torch.Size(shape).numel() for shape in sizes))
    assert largest["triton"] < B * G * C * K * S * D / 2
    # control: the twin does gather
    assert largest["reference"] >= B * G * C * K * S * D


# decode -------------------------------------------------------------------------------------------------------------


DECODE_SHAPES = [
    dict(C=1, M=1, S=64, K=8),
    dict(C=1, M=1, S=65, K=9, D=64, H=6),
    dict(C=2, M=3, S=63, K=2, H=4, B=2),
    dict(C=1, M=1, S=128, K=20, D=8, missing=0.6),
]


@pytest.mark.parametrize(
    ("shape", "off_by_one", "dtype"), with_dtypes(list(product(DECODE_SHAPES, [False, True])), 1), ids=str
)
def test_decode_is_as_accurate_as_the_twin(shape, off_by_one, dtype):
    tensors = inputs(**shape)
    assert ops.wants_decode(*(tensors[i] for i in (0, 1, 3)))

    def out(dtype_, impl):
        floats = [x.to(dtype).to(dtype_) for x in tensors[:3]]
        weights = tensors[4].float().to(torch.promote_types(dtype_, torch.float32))
        return {"out": grouped_cross_attention(*floats, tensors[3], weights, off_by_one=off_by_one, impl=impl)}

    exact = out(torch.float64, "reference")
    assert_as_accurate(out(dtype, "triton"), out(dtype, "reference"), exact, dtype)
    wrong = grouped_cross_attention(*tensors[:5], off_by_one=not off_by_one, impl="reference")
    assert relative_error(wrong, exact["out"]) > 3e-3


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_any_number_of_parts_gives_the_same(parts, monkeypatch):
    q, k, v, indices, weights, _ = (x.float() if x.is_floating_point() else x for x in inputs(M=1, S=65, K=9))
    exact = grouped_cross_attention(*(x.double() for x in (q, k, v)), indices, weights.double(), impl="reference")
    monkeypatch.setattr(ops, "decode_parts", lambda *_: parts)
    assert relative_error(ops.decode(q, k, v, indices, weights, False, 16**-0.5), exact) < 1e-6


def test_one_sequence_fills_the_gpu_when_it_decodes():
    q, k = torch.empty(1, 12, 1, 64), torch.empty(1, 12, 4, 64, 64)
    indices = torch.zeros(1, 1, 8, dtype=torch.int32)
    assert indices.numel() * 12 * ops.decode_parts(q, k, indices) >= full_programs(q)
    many = q.expand(32, -1, -1, -1), k.expand(32, -1, -1, -1, -1), indices.expand(32, -1, -1)
    assert not ops.wants_decode(*many)
    assert not ops.wants_decode(torch.empty(1, 12, 64, 64), k, indices)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_decoding_takes_the_path_without_gradients_only_without_gradients(needs_grad, monkeypatch):
    calls = []
    for name in ("decode", "forward"):
        real = getattr(ops, name)
        spy = lambda *a, name=name, real=real: calls.append(name) or real(*a)  # noqa: E731
        monkeypatch.setattr(ops, name, spy)
    tensors = [x.float() if x.is_floating_point() else x for x in inputs(M=1)[:5]]
    grouped_cross_attention(tensors[0].requires_grad_(needs_grad), *tensors[1:], impl="triton")
    assert calls == (["forward"] if needs_grad else ["decode"])
    with torch.no_grad():
        grouped_cross_attention(*tensors, impl="triton")
    assert calls[1:] == ["decode"]


# compiler, checkpointing, autograd ----------------------------------------------------------------------------------


def smallest():
    """Return inputs of one chunk that attends to two, for what asks how operators are called and not what they say."""
    return [x.float() if x.is_floating_point() else x for x in inputs(G=1, C=1, M=2, N=2, S=16, K=2)]


def test_the_operators_pass_opcheck():
    q, k, v, indices, weights, grad = smallest()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.forward, (*leaves, indices, weights.requires_grad_(), True, 0.5, True))
    plain = [x.detach() for x in (q, k, v, indices, weights)]
    torch.library.opcheck(ops.decode, (*plain, True, 0.5))
    lse = ops.forward(*plain, True, 0.5, True)[1]
    delta = ops.backward_q(grad, *plain, lse, 0.5)[2]
    torch.library.opcheck(ops.backward_q, (grad, *plain, lse, 0.5))
    torch.library.opcheck(ops.backward_kv, (grad, *plain, lse, delta, 0.5))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_it_compiles_without_graph_breaks(impl):
    tensors = smallest()
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in tensors[:5]]

    def function(q, k, v, indices, weights):
        return 2 * grouped_cross_attention(2 * q, k, v, indices, weights, off_by_one=True, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    floats = [leaves[i] for i in (0, 1, 2, 4)]
    ours, eager = (torch.autograd.grad(f(*leaves), floats, tensors[5]) for f in (compiled, function))
    assert within_rounding(ours, eager)
    with torch.no_grad():
        assert within_rounding(compiled(*leaves), function(*leaves))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    tensors = [x.float() if x.is_floating_point() else x for x in inputs()]
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in tensors[:5]]

    def grads(out):
        out.backward(tensors[5])
        found = [x.grad for x in leaves if x.is_floating_point()]
        for x in leaves:
            x.grad = None
        return found

    def function(*args):
        return grouped_cross_attention(*args, impl="triton")

    plain, again = grads(function(*leaves)), grads(checkpoint(function, *leaves, use_reentrant=use_reentrant))
    assert same_bits(plain, again)


def test_frozen_memory_costs_no_pass_over_chunks(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "backward_kv", lambda *a: calls.append(a))
    q, k, v, indices, weights, grad = (x.float() if x.is_floating_point() else x for x in inputs())
    out = grouped_cross_attention(q.requires_grad_(), k, v, indices, weights, impl="triton")
    out.backward(grad)
    assert q.grad is not None and not calls


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_may_have_another_dtype(weights_dtype):
    q, k, v, indices, weights, grad = inputs()
    weights = weights.to(weights_dtype).requires_grad_()
    out = grouped_cross_attention(q.half(), k.half(), v.half(), indices, weights, impl="triton")
    out.backward(grad.half())
    assert out.dtype == torch.float16 and weights.grad.dtype == weights_dtype


# errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"need q \[B, H, T, D\] and k, v", lambda t: dict(q=t["q"][0])),
        (r"need q \[B, H, T, D\] and k, v", lambda t: dict(v=t["v"][:, :, :1])),
        (r"need indices and weights \[B, C, K\]", lambda t: dict(weights=t["weights"][..., :1])),
        ("must agree in batch, q and k in head dim", lambda t: dict(q=t["q"][..., :8])),
        ("must agree in batch, q and k in head dim", lambda t: dict(q=t["q"].expand(2, -1, -1, -1))),
        ("only the number of chunks may be 0", lambda t: dict(q=t["q"][:, :, :0])),
        ("only the number of chunks may be 0", lambda t: {x: t[x][..., :0] for x in ("indices", "weights")}),
        ("query heads must be a multiple of key heads, got 3 and 2", lambda t: dict(q=t["q"][:, [0, 1, 1]])),
        ("multiple of query chunks, got 23 and 3", lambda t: dict(q=t["q"][:, :, 1:])),
        ("must share a float dtype, got torch.float16, torch.float32", lambda t: dict(q=t["q"].half())),
        ("need int32 or int64 indices", lambda t: dict(indices=t["indices"].short())),
        ("float weights, got torch.int64 and torch.int64", lambda t: dict(weights=t["weights"].long())),
        ("must share a device, got .*q on 'meta'", lambda t: dict(q=t["q"].to("meta"))),
        ("stride 1 in the last dimension, got 32", lambda t: dict(k=t["k"].mT.contiguous().mT)),
        ("scale must be positive and finite, got 0", lambda t: dict(scale=0.0)),
        ("impl must be one of", lambda t: dict(impl="cuda")),
        ("float32, float16 or bfloat16, got torch.float64", lambda t: {x: t[x].double() for x in "qkv"}),
        ("head dim of at most 128, got 144", lambda t: {x: t[x].repeat_interleave(9, -1) for x in "qkv"}),
        ("at most 128 keys, got 160", lambda t: {x: t[x].repeat_interleave(5, -2) for x in "kv"}),
    ],
)
def test_bad_arguments_are_named(message, change):
    names = "q", "k", "v", "indices", "weights"
    tensors = [x.float() if x.is_floating_point() else x for x in inputs()[:5]]
    arguments = {"impl": "triton", **dict(zip(names, tensors, strict=True))}
    arguments |= change(arguments)
    tensors = [arguments.pop(name) for name in names]
    with pytest.raises(ValueError, match=message):
        grouped_cross_attention(*tensors, **arguments)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU would have to wait")
@pytest.mark.parametrize("index", [-2, 5])
def test_an_index_out_of_range_is_named(index):
    tensors = inputs()[:5]
    tensors[3][0, 0, 0] = index
    with pytest.raises(ValueError, match=rf"indices must be in \[-1, 4\], got .*{index}"):
        grouped_cross_attention(*tensors)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs tensors that Triton cannot reach")
def test_triton_without_gpu_and_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU, or TRITON_INTERPRET=1"):
        grouped_cross_attention(*inputs()[:5], impl="triton")
