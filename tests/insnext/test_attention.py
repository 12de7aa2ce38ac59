"""Attention implementations agree with `eager`, the definition, and an explicit choice is obeyed."""

import pytest
import torch

import modeling_insnext.insnext.attention as attention
from modeling_insnext import InsNextModel
from modeling_insnext.insnext.attention import (
    INTERVAL_BACKENDS,
    dense_bias,
    eager_attention,
    insertion_offsets,
    register_interval_backend,
    visible_keys,
)
from tests.support.built_text import build_row, random_ids
from tests.support.equality import difference, relative_error, within_rounding
from tests.support.insnext import tiny_model


CASES = {
    "prefix": lambda: [build_row([[[0, 1, 2, 3, 4]]])],
    "causal": lambda: [build_row([[[0], [1], [1], [2], [1], [3], [7]]])],
    "context": lambda: [build_row([[[0, 1, 2], [1], [4], [2]]])],
    "blocks": lambda: [build_row([[[0, 1, 1], [2], [1, 3], [2, 2, 2], [1]]])],
    "packed and padded": lambda: [build_row([[[0, 1], [1]], [[0], [1], [1], [1, 2]], [[0]]], pads=2)],
    "ragged batch": lambda: [
        build_row([[[0], [1], [1], [2]]], pads=3),
        build_row([[[0, 1, 2], [1, 1], [3], [2]]]),
        build_row([[[0]]], pads=6),
    ],
    "one token": lambda: [build_row([[[0]]])],
}
HEADS = {"multi-head": {}, "grouped": {"num_key_value_heads": 2}, "one key head": {"num_key_value_heads": 1}}


def batch(case):
    rows = CASES[case]()
    generator = torch.Generator().manual_seed(7)
    ids = torch.cat([random_ids(row, generator) for row in rows])
    positions, start, horizon = (torch.cat(parts) for parts in zip(*(row.tensors() for row in rows), strict=True))
    return {"input_ids": ids, "positions": positions, "start": start, "horizon": horizon}


def encode(attn, dtype, inputs, **overrides):
    with torch.no_grad():
        return tiny_model(InsNextModel, dtype, attn=attn, **overrides)(**inputs).last_hidden_state


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_sdpa_equals_eager_in_float64(case, heads):
    inputs = batch(case)
    assert (
        difference(encode("sdpa", torch.float64, inputs, **heads), encode("eager", torch.float64, inputs, **heads))
        < 1e-10
    )


# FlexAttention, which is compiled anew for each, takes every case and every form of heads, but not each with each
ACCURACY = [("sdpa", case, heads) for case in CASES for heads in HEADS]
ACCURACY += [("flex_attention", case, "grouped") for case in CASES]
ACCURACY += [("flex_attention", "packed and padded", heads) for heads in HEADS if heads != "grouped"]


@pytest.mark.parametrize(("attn", "case", "heads"), ACCURACY)
def test_float32_is_as_accurate_as_eager(attn, case, heads):
    inputs, heads = batch(case), HEADS[heads]
    exact = encode("eager", torch.float64, inputs, **heads)
    budget = 2 * relative_error(encode("eager", torch.float32, inputs, **heads), exact)
    assert (
        relative_error(encode(attn, torch.float32, inputs, **heads), exact) <= budget + torch.finfo(torch.float32).eps
    )


@pytest.mark.parametrize("attn", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("rule", ["horizon", "positions", "start", "alibi_slope_ratio"])
def test_a_broken_rule_is_far_outside_the_budget(attn, rule):
    """Control of the test above: an interval one token too long, the mirrored text, no packing, other slopes."""
    inputs = batch("context" if rule == "horizon" else "packed and padded")
    exact = encode("eager", torch.float64, inputs)
    overrides = {}
    if rule == "horizon":
        inputs["horizon"] = (inputs["horizon"] + 1).clamp_max(inputs["horizon"].shape[1] - 1)
    elif rule == "positions":
        inputs["positions"] = -inputs["positions"]
    elif rule == "start":
        inputs["start"] = torch.zeros_like(inputs["start"])
        inputs["positions"] = torch.arange(inputs["positions"].shape[1])[None]
    else:
        overrides = {"alibi_slope_ratio": 1.0}
    assert relative_error(encode(attn, torch.float32, inputs, **overrides), exact) > 1e-2


def test_flex_attention_works_for_one_shape_after_another():
    """Compiled for CPUs, PyTorch 2.13's FlexAttention dies at the second shape."""
    model, twin = tiny_model(InsNextModel, attn="flex_attention"), tiny_model(InsNextModel)
    for shape in ((2, 13), (3, 17), (1, 5)):
        ids = torch.randint(3, 23, shape)
        with torch.no_grad():
            assert difference(model(ids).last_hidden_state, twin(ids).last_hidden_state) < 1e-10


@pytest.mark.parametrize("case", ["context", "packed and padded"])
@pytest.mark.parametrize("overrides", [{"num_key_value_heads": 2}, {"position_encoding": "sinusoidal"}], ids=str)
def test_gradients_of_sdpa_equal_those_of_eager(case, overrides):
    inputs = batch(case)
    gradients = []
    for attn in ("eager", "sdpa"):
        model = tiny_model(attn=attn, **overrides)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert difference(gradients[1][name], expected) < 1e-10
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_gradients_of_eager_attention_pass_gradcheck():
    row = build_row([[[0, 1], [1], [2]]])
    query, key, value = (torch.randn(1, heads, 4, 3, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    slopes = torch.tensor([[2.0, 0.25], [0.5, 1.0]], dtype=torch.float64)
    mask = dense_bias(row.interval(), slopes, torch.float64)
    module = torch.nn.Module().eval()

    def attend(*qkv):
        return eager_attention(module, *qkv, mask, 0.7)[0]

    assert torch.autograd.gradcheck(attend, (query, key, value))


def test_eager_attention_equals_the_formula_written_as_loops():
    row = build_row([[[0, 1], [1, 2], [1]]])
    interval = row.interval()
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, 5, 3, dtype=torch.float64) for heads in (4, 2, 2))
    slopes = torch.rand(2, 4, dtype=torch.float64)
    out, _ = eager_attention(torch.nn.Module(), query, key, value, dense_bias(interval, slopes, torch.float64), 0.7)
    for q, text in enumerate(row.snapshots):
        for h in range(4):
            weights = {}
            for index, k in enumerate(text):
                offset = index - text.index(q)
                bias = -slopes[0, h] * max(-offset, 0) - slopes[1, h] * max(offset, 0)
                weights[k] = torch.exp(0.7 * query[0, h, q] @ key[0, h // 2, k] + bias)
            expected = sum(w * value[0, h // 2, k] for k, w in weights.items()) / sum(weights.values())
            assert difference(out[0, q, h], expected) < 1e-12


def test_set_attn_implementation_switches_to_a_registered_backend():
    calls = []

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        calls.append((module.layer_idx, tuple(attention_mask.shape)))
        return eager_attention(module, query, key, value, attention_mask, scaling)

    register_interval_backend("insnext_counted", dense_bias, attend)
    try:
        model, ids = tiny_model(InsNextModel, attn="sdpa"), torch.tensor([[1, 5, 6]])
        before = model(ids).last_hidden_state
        assert calls == []
        model.set_attn_implementation("insnext_counted")
        assert difference(model(ids).last_hidden_state, before) < 1e-10
        assert calls == [(0, (1, 4, 3, 3)), (1, (1, 4, 3, 3))]
        model.set_attn_implementation("eager")
        model(ids)
        assert len(calls) == 2
    finally:
        del INTERVAL_BACKENDS["insnext_counted"]


@pytest.mark.parametrize("attn", ["eager", "flex_attention"])
def test_set_attn_implementation_calls_the_backend_of_that_name(monkeypatch, attn):
    calls = []
    backend = INTERVAL_BACKENDS[attn]

    def counted(*args, **kwargs):
        calls.append(attn)
        return backend.attend(*args, **kwargs)

    monkeypatch.setitem(INTERVAL_BACKENDS, attn, backend._replace(attend=counted))
    model = tiny_model(InsNextModel, attn="sdpa")
    with torch.no_grad():
        model(torch.tensor([[1, 5, 6]]))
        assert calls == []
        model.set_attn_implementation(attn)
        model(torch.tensor([[1, 5, 6]]))
    assert calls == [attn] * 2


def test_an_unknown_implementation_raises():
    with pytest.raises(ValueError, match="no_such_attention"):
        tiny_model(attn="no_such_attention")


def test_flex_attention_refuses_dropout():
    model = tiny_model(InsNextModel, torch.float32, attn="flex_attention", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="flex_attention has no dropout, got attention_dropout=0.1"):
        model(torch.tensor([[1, 5, 6]]))
    model.eval()
    with torch.no_grad():
        assert model(torch.tensor([[1, 5, 6]])).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_attention_dropout_acts_in_training_only(attn):
    model, ids = tiny_model(InsNextModel, attn=attn, attention_dropout=0.5), torch.tensor([[1, 5, 6, 7]])
    first, second = (model(ids).last_hidden_state for _ in range(2))
    assert within_rounding(first, second)
    model.train()
    assert difference(model(ids).last_hidden_state, first) > 1e-2


def sinusoidal_scores_by_loops(attention, query, offsets, visible):
    """XLNet's (q + v) . W_r R(offset), one query, key and head at a time."""
    H, Q, d = query.shape
    D = H * d
    scores = torch.full((H, Q, offsets.shape[1]), -torch.inf, dtype=torch.float64)
    for q, k in visible.nonzero().tolist():
        distance = float(offsets[q, k])
        rate = [10000 ** (-2 * i / D) for i in range(D // 2)]
        r = torch.tensor([distance * x for x in rate], dtype=torch.float64)
        r = attention.r_proj(torch.cat([r.sin(), r.cos()])).view(H, d)
        for h in range(H):
            scores[h, q, k] = (query[h, q] + attention.offset_bias[h, 0]) @ r[h]
    return scores


def test_sinusoidal_attention_equals_xlnets_formula_written_as_loops():
    model = tiny_model(InsNextModel, position_encoding="sinusoidal")
    attention = model.layers[0].self_attn
    torch.nn.init.normal_(attention.content_bias)
    torch.nn.init.normal_(attention.offset_bias)
    row = build_row([[[0, 1], [1], [1, 2], [3]]])
    interval = row.interval()
    offsets, visible = insertion_offsets(interval), visible_keys(interval)
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    with torch.no_grad():
        out, _ = attention(x, (offsets, visible))
        query, key, value = (
            proj(x)[0].view(6, 4, 8).transpose(0, 1) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = (query + attention.content_bias) @ key.transpose(1, 2)
        scores = (scores + sinusoidal_scores_by_loops(attention, query, offsets[0], visible[0])) / 8**0.5
        expected = attention.o_proj((scores.softmax(-1) @ value).transpose(0, 1).reshape(6, 32))
    assert difference(out[0], expected) < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_sinusoidal_sdpa_equals_eager(case):
    inputs, sinusoidal = batch(case), {"position_encoding": "sinusoidal", "num_key_value_heads": 2}
    exact = encode("eager", torch.float64, inputs, **sinusoidal)
    assert difference(encode("sdpa", torch.float64, inputs, **sinusoidal), exact) < 1e-10
    if case != "one token":
        assert difference(encode("eager", torch.float64, inputs), exact) > 1e-2


def test_sinusoidal_refuses_flex_attention():
    model = tiny_model(InsNextModel, torch.float32, attn="flex_attention", position_encoding="sinusoidal")
    with pytest.raises(ValueError, match="sinusoidal.*eager or sdpa, got 'flex_attention'"):
        model(torch.tensor([[1, 5, 6]]))


@pytest.mark.slow
def test_flex_attention_compiled_for_one_shape_is_as_accurate_as_eager(monkeypatch):
    inputs = batch("blocks")
    exact = encode("eager", torch.float64, inputs)
    budget = 2 * relative_error(encode("eager", torch.float32, inputs), exact) + torch.finfo(torch.float32).eps
    compiled = torch.compile(attention.uncompiled_flex_attention, dynamic=False)
    monkeypatch.setattr(attention, "uncompiled_flex_attention", compiled)
    assert relative_error(encode("flex_attention", torch.float32, inputs), exact) <= budget
