"""Insertion attention: Triton against the float64 twin, and the twin against the model's own definition."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from insnext_kernels.insertion_attention import OffsetTable, insertion_attention, offset_table
from modeling_insnext.insnext.attention import Interval, dense_bias, eager_attention, insertion_offsets
from tests.support.equality import relative_error, same_bits
from tests.support.kernels import DEVICE, DTYPES, assert_as_accurate


def intervals(kind, B, Q, K, generator):
    """Return start, horizon and entries `[B, Q]` of the last Q of K keys."""
    entry = torch.arange(K - Q, K).expand(B, Q)
    start = torch.zeros_like(entry)
    if kind == "prefix":
        return start, torch.full_like(entry, K - 1), entry
    if kind == "causal":
        return start, entry, entry
    if kind == "blocks":
        sizes = torch.tensor([1, 2, 3, 9, 10, 90, 91, 131]).clamp_max(K)
        return (
            start,
            torch.cat([sizes - 1, torch.tensor([K - 1])])[torch.searchsorted(sizes, entry.contiguous(), right=True)],
            entry,
        )
    if kind == "packed":
        # a context of 5 in each text, then padding that sees itself
        bounds = torch.tensor([0, 30, 31, 75, 130, K - 3, K])
        text = torch.searchsorted(bounds, entry.contiguous(), right=True) - 1
        start, end = bounds[text], bounds[text + 1]
        pad = entry >= K - 3
        horizon = torch.maximum(entry, torch.minimum(start + 4, end - 1))
        return torch.where(pad, entry, start), torch.where(pad, entry, horizon), entry
    if kind == "sliding":
        return (entry - 20).clamp_min(0), entry, entry
    if kind == "any ascending":
        # empty ones among them, and horizons beyond both ends
        start, horizon = (
            torch.randint(0, K, (B, Q), generator=generator),
            torch.randint(-3, K + 9, (B, Q), generator=generator),
        )
        return start.sort(1).values, horizon.sort(1).values, entry
    if kind == "any":
        start, horizon = (torch.randint(0, K, (B, Q), generator=generator) for _ in range(2))
        return start, horizon, torch.randint(0, K, (B, Q), generator=generator)
    if kind == "none":
        return torch.full_like(entry, K - 1), torch.zeros_like(entry), entry
    raise ValueError(kind)


def problem(kind, dtype, B=1, H=2, G=1, Q=140, K=140, D=16, seed=0, text=True):
    """Return tensors that every dtype from `dtype` on represents exactly, and the intervals."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    start, horizon, entries = (x.to(DEVICE) for x in intervals(kind, B, Q, K, generator))
    positions = torch.stack([torch.randperm(K, generator=generator) * 7 - 50 for _ in range(B)]).to(DEVICE)
    return {
        # as a model leaves them: heads behind queries in memory
        "q": normal(B, Q, H, D).transpose(1, 2),
        "k": normal(B, K, G, D).transpose(1, 2),
        "v": normal(B, K, G, D).transpose(1, 2),
        "dout": normal(B, H, Q, D),
        "positions": positions if text else None,
        "horizon": horizon,
        "start": start,
        "entries": entries,
        "left": torch.rand(H, generator=generator).to(DEVICE),
        "right": torch.rand(H, generator=generator).to(DEVICE),
    }


def run(p, dtype, impl, gradients=True, **options):
    q, k, v = (p[name].to(dtype).detach().requires_grad_(gradients) for name in "qkv")
    out = insertion_attention(
        q, k, v, p["positions"], p["horizon"], p["left"], p["right"], p["start"],
        entries_BQ=p["entries"], impl=impl, **options,
    )  # fmt: skip
    if not gradients:
        return {"out": out}
    out.backward(p["dout"].to(dtype))
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def check(p, dtype, gradients=True, **options):
    exact = run(p, torch.float64, "reference", gradients)
    assert_as_accurate(
        run(p, dtype, "triton", gradients, **options), run(p, dtype, "reference", gradients), exact, dtype
    )
    return exact


# one more form of what `make test` checks
slow = pytest.mark.slow
KINDS = ["prefix", "causal", "blocks", "packed", "sliding", "any ascending", "any", "none"]


# the order of the text acts beside what is seen: each kind with one, two with both
IN_STORED_ORDER = [pytest.param(kind, False, marks=[] if kind in ("packed", "any") else slow) for kind in KINDS]


@pytest.mark.parametrize(("kind", "text"), [*((kind, True) for kind in KINDS), *IN_STORED_ORDER])
def test_triton_is_as_accurate_as_the_twin(kind, text):
    p = problem(kind, torch.float32, text=text)
    exact = check(p, torch.float32)
    if kind == "none":
        assert all((x == 0).all() for x in exact.values())


@pytest.mark.parametrize(
    ("kind", "dtype", "D"),
    [
        ("blocks", torch.float16, 128),
        ("packed", torch.bfloat16, 64),
        pytest.param("blocks", torch.bfloat16, 64, marks=slow),
        pytest.param("packed", torch.float16, 128, marks=slow),
    ],
    ids=str,
)
def test_half_precision_is_as_accurate_as_the_twin(kind, dtype, D):
    check(problem(kind, dtype, D=D), dtype)


def test_odd_widths_and_a_head_of_keys_for_each_head():
    check(problem("causal", torch.float32, H=3, G=3, Q=65, K=65, D=24), torch.float32)


def test_fewer_queries_than_keys_and_several_rows():
    check(problem("causal", torch.float16, B=3, Q=33, K=75, D=96), torch.float16)


@pytest.mark.parametrize("rule", ["start", "horizon", "positions", "slopes", "entries"])
def test_a_broken_rule_is_far_outside_the_budget(rule):
    p = problem("packed", torch.float32)
    exact = run(p, torch.float64, "reference")
    if rule == "slopes":
        p["left"], p["right"] = p["right"], p["left"]
    elif rule == "positions":
        p["positions"] = -p["positions"]
    elif rule == "start":
        p["start"] = torch.zeros_like(p["start"])
    else:
        p[rule] = (p[rule] + 1).clamp_max(139)
    wrong = run(p, torch.float32, "reference")
    assert max(relative_error(wrong[name], exact[name]) for name in exact) > 1e-2


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_offsets_and_the_output_are_those_of_the_model(impl):
    p = problem("packed", torch.float64, B=2, H=4, G=2, Q=90, K=140)
    interval = Interval(p["positions"], p["start"], p["horizon"], p["entries"])
    slopes = torch.stack([p["left"], p["right"]]).double()
    mask = dense_bias(interval, slopes, torch.float64)
    module = torch.nn.Module().eval()
    expected = eager_attention(module, p["q"], p["k"], p["v"], mask, 16**-0.5)[0].transpose(1, 2)
    dtype = torch.float64 if impl == "reference" else torch.float32
    ours = run(p, dtype, impl, gradients=False)["out"]
    assert relative_error(ours, expected) < (1e-12 if impl == "reference" else 1e-6)
    if impl == "reference":
        table = offset_table(p["positions"], p["horizon"], p["start"], entries_BQ=p["entries"], impl=impl)
        key = torch.arange(140, device=DEVICE)
        seen = (key >= p["start"][..., None]) & (key <= p["horizon"][..., None])
        assert same_bits(table[seen], insertion_offsets(interval)[seen])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [{"Q": 1}, {"Q": 5, "H": 4, "G": 2}], ids=str)
def test_decoding_is_as_accurate_as_the_twin(kind, shape):
    p = problem(kind, torch.float32, B=2, K=150, **shape)
    check(p, torch.float32, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_decoding_in_half_precision(dtype):
    check(problem("causal", dtype, Q=2, K=150), dtype, gradients=False)


def test_rows_of_a_cache_see_their_own_length_and_nothing_of_the_free_room():
    """A buffer of 150 entries, rows that hold 3, 70 and 149 of them; what lies behind is not even read."""
    p = problem("causal", torch.float32, B=3, Q=1, K=150)
    p["entries"] = p["horizon"] = torch.tensor([[2], [69], [148]], device=DEVICE)
    exact = run(p, torch.float64, "reference", gradients=False)["out"]
    for row, length in enumerate([3, 70, 149]):
        p["k"][row, :, length:] = torch.nan
        p["v"][row, :, length:] = torch.nan
    ours = run(p, torch.float32, "triton", gradients=False)["out"]
    assert relative_error(ours, exact) < 1e-6
    p["horizon"] = p["horizon"] + 1
    assert run(p, torch.float32, "triton", gradients=False)["out"].isnan().any()


def test_few_queries_have_gradients_too():
    check(problem("causal", torch.float32, Q=3, K=100), torch.float32)


@pytest.mark.parametrize("kind", ["packed", "sliding"])
def test_a_table_made_once_serves_every_layer(kind):
    p = problem(kind, torch.float32)
    table = offset_table(p["positions"], p["horizon"], p["start"], entries_BQ=p["entries"], impl="triton")
    assert isinstance(table, OffsetTable)
    for seed in (1, 2):
        other = problem(kind, torch.float32, seed=seed)
        layer = {**p, **{name: other[name] for name in ("q", "k", "v", "dout")}}
        own, given = run(layer, torch.float32, "triton"), run(layer, torch.float32, "triton", table=table)
        assert same_bits(own, given)


def test_gradients_do_not_depend_on_the_run():
    p = problem("blocks", torch.float16, G=2)
    first, second = (run(p, torch.float16, "triton") for _ in range(2))
    assert same_bits(first, second)


def test_strides_do_not_matter():
    p = problem("packed", torch.float32)
    expected = run(p, torch.float32, "triton")
    p["q"] = p["q"].transpose(2, 3).contiguous().transpose(2, 3)
    p["k"] = torch.stack([p["k"], p["k"]], 3)[:, :, :, 0]
    p["v"] = p["v"].contiguous()
    p["dout"] = p["dout"].transpose(1, 3).contiguous().transpose(1, 3)
    p["horizon"] = torch.stack([p["horizon"], p["horizon"]], 2)[..., 0].int()
    ours = run(p, torch.float32, "triton")
    assert same_bits(ours, expected)


def test_positions_of_any_size_are_only_compared():
    p = problem("causal", torch.float32)
    expected = run(p, torch.float32, "triton")["out"]
    p["positions"] = p["positions"] * 2**52
    assert same_bits(run(p, torch.float32, "triton")["out"], expected)
    few = problem("causal", torch.float32, Q=1)
    expected = run(few, torch.float32, "triton", gradients=False)["out"]
    few["positions"] = few["positions"] * 2**52
    assert same_bits(run(few, torch.float32, "triton", gradients=False)["out"], expected)


# without shrinking, which takes minutes in the interpreter
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_any_intervals_of_small_problems(data):
    Q, K = data.draw(st.integers(1, 12), "Q"), 20
    p = problem("any", torch.float32, Q=Q, K=K, text=data.draw(st.booleans(), "text"), seed=Q)
    for name, low, high in (("start", -1, K), ("horizon", -2, K + 1), ("entries", 0, K - 1)):
        drawn = data.draw(st.lists(st.integers(low, high), min_size=Q, max_size=Q), name)
        p[name] = torch.tensor([drawn], device=DEVICE)
    gradients = data.draw(st.booleans(), "gradients")
    exact, twin, ours = (
        run(p, dtype, impl, gradients)
        for dtype, impl in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "triton"))
    )
    # as one: a query that sees one key has the gradient 0, of which nothing is a small part
    exact, twin, ours = ({"all": torch.cat([x.flatten() for x in each.values()])} for each in (exact, twin, ours))
    assert_as_accurate(ours, twin, exact, torch.float32)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remember the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


class NoLaunch:
    """In the place of a kernel: takes every launch and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def test_no_tensor_has_an_entry_for_each_pair_of_query_and_key(monkeypatch):
    from insnext_kernels.insertion_attention import ops
    from insnext_kernels.insertion_attention.triton import backward, forward, table

    # memory is what counts here: an operator's body sees to that, so it is called without the dispatcher
    for module in (table, forward, backward):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoLaunch())
    n = 1024
    p = problem("causal", torch.float32, Q=n, K=n, H=1, D=16)
    with Largest() as reference:
        run(p, torch.float32, "reference")
    assert reference.numel >= n * n
    with Largest() as ours:
        keys = ops.text_order(p["positions"], n)
        tensors = keys, *ops.insertion_table._init_fn(keys, p["horizon"], p["start"], p["entries"], n)
        inputs = p["q"], p["k"], p["v"]
        others = *tensors, p["left"], p["right"], 0.25
        out, lse = ops.insertion_forward._init_fn(*inputs, *others)
        ops.insertion_backward._init_fn(p["dout"], *inputs, out, lse, *others)
    assert n * 16 <= ours.numel <= n * n // 16


def test_operators_pass_opcheck():
    from insnext_kernels.insertion_attention import ops

    p = problem("packed", torch.float32, Q=20, K=70)
    table = ops.make_table(p["positions"], p["horizon"], p["start"], p["entries"], 70)
    q, k, v = (p[name].clone().requires_grad_() for name in "qkv")
    slopes = p["left"], p["right"]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(ops.insertion_forward, (q, k, v, *table, *slopes, 0.3), test_utils=checks)
    torch.library.opcheck(
        ops.insertion_table,
        (table.keys_BK, p["horizon"], p["start"], p["entries"].contiguous(), 70),
        test_utils=checks[:3],
    )
    few = ops.make_table(p["positions"], p["horizon"][:, :2], p["start"][:, :2], p["entries"][:, :2], 70)
    torch.library.opcheck(
        ops.insertion_decode, (p["q"][:, :, :2], p["k"], p["v"], *few, *slopes, 0.3), test_utils=checks[:3]
    )


@pytest.mark.parametrize("few", [False, True], ids=["many queries", "few queries"])
def test_compiled_as_one_graph_it_gives_the_same(few):
    p = problem("packed", torch.float32, Q=2 if few else 40, K=90)

    def attend(q, k, v):
        table = offset_table(p["positions"], p["horizon"], p["start"], entries_BQ=p["entries"], impl="triton")
        return insertion_attention(
            q, k, v, p["positions"], p["horizon"], p["left"], p["right"], p["start"],
            entries_BQ=p["entries"], table=table, impl="triton",
        )  # fmt: skip

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attend, compiled):
        q, k, v = (p[name].clone().requires_grad_(not few) for name in "qkv")
        out = function(q, k, v)
        if not few:
            out.backward(p["dout"])
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, expected in zip(*results, strict=True):
        assert ours is expected is None or same_bits(ours, expected)


def test_gradient_checkpointing_gives_the_same():
    p = problem("blocks", torch.float32, Q=40, K=90)
    results = []
    for through in (False, True):
        q, k, v = (p[name].clone().requires_grad_() for name in "qkv")

        def attend(q, k, v):
            intervals = p["positions"], p["horizon"], p["left"], p["right"], p["start"]
            return insertion_attention(q * 2, k, v, *intervals, impl="triton")

        out = checkpoint(attend, q, k, v, use_reentrant=False) if through else attend(q, k, v)
        out.backward(p["dout"])
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, expected in zip(*results, strict=True):
        assert same_bits(ours, expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": torch.zeros(1, 2, 4)}, r"need q \[B, H, Q, D\]"),
        ({"q": torch.zeros(1, 3, 4, 8)}, "multiple of key heads, got 3 and 2"),
        ({"k": torch.zeros(1, 2, 0, 8), "v": torch.zeros(1, 2, 0, 8)}, "there must be queries and keys"),
        (
            {"v": torch.zeros(1, 2, 6, 8).half()},
            "share a float dtype, got torch.float32, torch.float32 and torch.float16",
        ),
        ({"horizon": torch.zeros(1, 3).long()}, r"horizon must be \[B, Q\], got \[1, 3\]"),
        ({"horizon": torch.zeros(4).long()}, r"horizon must be \[B, Q\], got \[4\]"),
        ({"positions": torch.zeros(1, 5).long()}, r"positions must be \[1, 6\], got \[1, 5\]"),
        ({"positions": torch.zeros(1, 6)}, "positions must be int32 or int64, got torch.float32"),
        ({"start": torch.zeros(1, 5).long()}, r"start must be \[1, 4\], got \[1, 5\]"),
        ({"entries": torch.full((1, 4), 6)}, r"entries must be in \[0, 5\], got 6 to 6"),
        ({"left": torch.zeros(3)}, r"left slopes must be \[2\], one for each head, got \[3\]"),
        ({"right": torch.zeros(2, requires_grad=True)}, "slopes get no gradient, got right slopes"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"impl": "triton", "dtype": torch.float64}, "needs float32, float16 or bfloat16, got torch.float64"),
        ({"impl": "triton", "width": 129}, "head dim of at most 128, got 129"),
        ({"impl": "triton", "table": torch.zeros(1)}, "must come from offset_table with the same impl, got Tensor"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_errors_name_the_rule_and_the_value(change, match):
    width, dtype = change.get("width", 8), change.get("dtype", torch.float32)
    p = {
        "q": torch.zeros(1, 2, 4, width, dtype=dtype),
        "k": torch.zeros(1, 2, 6, width, dtype=dtype),
        "v": torch.zeros(1, 2, 6, width, dtype=dtype),
        "positions": torch.arange(6)[None],
        "horizon": torch.arange(2, 6)[None],
        "left": torch.zeros(2),
        "right": torch.zeros(2),
        "start": None,
        "entries": None,
        "table": None,
        "impl": "reference",
        **change,
    }
    tensors = [x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.requires_grad else x for x in p.values()]
    if "entries" in change and DEVICE == "cuda":
        pytest.skip("values on a GPU are not read")
    with pytest.raises(ValueError, match=match):
        insertion_attention(*tensors[:8], entries_BQ=tensors[8], table=tensors[9], impl=p["impl"])


def test_without_positions_the_number_of_keys_must_be_given():
    with pytest.raises(ValueError, match="positions or num_keys must be given"):
        offset_table(None, torch.zeros(1, 2).long())
