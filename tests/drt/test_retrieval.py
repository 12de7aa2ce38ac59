"""Attention to chunks and their choice: definitions, gradients, noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext import ChunkMemoryCache
from modeling_insnext.drt import memory
from modeling_insnext.drt import retriever as retriever_module
from modeling_insnext.drt.landmark_attention import grouped_softmax
from modeling_insnext.drt.retrieval import (
    best_chunks,
    chance,
    chunk_weights,
    concatenated_cross_attention,
    grouped_cross_attention,
    gumbel_like,
)
from tests.support.drt import random_ids, tiny_model
from tests.support.equality import same_bits


B, H, G, C, M, N, S, K, D = 2, 4, 2, 3, 2, 4, 3, 2, 4
MODES = [(one, off) for one in (grouped_cross_attention, concatenated_cross_attention) for off in (False, True)]


def attention_inputs(dtype=torch.float64, seed=0, rows=B):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    indices = torch.randint(0, N, (B, C, K), generator=generator)
    indices[0, 0], indices[1, 1, 1] = -1, -1
    weights = torch.rand(B, C, K, generator=generator, dtype=dtype).requires_grad_()
    return normal(B, H, C * M, D), normal(rows, G, N, S, D), normal(rows, G, N, S, D), indices, weights


def by_the_formula(query, key, value, indices, weights, fused, off_by_one):
    """Return sum_i w_i softmax(q K_i^T / sqrt(D)) V_i, or one softmax over all chunks, position by position."""
    out = torch.zeros_like(query)
    for b in range(B):
        row = b if len(key) > 1 else 0
        for h in range(H):
            for t in range(C * M):
                scores, values, shares = [], [], []
                for place, i in enumerate(indices[b, t // M].tolist()):
                    if i < 0:
                        continue
                    scores.append(key[row, h * G // H, i] @ query[b, h, t] / math.sqrt(D))
                    values.append(value[row, h * G // H, i])
                    total = scores[-1].exp().sum() + off_by_one
                    shares.append(weights[b, t // M, place] * scores[-1].exp() / total)
                if scores and fused is concatenated_cross_attention:
                    shares = [torch.cat(scores).exp() / (torch.cat(scores).exp().sum() + off_by_one)]
                if scores:
                    out[b, h, t] = torch.cat(shares) @ torch.cat(values)
    return out


@pytest.mark.parametrize("rows", [1, B], ids=["one_memory", "memory_per_row"])
@pytest.mark.parametrize(("fused", "off_by_one"), MODES)
def test_attention_to_chunks_is_its_formula_forwards_and_backwards(fused, off_by_one, rows):
    inputs = attention_inputs(rows=rows)
    ours = fused(*inputs, off_by_one=off_by_one)
    expected = by_the_formula(*inputs, fused, off_by_one)
    assert (ours - expected).abs().max() < 1e-12
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    leaves = [*inputs[:3], *([inputs[4]] if fused is grouped_cross_attention else [])]
    for one, other in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (ours, expected)), strict=True):
        assert (one - other).abs().max() < 1e-12
    # controls: the slot, the weights and the choice matter
    assert (fused(*inputs, off_by_one=not off_by_one) - expected).abs().max() > 1e-3
    query, key, value, indices, weights = inputs
    assert (fused(query, key, value, indices.flip(1), weights, off_by_one=off_by_one) - expected).abs().max() > 1e-3
    reweighted = fused(query, key, value, indices, weights.flip(2), off_by_one=off_by_one)
    assert ((reweighted - expected).abs().max() > 1e-3) == (fused is grouped_cross_attention)


@pytest.mark.parametrize(("fused", "off_by_one"), MODES)
def test_gradcheck_of_attention_to_chunks(fused, off_by_one):
    query, key, value, indices, weights = attention_inputs()

    def run(query, key, value, weights):
        return fused(query, key, value, indices, weights, off_by_one=off_by_one, scale=0.7)

    assert torch.autograd.gradcheck(run, (query, key, value, weights))


@pytest.mark.parametrize(("fused", "off_by_one"), MODES)
def test_large_scores_stay_finite(fused, off_by_one):
    query, key, value, indices, weights = attention_inputs(torch.float32)
    out = fused(query * 1e3, key * 1e3, value, indices, weights, off_by_one=off_by_one)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    nothing = torch.full_like(indices, -1)
    assert fused(query, key, value, nothing, weights, off_by_one=off_by_one).abs().max() == 0


@pytest.mark.parametrize(("fused", "off_by_one"), MODES)
def test_half_precision_is_as_good_as_its_inputs(fused, off_by_one):
    exact = attention_inputs()
    half = [x.detach().bfloat16() if x.is_floating_point() else x for x in exact]
    rounded = [x.double() if x.is_floating_point() else x for x in half]
    error = (fused(*half, off_by_one=off_by_one).double() - fused(*rounded, off_by_one=off_by_one)).abs().max()
    assert error < 0.03


def landmark_inputs(positions=9, block=3):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, positions, positions, generator=generator, dtype=torch.float64)
    place = torch.arange(positions)
    scores = scores.masked_fill(place > place[:, None], -torch.inf)
    blocks = (place // block)[None]
    own = blocks[0][:, None] == blocks[0]
    return scores, own[None], (place % block == block - 1)[None], blocks


def test_the_grouped_softmax_of_landmark_attention_is_its_formula():
    scores, own, is_landmark, block = landmark_inputs()
    shares = grouped_softmax(scores, own, is_landmark, block)
    assert (shares.sum(-1) - 1).abs().max() < 1e-12
    for h in range(scores.shape[1]):
        for i in range(scores.shape[2]):
            first = i // 3 * 3
            seen = [*range(first, i + 1), *range(2, first, 3)]
            outer = dict(zip(seen, scores[0, h, i, seen].softmax(0).tolist(), strict=True))
            for j in range(scores.shape[3]):
                if j >= first or j % 3 == 2:
                    # a landmark hands its share down and keeps nothing
                    expected = outer.get(j, 0.0) if j >= first else 0.0
                else:
                    landmark = j // 3 * 3 + 2
                    inner = scores[0, h, i, landmark - 2 : landmark].softmax(0)
                    expected = outer[landmark] * float(inner[j % 3])
                assert abs(float(shares[0, h, i, j]) - expected) < 1e-12


def test_gradcheck_of_the_grouped_softmax():
    scores, own, is_landmark, block = landmark_inputs()
    seen = scores.isfinite()
    leaf = scores.masked_fill(~seen, 0).requires_grad_()

    def run(leaf):
        return grouped_softmax(leaf.masked_fill(~seen, -torch.inf), own, is_landmark, block)

    assert torch.autograd.gradcheck(run, (leaf,))


def loss_of(model, length=40, seed=0, **options):
    ids = random_ids(2, length, seed)
    return model(ids, labels=ids, **options).loss


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("source", ["token", "cls", "mean"])
def test_the_retriever_learns_through_the_weights(source, training):
    """With values cut off, gradients can reach landmarks and queries only through the weights."""
    model = tiny_model(landmark_source=source).train(training)
    loss_of(model, use_cache=False).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("retriever", ["learned", "random", "fixed"])
@pytest.mark.parametrize("fusion", ["gca", "cca"])
def test_only_weights_that_are_used_and_learnt_give_a_gradient(fusion, retriever, monkeypatch):
    model = tiny_model(fusion=fusion, retriever=retriever)
    seen = []
    weigh = chunk_weights

    def watched(scores, chunks):
        seen.append(weigh(scores, chunks))
        if seen[-1].requires_grad:
            seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(retriever_module, "chunk_weights", watched)
    loss_of(model, use_cache=False).backward()
    learns = fusion == "gca" and retriever == "learned"
    assert len(seen) == 2
    for weights in seen:
        assert (weights.grad is not None and bool(weights.grad.abs().max() > 0)) == learns
    norms = [p for name, p in model.named_parameters() if "query_norms" in name]
    assert len(norms) == (2 if retriever == "learned" else 0)
    for parameter in norms:
        assert (parameter.grad is not None and bool(parameter.grad.abs().max() > 0)) == learns
    assert "bag_of_tokens" not in dict(model.named_parameters())


def test_unchosen_chunks_get_no_gradient():
    query, key, value, indices, weights = attention_inputs()
    out = grouped_cross_attention(query, key, value, indices.clamp_max(1), weights)
    grads = torch.autograd.grad(out.sum(), (key, value))
    for grad in grads:
        assert grad[:, :, 2:].abs().max() == 0 < grad[:, :, :2].abs().max()


@pytest.mark.parametrize("retriever", ["learned", "random"])
def test_the_choice_is_noisy_and_seeded_in_training_only(retriever):
    model = tiny_model(retriever=retriever)

    def seeded(seed):
        torch.manual_seed(seed)
        return loss_of(model, use_cache=False).item()

    assert seeded(0) == seeded(1)
    model.train()
    assert seeded(0) == seeded(0)
    assert len({seeded(seed) for seed in range(5)}) > 1
    # evaluation draws nothing at all
    model.eval()
    seeded(3)
    assert same_bits(torch.get_rng_state(), torch.manual_seed(3).get_state())


def test_a_fixed_retriever_has_no_noise():
    model = tiny_model(retriever="fixed").train()
    assert loss_of(model).item() == loss_of(model).item()


def test_noise_touches_the_choice_and_never_the_weights(monkeypatch):
    """With as many places as chunks everything is chosen, and training computes what evaluation does."""
    model = tiny_model(num_retrieved_chunks=8)
    expected = loss_of(model, use_cache=False).item()
    model.train()
    for seed in range(3):
        torch.manual_seed(seed)
        assert abs(loss_of(model).item() - expected) < 1e-12
    # control: noise in what is weighed shows
    weigh = chunk_weights
    monkeypatch.setattr(retriever_module, "chunk_weights", lambda s, c: weigh(s + gumbel_like(s), c))
    assert abs(loss_of(model).item() - expected) > 1e-3


def test_noise_is_gumbel():
    noise = gumbel_like(torch.empty(200_000, dtype=torch.float64, device="cpu"))
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    # the chance to be chosen is the softmax of the scores
    scores = torch.tensor([0.0, 1.0, 2.0])
    chosen = (scores + gumbel_like(scores.expand(50_000, 3))).argmax(1)
    assert (torch.bincount(chosen) / 50_000 - scores.softmax(0)).abs().max() < 0.01


def test_training_with_a_cache_is_refused():
    model = tiny_model().train()
    with pytest.raises(ValueError, match="cache cannot be used in training"):
        past = ChunkMemoryCache(model.config)
        for segment in random_ids(1, 40).split(10, 1):
            model(segment, past_key_values=past)
    assert model(random_ids(1, 40)).past_key_values is None


def by_sorting(scores, asking, k):
    """Return the scores of the k best of each row among candidates i < t, -inf where there are fewer."""
    rows = []
    for row, t in zip(scores, asking, strict=True):
        best = sorted(row[:t].tolist(), reverse=True)[:k]
        rows.append(best + [-math.inf] * (k - len(best)))
    return torch.tensor(rows)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_the_best_chunks_are_the_best_whatever_the_block(data):
    total, k, block = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 13))
    asking = data.draw(st.lists(st.integers(0, total), min_size=1, max_size=4))
    # few values: ties everywhere
    values = st.lists(st.integers(0, 3), min_size=total, max_size=total)
    scores = torch.tensor([data.draw(values) for _ in asking], dtype=torch.float32).view(len(asking), total)
    found = best_chunks(lambda a, b: scores[None, :, a:b], torch.tensor([asking]), total, k, block)[0]
    assert found.shape == (len(asking), k)
    for row, (t, chunks) in enumerate(zip(asking, found.tolist(), strict=True)):
        real = [i for i in chunks if i >= 0]
        assert len(set(real)) == len(real) == min(t, k) and all(i < t for i in real)
        assert chunks[len(real) :] == [-1] * (k - len(real))
        picked = [float(scores[row, i]) for i in real] + [-math.inf] * (k - len(real))
        assert picked == by_sorting(scores[row : row + 1], [t], k)[0].tolist()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_blocks_change_nothing_in_a_model(k, monkeypatch):
    model, ids = tiny_model(num_retrieved_chunks=k, chunk_size=2), random_ids(2, 40)
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr(memory, "best_chunks", lambda *args: best_chunks(*args, block=3))
        assert (model(ids).logits - expected).abs().max() < 1e-12


def test_weights_are_a_softmax_over_what_was_found():
    scores = torch.tensor([[[1.0, 2.0, 7.0], [3.0, 5.0, 5.0], [1.0, 1.0, 1.0]]]).double()
    chunks = torch.tensor([[[4, 0, -1], [-1, -1, -1], [2, 1, 0]]])
    weights = chunk_weights(scores, chunks)[0]
    assert torch.allclose(weights[0, :2], scores[0, 0, :2].softmax(0)) and weights[0, 2] == 0
    assert weights[1].abs().max() == 0
    assert torch.allclose(weights[2], torch.full((3,), 1 / 3, dtype=torch.float64))
    assert chunk_weights(scores.half(), chunks).dtype == torch.float32


def unevenness(scores: torch.Tensor) -> float:
    """Return chi^2 per degree of freedom of how often each of 40 candidates is among the 8 best of 400 draws."""
    counts = torch.bincount(scores.topk(8, dim=1).indices.flatten(), minlength=40).double()
    return float(((counts - 80) ** 2 / (400 * 0.2 * 0.8)).sum() / 39)


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]))


def test_a_random_retriever_is_uniform():
    """Every candidate is as likely as every other, whatever its neighbours, the chunk that asks, or the group."""
    asking, number = torch.arange(40, 440)[None], torch.arange(40)
    scores = [chance(asking, number, group)[0] for group in range(3)]
    for one in scores:
        assert unevenness(one) < 1.7 and abs(float(one.mean()) - 0.5) < 0.01
        assert correlation(one[:-1], one[1:]) < 0.03 and correlation(one[:, :-1], one[:, 1:]) < 0.03
    assert correlation(scores[0], scores[1]) < 0.03
    # control: the same numbers, not mixed
    plain = (asking[0, :, None] * 2654435761 + number * 40503) % (1 << 31) / (1 << 31)
    assert unevenness(plain) > 100 and correlation(plain[:, :-1], plain[:, 1:]) > 0.9


def test_a_random_retriever_weighs_alike_and_differs_by_group():
    model = tiny_model(retriever="random", retrieval_groups=[1, 1])
    past = ChunkMemoryCache(model.config)
    with torch.no_grad():
        model(random_ids(1, 200), past_key_values=past)
    (first, first_weights), (second, _) = past.found
    assert first_weights.tensor[0, -1].tolist() == [0.5, 0.5]
    assert not same_bits(first.tensor, second.tensor)
