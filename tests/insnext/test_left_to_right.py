"""Left to right InsNeXt is an ordinary causal language model whose EOS column says STOP."""

import pytest
import torch
from transformers import DynamicCache

from modeling_insnext import InsertionCache
from tests.support.equality import difference, same_bits
from tests.support.insnext import EOS, PAD, tiny_model


BUDGET = 1e-10


def some_ids(batch=2, length=7, seed=0):
    ids = torch.randint(3, 23, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids


def log_p(model, ids, **fields):
    with torch.no_grad():
        return model(ids, **fields).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_sum_to_one(dtype):
    total = log_p(tiny_model(dtype=dtype), some_ids()).exp().sum(-1)
    assert difference(total, torch.ones_like(total)) < (BUDGET if dtype == torch.float64 else 23 * 2**-23)


def test_probabilities_without_stop_would_not_sum_to_one():
    probabilities = log_p(tiny_model(), some_ids()).exp()
    assert (1 - probabilities.sum(-1) + probabilities[..., EOS] > 1e-4).all()


def test_logits_equal_the_formula_written_as_loops():
    model, ids = tiny_model(), some_ids(1, 5)
    head = model.slot_head
    logits = log_p(model, ids)[0]
    with torch.no_grad():
        for t in range(5):
            state = model.model(ids[:, : t + 1], context_length=1).last_hidden_state[0, -1]
            u = head.left_proj.weight @ state + head.right_proj.weight @ head.edge
            query = head.query_proj.weight @ state
            slot, stop = (
                30 * torch.tanh(query @ key / 32**0.5 / 30) for key in (head.key_proj.weight @ u, head.stop_key)
            )
            x = u + head.state_proj.weight @ state
            x = head.norm.weight * x / (x.square().mean() + 1e-6).sqrt()
            scores = model.model.embed_tokens.weight @ x
            words = {v: torch.exp(scores[v]) for v in range(23) if v not in (0, 1, 2)}
            p_slot = torch.exp(slot) / (torch.exp(slot) + torch.exp(stop))
            for v in range(23):
                if v in words:
                    expected = (p_slot * words[v] / sum(words.values())).log()
                else:
                    expected = (1 - p_slot).log() if v == EOS else torch.tensor(-torch.inf, dtype=torch.float64)
                assert difference(logits[t, v], expected) < BUDGET


def test_later_tokens_change_no_earlier_logits():
    model, ids = tiny_model(), some_ids()
    other = ids.clone()
    other[:, 4:] = 3
    assert difference(log_p(model, other)[:, :4], log_p(model, ids)[:, :4]) == 0
    assert difference(log_p(model, other)[:, 4:], log_p(model, ids)[:, 4:]) > 1e-3


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2), (2, 1)])
def test_padding_changes_no_logits(left, right):
    model, ids = tiny_model(), some_ids()
    padded, mask = (torch.nn.functional.pad(x, (left, right)) for x in (ids, torch.ones_like(ids)))
    logits = log_p(model, padded, attention_mask=mask)[:, left : left + 7]
    assert difference(logits, log_p(model, ids)) < BUDGET
    if left:
        assert difference(log_p(model, padded)[:, left : left + 7], log_p(model, ids)) > 1e-3


@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 1}, {"position_encoding": "sinusoidal"}], ids=str)
@pytest.mark.parametrize(
    "make_cache", [lambda: DynamicCache(), lambda: InsertionCache(2)], ids=["dynamic", "insertion"]
)
def test_cached_steps_equal_one_pass(overrides, make_cache):
    model, ids, cache = tiny_model(**overrides), some_ids(), make_cache()
    parts = [log_p(model, ids[:, part], past_key_values=cache) for part in (slice(0, 3), slice(3, 4), slice(4, 7))]
    assert difference(torch.cat(parts, 1), log_p(model, ids)) < BUDGET


def test_cached_steps_of_left_padded_rows_equal_rows_alone():
    model, ids = tiny_model(), some_ids(1)
    padded, mask = (torch.nn.functional.pad(x, (3, 0)) for x in (ids, torch.ones_like(ids)))
    cache, parts = DynamicCache(), []
    for first, last in ((0, 5), (5, 6), (6, 10)):
        parts.append(log_p(model, padded[:, first:last], attention_mask=mask[:, :last], past_key_values=cache))
    assert difference(torch.cat(parts, 1)[:, 3:], log_p(model, ids)) < BUDGET


def test_a_cache_is_returned_when_asked_for():
    model, ids = tiny_model(), some_ids()
    with torch.no_grad():
        assert model(ids, use_cache=False).past_key_values is None
        cache = model(ids[:, :6], use_cache=True).past_key_values
    assert cache.get_seq_length() == 6
    assert difference(log_p(model, ids[:, 6:], past_key_values=cache), log_p(model, ids)[:, 6:]) < BUDGET


def test_the_loss_is_the_mean_negative_log_likelihood_of_the_labels():
    model, ids = tiny_model(), some_ids()
    ids[:, -1] = EOS
    labels = ids.clone()
    labels[0, 2] = -100
    logits = log_p(model, ids)
    terms = [-logits[b, t - 1, labels[b, t]] for b in range(2) for t in range(1, 7) if labels[b, t] != -100]
    assert len(terms) == 11
    assert difference(model(ids, labels=labels).loss, sum(terms) / 11) < BUDGET


def test_logits_to_keep_keeps_the_last_or_the_named():
    model, ids = tiny_model(), some_ids()
    whole = log_p(model, ids)
    assert difference(log_p(model, ids, logits_to_keep=2), whole[:, -2:]) < BUDGET
    assert difference(log_p(model, ids, logits_to_keep=torch.tensor([1, 4])), whole[:, [1, 4]]) < BUDGET
    assert log_p(model, ids, logits_to_keep=0).shape == whole.shape


def greedy_by_hand(model, prompt, new_tokens):
    text = prompt.clone()
    for _ in range(new_tokens):
        token = log_p(model, text[None])[0, -1].argmax()
        text = torch.cat([text, token[None]])
        if token == EOS:
            break
    return text


@pytest.mark.parametrize("seed", range(4))
def test_greedy_generation_equals_an_argmax_loop(seed):
    model = tiny_model(seed=seed)
    prompt = some_ids(1, 4, seed)
    out = model.generate(prompt, left_to_right=True, do_sample=False, max_new_tokens=8)
    assert out[0].tolist() == greedy_by_hand(model, prompt[0], 8).tolist()


def test_generation_stops_at_stop():
    model = tiny_model()
    with torch.no_grad():
        model.slot_head.stop_key.copy_(100 * model.slot_head.query_proj(log_state(model)))
    out = model.generate(some_ids(1, 4), left_to_right=True, do_sample=False, max_new_tokens=8)
    assert out.shape[1] == 5 and out[0, -1] == EOS


def log_state(model):
    return model.model(some_ids(1, 4), context_length=1).last_hidden_state[0, -1]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_batch_generates_what_its_rows_generate_alone(use_cache):
    model = tiny_model(seed=1)
    prompts = [some_ids(1, length, length)[0] for length in (5, 2, 4)]
    ids = torch.stack([torch.nn.functional.pad(prompt, (5 - len(prompt), 0), value=PAD) for prompt in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (5 - len(p), 0)) for p in prompts])
    batch = model.generate(
        ids, attention_mask=mask, left_to_right=True, do_sample=False, max_new_tokens=7, use_cache=use_cache
    )
    for row, prompt in enumerate(prompts):
        expected = greedy_by_hand(model, prompt, 7).tolist()
        got = batch[row, 5 - len(prompt) :].tolist()
        assert got[: len(expected)] == expected
        assert set(got[len(expected) :]) <= {PAD}


def test_a_static_cache_generates_the_same_tokens():
    model, options = tiny_model(seed=1), {"left_to_right": True, "do_sample": False, "max_new_tokens": 6}
    ids = torch.tensor([[0, 0, 1, 5, 6], [1, 7, 8, 9, 4]])
    mask = (ids != PAD).long()
    expected = model.generate(ids, attention_mask=mask, **options)
    assert same_bits(model.generate(ids, attention_mask=mask, cache_implementation="static", **options), expected)


def test_beams_find_the_likeliest_of_all_short_texts():
    model = tiny_model(vocab_size=6, seed=3)
    prompt = torch.tensor([[1, 4]])
    out = model.generate(
        prompt, left_to_right=True, num_beams=40, do_sample=False, max_new_tokens=3, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True, early_stopping="never",
    )  # fmt: skip
    best = (-torch.inf, None)
    for first in (2, 3, 4, 5):
        for second in (2, 3, 4, 5):
            for third in (2, 3, 4, 5):
                text = [first, second, third]
                text = text[: text.index(EOS) + 1] if EOS in text else text
                ids = torch.tensor([[1, 4, *text]])
                score = log_p(model, ids)[0, 1:-1].gather(1, torch.tensor(text)[:, None]).sum()
                best = max(best, (float(score), text), key=lambda pair: pair[0])
    assert out.sequences[0, 2 : 2 + len(best[1])].tolist() == best[1]
    assert float(out.sequences_scores[0]) == pytest.approx(best[0], abs=1e-5)


def test_sampling_draws_from_the_logits():
    model = tiny_model(vocab_size=6)
    prompt = torch.tensor([[1, 4]])
    probabilities = log_p(model, prompt)[0, -1].exp()
    torch.manual_seed(0)
    out = model.generate(prompt.repeat(4000, 1), left_to_right=True, do_sample=True, top_k=0, max_new_tokens=1)
    counts = torch.bincount(out[:, 2], minlength=6).double()
    expected = 4000 * probabilities
    assert counts[[0, 1]].sum() == 0
    chi_square = ((counts - expected)[2:] ** 2 / expected[2:]).sum()
    assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001
