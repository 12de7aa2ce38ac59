"""At the edge of all operators: integers of 64 bits, memory beyond 2^31 elements, values that mean nothing."""

import contextlib
import math

import pytest
import torch

from insnext_kernels import common, grouped_cross_attention, insertion_attention, offset_table, slot_cross_entropy
from insnext_kernels.insertion_attention.triton import decode, table
from tests.support.equality import relative_error, same_bits, within_rounding
from tests.support.kernels import DEVICE


IMPLS = ["reference", "triton"]
HUGE = [2**31, 2**32, 2**63 - 1, -(2**32), -(2**63)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def attention(K=20, Q=None, H=2, D=16):
    """Return the arguments of causal insertion attention in float32 for the last Q of K keys."""
    Q = K if Q is None else Q
    entries = torch.arange(K - Q, K, device=DEVICE)[None]
    return {
        "q_BHQD": normal(1, H, Q, D),
        "k_BGKD": normal(1, 1, K, D, seed=1),
        "v_BGKD": normal(1, 1, K, D, seed=2),
        "positions_BK": torch.randperm(K, generator=torch.Generator().manual_seed(3)).to(DEVICE)[None],
        "horizon_BQ": entries.clone(),
        "left_slopes_H": torch.rand(H, generator=torch.Generator().manual_seed(4)).to(DEVICE),
        "right_slopes_H": torch.rand(H, generator=torch.Generator().manual_seed(5)).to(DEVICE),
        "start_BQ": torch.zeros_like(entries),
        "entries_BQ": entries,
    }


def slots(N=6, S=8, D=4):
    """Return the arguments of slot cross-entropy: slots that live all the time, all kinds of targets."""
    return {
        "query_BND": normal(1, N, D),
        "key_BSD": normal(1, S, D, seed=1),
        "stop_key_D": normal(D, seed=2),
        "births_BS": torch.zeros(1, S, dtype=torch.long, device=DEVICE),
        "deaths_BS": torch.full((1, S), N, device=DEVICE),
        "targets_BN": torch.arange(N, device=DEVICE)[None] % S,
        "weights_BS": torch.arange(S, device=DEVICE)[None] % 4,
        "kinds_BN": torch.arange(N, device=DEVICE)[None] % 3,
        "cap": 10.0,
    }


def chunks(M=2, N=3):
    return {
        "q_BHTD": normal(1, 2, 2 * M, 16),
        "k_BGNSD": normal(1, 1, N, 16, 16, seed=1),
        "v_BGNSD": normal(1, 1, N, 16, 16, seed=2),
        "indices_BCK": torch.tensor([[[0, 1], [2, -1]]], device=DEVICE),
        "weights_BCK": torch.rand(1, 2, 2, generator=torch.Generator().manual_seed(3)).to(DEVICE),
    }


OPERATORS = {
    "insertion_attention": (insertion_attention, attention),
    "slot_cross_entropy": (slot_cross_entropy, slots),
    "grouped_cross_attention": (grouped_cross_attention, chunks),
}


# integers of 64 bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Q", [20, 1], ids=["many queries", "few queries"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", HUGE)
def test_an_interval_may_end_anywhere(value, impl, Q):
    p = attention(20, Q)
    nothing, plain = torch.zeros_like(p["q_BHQD"]), insertion_attention(**p, impl=impl)

    def changed(name, value):
        return insertion_attention(**{**p, name: torch.full_like(p["start_BQ"], value)}, impl=impl)

    late, far = changed("start_BQ", value), changed("horizon_BQ", value)
    assert within_rounding(late + 1, (nothing if value > 0 else plain) + 1)
    assert within_rounding(far + 1, (changed("horizon_BQ", 19) if value > 0 else nothing) + 1)
    # control: the bound is the last key, no nearer
    last_value = p["v_BGKD"][:, :, -1:].expand(-1, 2, -1, -1)
    assert within_rounding(changed("start_BQ", 19)[:, :, -1:], last_value)
    assert relative_error(plain[:, :, -1:], last_value) > 0.1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", HUGE)
def test_a_slot_may_be_born_and_die_anywhere(value, impl):
    p = slots()
    born, dead = ({**p, name: p[name].clone()} for name in ("births_BS", "deaths_BS"))
    never = {**p, "deaths_BS": p["deaths_BS"].clone()}
    born["births_BS"][0, 7] = dead["deaths_BS"][0, 7] = value
    never["deaths_BS"][0, 7] = 0
    plain, without = (slot_cross_entropy(**x, impl="reference") for x in (p, never))
    assert relative_error(plain, without) > 1e-2
    for changed, expected in ((born, without if value > 0 else plain), (dead, plain if value > 0 else without)):
        assert within_rounding(slot_cross_entropy(**changed, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factor", [2**30, 2**31, 2**32, 2**40])
def test_only_the_ratio_of_weights_counts(factor, impl):
    p = slots()
    p["kinds_BN"] = p["kinds_BN"].clamp_max(1)
    expected = slot_cross_entropy(**p, impl="reference")
    same, other = ({**p, "weights_BS": weights * factor} for weights in (p["weights_BS"], p["weights_BS"].flip(1)))
    assert within_rounding(slot_cross_entropy(**same, impl=impl), expected)
    assert relative_error(slot_cross_entropy(**other, impl=impl), expected) > 1e-2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("change", ["targets_BN", "kinds_BN"])
def test_what_cannot_be_checked_costs_infinitely_much(change, impl, monkeypatch):
    """As on a GPU, whose values nobody reads."""
    monkeypatch.setattr(common, "can_read", lambda tensor: False)
    p = slots()
    for value in (9, 2**32, 2**33 + 1):
        changed = {**p, change: p[change].clone()}
        changed[change][0, 2] = value
        loss = slot_cross_entropy(**changed, impl=impl)[0]
        assert loss.isinf().tolist() == [t == 2 for t in range(6)]


def test_gradients_of_an_index_beyond_32_bits_reach_no_chunk():
    from insnext_kernels.grouped_cross_attention.triton.backward import inverted_index

    listed, _, bounds = inverted_index(torch.tensor([[[1, 2**32 + 1, -1, 2**31, 0]]]), 3)
    assert listed.tolist() == [[0, 1, 3, 3, 3]] and bounds.tolist() == [[0, 1, 2, 2]]


# memory beyond 2^31 elements ----------------------------------------------------------------------------------------


def far_apart(x, dim, stride):
    """Return `x` with `stride` elements from one index of `dim` to the next; untouched pages cost no memory."""
    strides = [0] * x.ndim
    inner = 1
    for d in reversed(range(x.ndim)):
        strides[d] = stride if d == dim else inner
        inner *= 1 if d == dim else x.shape[d]
    memory = torch.empty(stride * (x.shape[dim] - 1) + inner, dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, strides).copy_(x)


# with three heads the last begins at 2^31; of 20 rows the last at 19 * 2^27
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU gives memory page by page to nobody")
@pytest.mark.parametrize(("dim", "stride"), [(1, 2**30), (2, 2**27)], ids=["heads", "rows"])
@pytest.mark.parametrize("Q", [20, 1], ids=["many queries", "few queries"])
def test_heads_and_rows_may_lie_further_apart_than_32_bits_count(dim, stride, Q):
    p = attention(20, Q, H=3)
    p["k_BGKD"], p["v_BGKD"] = (normal(1, 3, 20, 16, seed=seed) for seed in (1, 2))
    p = {name: x.half() if x.ndim == 4 else x for name, x in p.items()}
    names = ["k_BGKD", *(["q_BHQD"] if Q > 1 or dim == 1 else [])]
    leaves = {name: x.detach().requires_grad_(Q > 1) for name, x in p.items() if x.ndim == 4}
    plain = insertion_attention(**{**p, **leaves}, impl="triton")
    far = {name: far_apart(p[name], dim, stride).requires_grad_(Q > 1) for name in names}
    out = insertion_attention(**{**p, **far}, impl="triton")
    assert within_rounding(out, plain)
    if Q > 1:
        plain.sum().backward()
        out.sum().backward()
        assert all(within_rounding(far[name].grad, leaves[name].grad) for name in names)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU gives memory page by page to nobody")
@pytest.mark.parametrize(("name", "dim", "stride"), [("q_BHTD", 2, 2**30), ("k_BGNSD", 3, 2**28)])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_queries_and_keys_of_chunks_may_lie_further_apart_than_32_bits_count(name, dim, stride, needs_grad):
    p = {name: x.half() if x.ndim > 3 else x for name, x in chunks().items()}
    plain = {**p, name: p[name].clone().requires_grad_(needs_grad)}
    far = {**p, name: far_apart(p[name], dim, stride).requires_grad_(needs_grad)}
    expected, ours = (grouped_cross_attention(**x, impl="triton") for x in (plain, far))
    assert within_rounding(ours, expected)
    if needs_grad:
        expected.sum().backward()
        ours.sum().backward()
        assert within_rounding(far[name].grad, plain[name].grad)


# tables and launches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("few", [False, True], ids=["many queries", "few queries"])
@pytest.mark.parametrize("text", [True, False], ids=["positions", "stored order"])
def test_a_table_of_other_shapes_is_refused(impl, few, text):
    p, other = (attention(K, 2 if few else K) for K in (40, 18))
    if not text:
        p["positions_BK"] = other["positions_BK"] = None
    names = "positions_BK", "horizon_BQ", "start_BQ"
    tables = [
        offset_table(*(x[name] for name in names), entries_BQ=x["entries_BQ"], num_keys=K, impl=impl)
        for x, K in ((p, 40), (other, 18))
    ]
    assert insertion_attention(**p, table=tables[0], impl=impl).isfinite().all()
    Q = p["horizon_BQ"].shape[1]
    with pytest.raises(
        ValueError, match=rf"table must be for \[B, Q, K\] = \[1, {Q}, 40\], got one for \[1, .*, 18\]"
    ):
        insertion_attention(**p, table=tables[1], impl=impl)


def test_a_table_on_another_device_or_of_another_order_is_refused():
    p = attention()
    table = offset_table(p["positions_BK"], p["horizon_BQ"], impl="triton")
    with pytest.raises(ValueError, match="must share a device, got .*table on 'meta'"):
        insertion_attention(**p, table=table._replace(queries_B5Q=table.queries_B5Q.to("meta")), impl="triton")
    with pytest.raises(
        ValueError, match="table must be made with positions where there are any, got one made with them"
    ):
        insertion_attention(**{**p, "positions_BK": None}, table=table, impl="triton")


@pytest.mark.parametrize("Q", [1, 5])
@pytest.mark.parametrize("equal", [False, True], ids=["", "equal positions"])
def test_rows_by_sorting_are_those_by_comparing(Q, equal, monkeypatch):
    p = attention(150, Q)
    positions = p["positions_BK"] // 3 if equal else p["positions_BK"]
    # keys counted left of the window, in it, and right of it
    horizon, start = torch.tensor([[145, 22, 22, 145, 31], [7, 7, 12, 12, 12]], device=DEVICE)[:, None, :Q]
    arguments = positions, horizon, start
    compared = offset_table(*arguments, entries_BQ=p["entries_BQ"], impl="triton")
    monkeypatch.setattr(table, "SORTED_FROM", 0)
    ranked = offset_table(*arguments, entries_BQ=p["entries_BQ"], impl="triton")
    lo, hi = compared.tiles_BT6[0, 0, :2].tolist()
    assert 0 < lo < hi < 150
    assert same_bits(compared.rows_BT2K[..., lo:hi], ranked.rows_BT2K[..., lo:hi])
    # control: the rows say something
    assert compared.rows_BT2K[..., lo:hi].unique().numel() > 20


@pytest.mark.parametrize("programs", [1, 7, 80, 264])
def test_any_number_of_parts_is_merged(programs, monkeypatch):
    """A step divides its keys among the programs that fill the device; 32 parts are merged at a time."""
    p = {**attention(2600, 1, H=1), "positions_BK": None}
    exact = insertion_attention(**{n: x.double() if n[0] in "qkv" else x for n, x in p.items()}, impl="reference")
    monkeypatch.setattr(decode, "full_programs", lambda tensor: programs)
    twin, ours = (insertion_attention(**p, impl=impl) for impl in IMPLS)
    budget = 2 * relative_error(twin, exact) + torch.finfo(torch.float32).eps
    assert relative_error(ours, exact) <= budget


def test_a_gpu_is_asked_how_many_programs_fill_it(monkeypatch):
    class Small:
        multi_processor_count = 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Small())

    class OnGpu:
        is_cuda, device = True, "cuda:1"

    assert common.full_programs(OnGpu()) == 40
    assert common.full_programs(torch.empty(0)) == 264


@pytest.mark.skipif(DEVICE != "cpu", reason="counts launches of the interpreter")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("needs_grad", [True, False])
def test_every_launch_is_guarded(name, needs_grad, monkeypatch):
    """Triton launches on the current device: an operator makes it that of its tensors."""
    from triton.runtime import interpreter

    guards, launches, run = [], [], interpreter.GridExecutor.__call__

    @contextlib.contextmanager
    def guard(tensor):
        guards.append(tensor)
        yield
        guards.pop()

    def launch(self, *args, **kwargs):
        launches.append(bool(guards))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    operator, arguments = OPERATORS[name]
    arguments = {
        k: v.requires_grad_(needs_grad) if k[0] in "qk" and v.is_floating_point() else v
        for k, v in arguments().items()
    }
    out = operator(**arguments, impl="triton")
    if needs_grad:
        out.sum().backward()
    assert len(launches) >= 1 + needs_grad and all(launches)


# values that mean nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("scale", math.nan, ValueError, "scale must be positive and finite, got nan"),
        ("scale", math.inf, ValueError, "scale must be positive and finite, got inf"),
        ("scale", -1, ValueError, "scale must be positive and finite, got -1"),
        ("scale", True, TypeError, "scale must be a number, got bool"),
        ("scale", "1", TypeError, "scale must be a number, got str"),
        ("impl", "cuda", ValueError, "impl must be one of"),
    ],
)
def test_options_are_checked_alike(name, option, value, error, message):
    operator, arguments = OPERATORS[name]
    with pytest.raises(error, match=message):
        operator(**arguments(), **{option: value})


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_no_tensor_or_on_another_device_is_named(name):
    operator, arguments = OPERATORS[name]
    for argument, tensor in arguments().items():
        if isinstance(tensor, torch.Tensor):
            # the suffix is the shape
            said = argument.rsplit("_", 1)[0]
            with pytest.raises(ValueError, match=f"tensors must share a device, got .*{said} on 'meta'"):
                operator(**{**arguments(), argument: tensor.to("meta")})
            with pytest.raises(TypeError, match=f"{said} must be a tensor, got list"):
                operator(**{**arguments(), argument: tensor.tolist()})


@pytest.mark.parametrize("name", OPERATORS)
def test_integers_are_no_queries(name):
    operator, arguments = OPERATORS[name]
    arguments = arguments()
    query = next(iter(arguments))
    with pytest.raises(ValueError, match="float dtype, got torch.int64"):
        operator(**{**arguments, query: arguments[query].long()})


@pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not read")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("insertion_attention", "left_slopes_H", math.nan, r"left slopes must be finite, got \[nan"),
        ("insertion_attention", "right_slopes_H", math.inf, r"right slopes must be finite, got \[inf"),
        ("insertion_attention", "entries_BQ", -1, r"entries must be in \[0, 19\], got -1 to 19"),
        ("insertion_attention", "entries_BQ", 2**32, r"entries must be in \[0, 19\], got 1 to 4294967296"),
        ("slot_cross_entropy", "targets_BN", 9, r"targets must be in \[-1, 8\], got 1 to 9"),
        ("slot_cross_entropy", "targets_BN", -2, r"targets must be in \[-1, 8\], got -2 to 5"),
        ("slot_cross_entropy", "kinds_BN", 7, r"kinds must be in \[0, 2\], got 0 to 7"),
        ("slot_cross_entropy", "weights_BS", -1, r"weights must be in \[0, 1152921504606846975\], got -1 to 3"),
        ("slot_cross_entropy", "weights_BS", 2**62, "weights must be in .* got 0 to 4611686018427387904"),
        ("slot_cross_entropy", "births_BS", True, "births must be integers, got torch.bool"),
        ("grouped_cross_attention", "indices_BCK", 2**32, r"indices must be in \[-1, 2\], got -1 to 4294967296"),
    ],
)
def test_values_are_checked_where_they_can_be_read(name, argument, value, message, impl):
    operator, arguments = OPERATORS[name]
    arguments = arguments()
    if value is True:
        arguments[argument] = arguments[argument].bool()
    arguments[argument].flatten()[0] = value
    with pytest.raises(ValueError, match=message):
        operator(**arguments, impl=impl)


@pytest.mark.parametrize("cap", [math.nan, math.inf, 0, -3.0])
def test_the_cap_is_checked(cap):
    with pytest.raises(ValueError, match="cap must be positive and finite, got"):
        slot_cross_entropy(**{**slots(), "cap": cap})
