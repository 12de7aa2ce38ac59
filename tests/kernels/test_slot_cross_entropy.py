"""`slot_cross_entropy` on plain tensors: the kernels against the float64 twin, and the twin against plain loops."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from insnext_kernels import slot_cross_entropy
from tests.support.equality import relative_error, same_bits, within_rounding
from tests.support.kernels import DEVICE, DTYPES, SHARED_MEMORY, assert_as_accurate, compiled_for_sm90


forward, backward = (
    importlib.import_module(f"insnext_kernels.slot_cross_entropy.triton.{name}") for name in ("forward", "backward")
)


def problem(B=2, N=9, S=17, D=8, soft=False, dtype=torch.float32, spread=3.0):
    """Return arguments of which some slots are empty, some states without loss, some stop, and no target is dead."""
    births = torch.randint(-2, N + 2, (B, S))
    deaths = births + torch.randint(-1, N + 1, (B, S))
    state = torch.arange(N)[None, :, None]
    alive = (births[:, None] <= state) & (state < deaths[:, None])
    draw = torch.where(alive, torch.rand(B, N, S), -1.0)
    targets = torch.where(alive.any(2), draw.max(2).indices, S)
    rare = torch.rand(B, N)
    targets = torch.where(rare < 0.15, -1, torch.where(rare < 0.3, S, targets))
    floats = [
        (spread * torch.randn(*shape)).to(dtype) if x < 2 else torch.randn(*shape).to(dtype)
        for x, shape in enumerate(((B, N, D), (B, S, D), (D,)))
    ]
    integers = [births, deaths, targets]
    if soft:
        integers += [torch.randint(0, 4, (B, S)), torch.randint(0, 3, (B, N))]
    return [x.to(DEVICE) for x in (*floats, *integers)]


def run(tensors, dtype, impl, gradient=None, cap=10.0, **options):
    """Return loss and gradients; the gradient of the loss is random unless given."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in tensors[:3]]
    loss = slot_cross_entropy(*leaves, *tensors[3:], cap=cap, impl=impl, **options)
    if gradient is None:
        gradient = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)
    loss.backward(gradient.to(loss))
    return dict(zip(("loss", "dquery", "dkey", "dstop"), [loss.detach(), *(x.grad for x in leaves)], strict=True))


def compare(tensors, dtype, **options):
    exact = run(tensors, torch.float64, "reference", **options)
    ours = run(tensors, dtype, "triton", **options)
    assert_as_accurate(ours, run(tensors, dtype, "reference", **options), exact, dtype)
    return exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("B", "N", "S", "D"), [(1, 1, 1, 1), (2, 9, 17, 40), (1, 130, 272, 64)])
def test_the_kernels_are_as_accurate_as_the_twin(B, N, S, D, soft, dtype):
    tensors = problem(B, N, S, D, soft, dtype)
    exact = compare(tensors, dtype)
    if N > 1:
        # control: the same measure must reject a forgotten mask
        tensors[4] = torch.full_like(tensors[4], N)
        assert relative_error(run(tensors, dtype, "reference")["loss"], exact["loss"]) > 0.01


def test_the_twin_is_the_formula():
    B, N, S, D, cap = 1, 6, 9, 5, 2.0
    query, key, stop, births, deaths, targets, weights, kinds = (x.cpu() for x in problem(B, N, S, D, soft=True))
    floats = [x.double() for x in (query, key, stop)]
    integers = births, deaths, targets, weights, kinds
    ours = slot_cross_entropy(*floats, *integers, cap=cap, scale=0.5, impl="reference")[0]
    query, key = floats[0][0].tolist(), floats[1][0].tolist() + [floats[2].tolist()]
    births, deaths, targets, weights, kinds = (x[0].tolist() for x in integers)
    for t in range(N):
        logit = [cap * math.tanh(0.5 * sum(a * b for a, b in zip(query[t], k, strict=True)) / cap) for k in key]
        alive = [s for s in range(S) if births[s] <= t < deaths[s]]
        log_z = math.log(sum(math.exp(logit[s]) for s in [*alive, S]))
        share = {s: (0, weights[s], min(weights[s], 1))[kinds[t]] for s in alive}
        if targets[t] in (-1, S) or kinds[t] == 0:
            share = {targets[t]: 1} if targets[t] >= 0 else {}
        total = sum(share.values())
        loss = sum(w * (log_z - logit[s]) for s, w in share.items()) / total if total else 0.0
        assert abs(ours[t].item() - loss) < 1e-12


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_any_small_problem_is_as_accurate_as_the_twin(data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    B, N, S, D = (data.draw(st.integers(*bounds)) for bounds in ((1, 2), (1, 9), (2, 14), (2, 9)))
    # float16: in so few numbers a float32 twin may be right to the last bit, which is luck and no budget
    compare(problem(B, N, S, D, soft=data.draw(st.booleans()), dtype=torch.float16), torch.float16)


@pytest.mark.parametrize("soft", [False, True])
def test_chunks_of_states_and_of_rows_add_up(soft, monkeypatch):
    tensors = problem(3, 130, 140, 8, soft)
    whole = run(tensors, torch.float32, "triton")
    monkeypatch.setattr(backward, "STATES_PER_CHUNK", 64)
    monkeypatch.setattr(backward, "SCORES_PER_CHUNK", 2 * 64 * 140)
    monkeypatch.setattr(forward, "TILES_PER_PROGRAM", 1)
    exact = compare(tensors, torch.float32)
    assert relative_error(whole["dkey"], exact["dkey"]) < 1e-5


def test_no_buffer_holds_all_logits(monkeypatch):
    sizes = []
    plain = backward.empty

    def counted(*shape, **options):
        sizes.append(math.prod(shape))
        return plain(*shape, **options)

    for module in (forward, backward):
        monkeypatch.setattr(module, "empty", counted)
    B, N, S, D = 1, 192, 390, 8
    tensors = problem(B, N, S, D)
    run(tensors, torch.float32, "triton")
    assert max(sizes) >= N * S  # control: one chunk is all of so short a text
    sizes.clear()
    monkeypatch.setattr(backward, "STATES_PER_CHUNK", 64)
    run(tensors, torch.float32, "triton")
    assert 64 * S == max(sizes) < N * S // 2


def test_two_runs_give_the_same_bits():
    tensors = problem(2, 70, 90, 24, soft=True)
    first, second = (run(tensors, torch.float32, "triton") for _ in range(2))
    assert same_bits(first, second)


def test_a_state_without_loss_costs_nothing_and_moves_nothing():
    tensors = problem(1, 40, 50, 24)
    query, targets = tensors[0], tensors[5]
    result = run(tensors, torch.float32, "triton")
    idle = targets == -1
    assert idle.any() and (result["loss"][idle] == 0).all() and (result["dquery"][idle] == 0).all()
    assert (result["dquery"][~idle].abs().amax(-1) > 0).any()
    changed = query.clone()
    changed[idle] += 1
    again = run([changed, *tensors[1:]], torch.float32, "triton")
    assert same_bits(result, again)


def test_only_stop_is_left_where_no_slot_is_alive():
    tensors = problem(2, 20, 30, 8)
    tensors[4] = torch.zeros_like(tensors[4]).sub_(5)
    tensors[5] = torch.full_like(tensors[5], 30)
    result = run(tensors, torch.float32, "triton")
    assert (result["loss"] == 0).all() and all((result[name] == 0).all() for name in ("dquery", "dkey", "dstop"))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_dead_target_costs_infinitely_much(impl):
    tensors = problem(1, 8, 5, 8)
    tensors[3][0, 2], tensors[4][0, 2] = 4, 6
    tensors[5][:] = 2
    loss = run(tensors, torch.float32, impl)["loss"][0]
    assert loss.isinf().tolist() == [t not in (4, 5) for t in range(8)]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_soft_targets_without_weight_cost_nothing(impl):
    tensors = problem(1, 30, 20, 8, soft=True)
    tensors[6].zero_()
    result = run(tensors, torch.float32, impl)
    soft = (tensors[7] > 0) & (tensors[5] >= 0) & (tensors[5] < 20)
    assert soft.any() and (result["loss"][soft] == 0).all() and (result["dquery"][soft] == 0).all()


def test_float16_does_not_lose_small_gradients():
    tensors = problem(1, 40, 50, 24, dtype=torch.float16)
    gradient = torch.full((1, 40), 2e-4)
    exact = run(tensors, torch.float64, "reference", gradient)
    ours = run(tensors, torch.float16, "triton", gradient)
    twin = run(tensors, torch.float16, "reference", gradient)
    assert relative_error(ours["dquery"], exact["dquery"]) < 5e-3
    assert relative_error(ours["dquery"], exact["dquery"]) < relative_error(twin["dquery"], exact["dquery"])


def test_strided_tensors_give_the_same_bits():
    tensors = problem(2, 20, 30, 8, soft=True)
    strided = [torch.stack([x, x], -1)[..., 0] for x in tensors]
    assert not strided[0].is_contiguous()
    plain, other = (run(x, torch.float32, "triton") for x in (tensors, strided))
    assert same_bits(plain, other)


def test_nothing_in_nothing_out():
    for B, N, S in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        tensors = [torch.randn(B, N, 4), torch.randn(B, S, 4), torch.randn(4)]
        tensors += [torch.zeros(B, S, dtype=torch.int), torch.zeros(B, S, dtype=torch.int)]
        tensors += [torch.full((B, N), S)]
        result = run([x.to(DEVICE) for x in tensors], torch.float32, "triton")
        assert result["loss"].shape == (B, N) and (result["loss"] == 0).all()
        assert (result["dquery"] == 0).all() and result["dkey"].shape == (B, S, 4)


def test_opcheck():
    tensors = problem(1, 9, 12, 8, soft=True)
    floats = [x.requires_grad_() for x in tensors[:3]]
    # births and deaths as the operator wants them
    integers = [x.int() for x in (*(x.clamp(0, 9) for x in tensors[3:5]), *tensors[5:])]
    torch.library.opcheck(torch.ops.insnext_kernels.slot_cross_entropy.default, (*floats, *integers, 10.0, 0.3))
    integers[3:] = [None, None]
    torch.library.opcheck(torch.ops.insnext_kernels.slot_cross_entropy.default, (*floats, *integers, 10.0, 0.3))


def test_it_compiles_without_a_graph_break():
    tensors = problem(1, 9, 12, 8, soft=True)

    def loss(query):
        return slot_cross_entropy(query * 2, *tensors[1:], cap=10.0, impl="triton").sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = tensors[0].clone().requires_grad_()
        out = function(leaf)
        out.backward()
        results.append((out.detach(), leaf.grad))
    assert same_bits(results[0][0], results[1][0]) and same_bits(results[0][1], results[1][1])


def test_gradient_checkpointing_gives_the_same_bits():
    tensors = problem(1, 9, 12, 8)
    results = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        leaf = tensors[0].clone().requires_grad_()
        wrap(lambda x: slot_cross_entropy(x, *tensors[1:], cap=10.0, impl="triton"), leaf).sum().backward()
        results.append(leaf.grad)
    assert same_bits(*results)


def test_every_option_changes_the_result():
    tensors = problem(1, 9, 12, 8, soft=True)
    plain = run(tensors, torch.float32, "triton")["loss"]
    hard = run(tensors[:6], torch.float32, "triton")["loss"]
    for other in (
        hard,
        run(tensors, torch.float32, "triton", cap=9.0)["loss"],
        run(tensors, torch.float32, "triton", scale=0.1)["loss"],
    ):
        assert relative_error(other, plain) > 1e-3


def test_auto_is_the_reference_on_a_cpu_and_the_kernels_on_a_gpu():
    tensors = problem(1, 9, 12, 8)
    auto = run(tensors, torch.float32, "auto")["loss"]
    assert within_rounding(auto, run(tensors, torch.float32, "triton" if DEVICE == "cuda" else "reference")["loss"])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({0: torch.randn(3, 4)}, {}, r"need query \[B, N, D\] and key \[B, S, D\], got \[3, 4\] and"),
        ({1: torch.randn(1, 12, 9)}, {}, r"key must be \[1, 12, 8\], got \[1, 12, 9\]"),
        ({2: torch.randn(9)}, {}, r"stop_key must be \[8\], got \[9\]"),
        ({3: torch.zeros(1, 11).int()}, {}, r"births must be \[1, 12\], got \[1, 11\]"),
        ({4: torch.zeros(1, 12)}, {}, "deaths must be integers, got torch.float32"),
        ({5: torch.zeros(1, 8).int()}, {}, r"targets must be \[1, 9\], got \[1, 8\]"),
        ({6: torch.zeros(1, 13).int()}, {}, r"weights must be \[1, 12\], got \[1, 13\]"),
        ({6: None}, {}, "kinds need weights, got None"),
        (
            {2: torch.randn(8).half()},
            {},
            "must have one float dtype, got torch.float32, torch.float32 and torch.float16",
        ),
        ({}, {"cap": 0.0}, "cap must be positive and finite, got 0.0"),
        ({}, {"cap": 61.0, "impl": "triton"}, 'impl="triton" needs cap <= 60, .* got 61.0'),
        ({}, {"impl": "cuda"}, "impl must be one of .*'cuda'"),
    ],
)
def test_bad_input_is_named(change, options, message):
    tensors = problem(1, 9, 12, 8, soft=True)
    for i, value in change.items():
        tensors[i] = None if value is None else value.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        slot_cross_entropy(*tensors, **{"cap": 10.0, **options})


def test_float64_needs_the_reference():
    tensors = problem(1, 9, 12, 8)
    tensors[:3] = [x.double() for x in tensors[:3]]
    with pytest.raises(ValueError, match='impl="triton" needs float16, bfloat16 or float32, got torch.float64'):
        slot_cross_entropy(*tensors, cap=10.0, impl="triton")


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    tensors = [x.cpu() for x in problem(1, 9, 12, 8)]
    with pytest.raises(ValueError, match='impl="triton" needs a GPU, or TRITON_INTERPRET=1'):
        slot_cross_entropy(*tensors, cap=10.0, impl="triton")


COMPILED = """
import torch
from insnext_kernels import slot_cross_entropy
for dtype in ({}):
    for soft in (False, True):
        N, S, D = 256, 512, 768
        floats = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((1, N, D), (1, S, D), (D,))]
        integers = [torch.zeros(1, n, dtype=torch.int) for n in ((S, S, N, S, N) if soft else (S, S, N))]
        slot_cross_entropy(*floats, *integers, cap=30.0, impl="triton").sum().backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", ["torch.bfloat16,", "torch.float16, torch.float32"], ids=["bfloat16", "others"])
def test_every_kernel_compiles_for_hopper(dtypes):
    reports = compiled_for_sm90(COMPILED.format(dtypes))
    assert len({report["name"] for report in reports}) == 5 and len(reports) >= 8
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY, report
        # what spills goes to the stack; float32 is there for accuracy, not for speed
        assert report["stack"] == 0 or not {"bf16", "fp16"} & set(report["dtypes"]), report
