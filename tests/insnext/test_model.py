"""One forward pass over an insertion sequence is many small ones, however it is cached, packed, padded or chunked."""

import pytest
import torch
from hypothesis import given, settings

import modeling_insnext.insnext.slot_losses as slot_losses
from modeling_insnext import InsertionCache, InsNextConfig, InsNextForInsertionLM, InsNextModel
from modeling_insnext.insnext.attention import Interval, build_interval
from modeling_insnext.insnext.supervision import Supervision
from tests.support.built_text import build_row, losses_by_state, packed_rows, random_ids, random_text
from tests.support.equality import difference, same_bits
from tests.support.insnext import tiny_model
from tests.support.largest import LargestTensor


BUDGET = 1e-10
CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hidden_of(model, ids, **fields):
    with torch.no_grad():
        return model.model(ids, **{"is_causal": False, **fields}).last_hidden_state


# one pass = many passes


@pytest.mark.parametrize("position_encoding", ["alibi", "sinusoidal"])
@pytest.mark.parametrize("context", [1, 3])
def test_one_pass_equals_one_pass_a_step(context, position_encoding):
    model = tiny_model(position_encoding=position_encoding)
    ids, positions = random_text(9, context, seeded())
    with torch.no_grad():
        interval = build_interval(ids.shape, CPU, positions=positions, context_length=context)
        position, token, _ = losses_by_state(model, ids, interval)
        for step in range(context, 9):
            part = slice(0, step + 1)
            partly = build_interval((1, step + 1), CPU, positions=positions[:, part], context_length=context)
            p, t, _ = losses_by_state(model, ids[:, part], partly)
            assert difference(p[0, step - 1], position[0, step - 1]) < BUDGET
            assert difference(t[0, step - 1], token[0, step - 1]) < BUDGET
            stop = losses_by_state(model, ids[:, part], partly)[0][0, step]
            assert stop > 0
        assert difference(stop, position[0, -1]) < BUDGET


@settings(max_examples=25, deadline=None, derandomize=True)
@given(packed_rows(most_texts=1))
def test_states_of_one_pass_equal_fresh_passes_over_the_partial_texts(row):
    """Blocks included: what a state sees and offers does not depend on what comes later."""
    model, N = tiny_model(), len(row.start)
    ids, positions = random_ids(row, seeded(N)), row.tensors()[0]
    hidden = hidden_of(model, ids, interval=row.interval())
    for state in range(N):
        if row.horizon[state] == state and row.start[state] == 0:
            part = slice(0, state + 1)
            horizon = torch.tensor([row.horizon[: state + 1]])
            fresh = hidden_of(model, ids[:, part], positions=positions[:, part], horizon=horizon)
            assert difference(fresh, hidden[:, part]) < BUDGET


def test_offsets_in_the_final_text_would_break_the_equality(monkeypatch):
    """Control: measured in the final text, what comes later leaks into every earlier state."""
    monkeypatch.setattr(
        "modeling_insnext.insnext.attention.insertion_offsets",
        lambda interval: (
            interval.positions_BK[:, None] - interval.positions_BK.gather(1, interval.entries_BQ)[..., None]
        ),
    )
    model = tiny_model()
    ids, positions = random_text(9, 1, seeded())
    whole = hidden_of(model, ids, positions=positions, context_length=1)
    ranks = positions[:, :5].argsort().argsort()
    part = hidden_of(model, ids[:, :5], positions=ranks, context_length=1)
    assert difference(part, whole[:, :5]) > 1e-3


# caches


@pytest.mark.parametrize("max_length", [None, 12])
@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 2}, {"position_encoding": "sinusoidal"}], ids=str)
@pytest.mark.parametrize("context", [1, 4])
def test_cached_steps_equal_one_full_pass(context, overrides, max_length):
    model = tiny_model(**overrides)
    ids, positions = random_text(11, context, seeded(3))
    whole = hidden_of(model, ids, positions=positions, context_length=context)
    cache = InsertionCache(1, max_length)

    def seen(length):
        known = positions[:, :length].argsort().argsort()
        return known if max_length is None else torch.nn.functional.pad(known, (0, max_length - length))

    steps = [hidden_of(model, ids[:, :context], positions=seen(context), past_key_values=cache)]
    for entry in range(context, 11):
        steps.append(hidden_of(model, ids[:, entry : entry + 1], positions=seen(entry + 1), past_key_values=cache))
        assert cache.lengths.tolist() == [entry + 1]
    assert difference(torch.cat(steps, 1), whole) < BUDGET


def test_cached_blocks_equal_one_full_pass():
    model = tiny_model()
    row = build_row([[[0, 1], [1, 1, 4], [2], [3, 3]]])
    ids, positions = random_ids(row, seeded()), row.tensors()[0]
    whole, cache = hidden_of(model, ids, interval=row.interval()), InsertionCache(1)
    steps, first = [], 0
    for last in (1, 4, 5, 7):
        block = slice(first, last + 1)
        steps.append(hidden_of(model, ids[:, block], positions=positions[:, : last + 1], past_key_values=cache))
        first = last + 1
    assert difference(torch.cat(steps, 1), whole) < BUDGET


def ragged(lengths, context, seed=0):
    texts = [random_text(length, context, seeded(seed + length)) for length in lengths]
    width = max(lengths)
    ids, positions = (
        torch.cat([torch.nn.functional.pad(text[part], (0, width - text[part].shape[1])) for text in texts])
        for part in (0, 1)
    )
    return ids, positions


def ranks_so_far(positions, counts, width):
    """Return, `[B, width]`, where each of a row's first `counts` entries stands among them."""
    out = torch.zeros(len(positions), width, dtype=torch.long)
    for row, count in enumerate(counts):
        out[row, :count] = positions[row, :count].argsort().argsort()
    return out


@pytest.mark.parametrize("max_length", [None, 16])
def test_rows_that_grow_unevenly_equal_rows_alone(max_length):
    model, lengths = tiny_model(), [9, 5, 7]
    ids, positions = ragged(lengths, 2)
    cache, held = InsertionCache(3, max_length), [0, 0, 0]
    got = [[] for _ in lengths]
    for width, counts in ((2, [2, 2, 2]), (1, [1, 0, 1]), (3, [3, 1, 2]), (2, [1, 2, 0]), (2, [2, 0, 2])):
        entries = torch.tensor(held)[:, None] + torch.arange(width)
        mask = torch.arange(width) < torch.tensor(counts)[:, None]
        after = [h + c for h, c in zip(held, counts, strict=True)]
        positions_now = ranks_so_far(positions, after, cache.key_length(width))
        hidden = hidden_of(
            model, ids.gather(1, entries.clamp_max(8)), positions=positions_now, attention_mask=mask,
            horizon=entries if held[0] else None, past_key_values=cache,
        )  # fmt: skip
        for row, count in enumerate(counts):
            got[row].append(hidden[row, :count])
        held = after
        assert cache.lengths.tolist() == held
    assert held == lengths
    for row, length in enumerate(lengths):
        whole = hidden_of(
            model, ids[row : row + 1, :length], positions=positions[row : row + 1, :length], context_length=2
        )
        assert difference(torch.cat(got[row])[None], whole) < BUDGET


@pytest.mark.parametrize("max_length", [None, 12])
def test_a_reencoded_cache_equals_a_fresh_encoding(max_length):
    """crop, overwrite_rows, copy_rows: only row 1 is encoded anew, behind its first two entries."""
    model = tiny_model()
    ids, positions = ragged([8, 8], 3)

    def keys(cache, new):
        return ranks_so_far(positions, [int(n) + new for n in cache.lengths], cache.key_length(new))

    cache = InsertionCache(2, max_length)
    hidden_of(model, ids[:, :3], positions=keys(cache, 3), past_key_values=cache)
    for entry in range(3, 7):
        hidden_of(model, ids[:, entry : entry + 1], positions=keys(cache, 1), past_key_values=cache)
    part = cache.copy_rows(torch.tensor([1]))
    part.crop(torch.tensor([2]))
    assert part.lengths.tolist() == [2] and cache.lengths.tolist() == [7, 7]
    before = [layer.keys.clone() for layer in cache.layers]
    hidden_of(
        model, ids[1:, 2:7], positions=ranks_so_far(positions[1:], [7], part.key_length(5)), past_key_values=part
    )
    assert all(same_bits(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    cache.overwrite_rows(torch.tensor([1]), part)
    step = hidden_of(model, ids[:, 7:8], positions=keys(cache, 1), past_key_values=cache)
    # row 0: context 3, then one by one; row 1: the first two as they were (in the context of three), then a block
    first = hidden_of(model, ids[:1, :8], positions=positions[:1, :8], context_length=3)
    horizon = torch.tensor([[2, 2, 6, 6, 6, 6, 6, 7]])
    second = hidden_of(model, ids[1:, :8], positions=positions[1:, :8], horizon=horizon)
    assert difference(step[:1], first[:, -1:]) < BUDGET
    assert difference(step[1:], second[:, -1:]) < BUDGET
    stale = hidden_of(model, ids[1:, :8], positions=positions[1:, :8], context_length=3)
    assert difference(step[1:], stale[:, -1:]) > 1e-3


def test_selected_rows_of_a_cache_are_the_rows_named():
    model = tiny_model()
    ids, positions = ragged([6, 6, 6], 2)
    cache = InsertionCache(3)
    hidden_of(model, ids[:, :5], positions=ranks_so_far(positions, [5] * 3, 5), past_key_values=cache)
    rows = torch.tensor([2, 0, 0, 1])
    cache.select_rows(rows)
    step = hidden_of(model, ids[rows, 5:], positions=ranks_so_far(positions[rows], [6] * 4, 6), past_key_values=cache)
    for index, row in enumerate(rows.tolist()):
        horizon = torch.tensor([[4, 4, 4, 4, 4, 5]])
        alone = hidden_of(model, ids[row : row + 1], positions=positions[row : row + 1], horizon=horizon)
        assert difference(step[index : index + 1], alone[:, -1:]) < BUDGET


def test_rows_of_a_cache_that_stay_where_they_are_are_not_copied():
    model, cache = tiny_model(), InsertionCache(3)
    ids, positions = ragged([6, 6, 6], 2)
    hidden_of(model, ids[:, :5], positions=ranks_so_far(positions, [5] * 3, 5), past_key_values=cache)
    before = [(layer.keys, layer.keys.clone(), layer.values, layer.values.clone()) for layer in cache.layers]
    rows = torch.tensor([1, 0, 2])
    cache.select_rows(rows)
    for layer, (keys, old_keys, values, old_values) in zip(cache.layers, before, strict=True):
        assert layer.keys is keys and layer.values is values
        for buffer, old in ((keys, old_keys), (values, old_values)):
            assert same_bits(buffer[:, :, :5], old[rows, :, :5])
    # control: where rows are added, all are copied
    cache.select_rows(torch.tensor([0, 1, 2, 2]))
    assert cache.layers[0].keys is not before[0][0] and len(cache.layers[0].keys) == 4


def test_a_full_static_cache_refuses_more():
    model, cache = tiny_model(), InsertionCache(1, 3)
    ids = torch.tensor([[1, 5, 6]])
    hidden_of(model, ids, positions=torch.arange(3)[None], past_key_values=cache)
    fourth = torch.tensor([[3]])
    interval = Interval(torch.arange(4)[None], torch.zeros(1, 1, dtype=torch.long), fourth, fourth)
    with pytest.raises(ValueError, match="the cache holds at most 3 entries a row, got 3 \\+ 1"):
        hidden_of(model, ids[:, :1], past_key_values=cache, interval=interval)
    assert cache.lengths.tolist() == [3]


# batches


@settings(max_examples=25, deadline=None, derandomize=True)
@given(packed_rows())
def test_packed_texts_equal_texts_alone(row):
    model = tiny_model()
    ids, (positions, _, horizon) = random_ids(row, seeded(1)), row.tensors()
    with torch.no_grad():
        position, token, _ = losses_by_state(model, ids, row.interval())
        hidden = hidden_of(model, ids, interval=row.interval())
        for first in sorted(set(row.start)):
            text = [entry for entry in range(len(row.start)) if row.start[entry] == first]
            part = slice(text[0], text[-1] + 1)
            fields = {"positions": positions[:, part], "horizon": horizon[:, part] - first}
            alone = build_interval((1, len(text)), CPU, **fields)
            assert difference(hidden_of(model, ids[:, part], interval=alone), hidden[:, part]) < BUDGET
            p, t, _ = losses_by_state(model, ids[:, part], alone)
            assert difference(p, position[:, part]) < BUDGET
            assert difference(t, token[:, part]) < BUDGET


def test_the_loss_of_a_packed_row_is_the_mean_over_the_tokens_of_its_texts():
    model = tiny_model()
    row = build_row([[[0, 1], [1]], [[0], [1], [1], [2]]], pads=2)
    ids, (positions, start, horizon) = random_ids(row, seeded(1)), row.tensors()
    packed = model(ids, positions=positions, start=start, horizon=horizon, labels=ids)
    alone = [
        model(ids[:, part], positions=positions[:, part], horizon=horizon[:, part] - part.start, labels=ids[:, part])
        for part in (slice(0, 3), slice(3, 7))
    ]
    assert difference(packed.loss, (alone[0].loss + 3 * alone[1].loss) / 4) < BUDGET
    labels = ids[:, :7].masked_fill(start[:, :7] == torch.arange(7), -100)
    leaky = model(ids[:, :7], positions=torch.tensor([[0, 2, 1, 3, 6, 5, 4]]), horizon=horizon[:, :7], labels=labels)
    assert abs(leaky.loss - packed.loss) > 1e-3


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("right", [0, 2])
def test_padding_changes_neither_states_nor_losses(left, right):
    model = tiny_model()
    ids, positions = random_text(7, 3, seeded(5))
    alone = model(ids, positions=positions, context_length=3, labels=ids)
    padded_ids, padded_positions = (torch.nn.functional.pad(x, (left, right)) for x in (ids, positions))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
    padded = model(
        padded_ids, attention_mask=mask, positions=padded_positions, context_length=3,
        labels=padded_ids.masked_fill(mask == 0, -100),
    )  # fmt: skip
    for name in ("loss", "position_loss", "token_loss"):
        assert difference(getattr(padded, name), getattr(alone, name)) < BUDGET
    encoded = hidden_of(model, padded_ids, attention_mask=mask)[:, left : left + 7]
    assert difference(encoded, hidden_of(model, ids)) < BUDGET
    if left + right:
        assert difference(hidden_of(model, padded_ids)[:, left : left + 7], hidden_of(model, ids)) > 1e-3


def test_a_ragged_batch_equals_its_rows_alone():
    model, lengths, contexts = tiny_model(), [9, 4, 6], [3, 1, 2]
    texts = [random_text(n, c, seeded(n)) for n, c in zip(lengths, contexts, strict=True)]
    ids, positions = (
        torch.cat([torch.nn.functional.pad(text[part], (0, 9 - text[part].shape[1])) for text in texts])
        for part in (0, 1)
    )
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    batch = model(
        ids, attention_mask=mask, positions=positions, context_length=torch.tensor(contexts),
        labels=ids.masked_fill(mask == 0, -100),
    )  # fmt: skip
    total = 0.0
    for (row_ids, row_positions), context in zip(texts, contexts, strict=True):
        alone = model(row_ids, positions=row_positions, context_length=context, labels=row_ids)
        total += alone.loss * (row_ids.shape[1] - context)
    assert difference(batch.loss, total / (sum(lengths) - sum(contexts))) < BUDGET


# variants and memory


def test_deepnorm_runs_and_differs():
    ids, positions = random_text(7, 2, seeded())
    losses = []
    for norm in ("rmsnorm", "deepnorm"):
        model = tiny_model(norm=norm)
        out = model(ids, positions=positions, context_length=2, labels=ids)
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        losses.append(out.loss)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_deepnorm_block_follows_its_formula():
    model = tiny_model(InsNextModel, norm="deepnorm")
    block, x = model.layers[0], torch.randn(1, 4, 32, dtype=torch.float64)
    mask = torch.zeros(1, 4, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        h = block.input_layernorm(4**0.25 * x + block.self_attn(x, mask)[0])
        expected = block.post_attention_layernorm(4**0.25 * h + block.mlp(h))
        assert difference(block(x, mask), expected) < BUDGET


def gradients(model, batch, **fields):
    model.zero_grad()
    out = model(**batch, **fields)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def training_batch():
    rows = [
        build_row([[[0, 1], [1], [2]], [[0], [1], [1], [1]]]),
        build_row([[[0, 1, 2], [2], [3], [1], [2]]], pads=1),
    ]
    ids = torch.cat([random_ids(row, seeded(2)) for row in rows])
    positions, start, horizon = (torch.cat(parts) for parts in zip(*(row.tensors() for row in rows), strict=True))
    kinds = torch.zeros_like(ids)
    kinds[:, 2] = 1
    return {
        "input_ids": ids, "positions": positions, "start": start, "horizon": horizon, "labels": ids,
        "target_kinds": kinds, "unit_starts": torch.ones_like(ids, dtype=torch.bool),
    }  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    batch, model = training_batch(), tiny_model().train()
    loss, expected = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    model.model.embed_tokens.requires_grad_(True)
    again, actual = gradients(model, batch)
    assert difference(again, loss) < BUDGET
    for name in expected:
        assert difference(actual[name], expected[name]) < BUDGET, name


def test_losses_in_chunks_equal_losses_at_once(monkeypatch):
    batch, model = training_batch(), tiny_model()
    loss, expected = gradients(model, batch)
    monkeypatch.setattr(slot_losses, "STATES_PER_CHUNK", 3)
    monkeypatch.setattr(slot_losses, "TOKENS_PER_CHUNK", 2)
    again, actual = gradients(model, batch)
    assert difference(again, loss) < BUDGET
    for name in expected:
        assert difference(actual[name], expected[name]) < BUDGET, name


def test_training_holds_no_table_of_all_states_and_slots_or_words(monkeypatch):
    monkeypatch.setattr(slot_losses, "STATES_PER_CHUNK", 16)
    monkeypatch.setattr(slot_losses, "TOKENS_PER_CHUNK", 16)
    n, vocab = 1024, 600
    model = tiny_model(dtype=torch.float32, hidden_size=8, intermediate_size=8, num_attention_heads=1,
                       num_hidden_layers=1, vocab_size=vocab, max_position_embeddings=n)  # fmt: skip
    ids, positions = random_text(n, 1, seeded())
    interval = build_interval(ids.shape, CPU, positions=positions, context_length=1)
    hidden = torch.randn(1, n, 8, requires_grad=True)
    supervision = Supervision(
        ids, target_kinds=torch.ones_like(ids), unit_starts=torch.ones_like(ids, dtype=torch.bool)
    )
    with LargestTensor() as seen:
        losses = slot_losses.insertion_losses(model, hidden, ids, interval, supervision)
        (losses[0].sum() + losses[1].sum()).backward()
    assert seen.largest <= 16 * (2 * n + 1)
    monkeypatch.setattr(slot_losses, "STATES_PER_CHUNK", n)
    with LargestTensor() as seen:
        slot_losses.insertion_losses(model, hidden, ids, interval, supervision)
    assert seen.largest >= n * 2 * n


def test_compiled_forward_equals_eager():
    model = tiny_model(attn="sdpa", num_hidden_layers=1)
    ids, positions = random_text(9, 2, seeded())
    mask = torch.ones_like(ids)
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        fields = {"positions": positions, "context_length": 2}
        expected = model.model(ids, **fields).last_hidden_state
        assert difference(compiled(ids, **fields).last_hidden_state, expected) < BUDGET
        logits = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, attention_mask=mask).logits
        assert difference(logits, model(ids).logits) < BUDGET


@pytest.mark.slow
def test_inductor_forward_equals_eager():
    model = tiny_model(attn="sdpa", num_hidden_layers=1)
    ids, positions = random_text(9, 2, seeded())
    with torch.no_grad():
        assert difference(torch.compile(model, fullgraph=True)(ids).logits, model(ids).logits) < BUDGET


# sizes


def parameters_by_formula(config):
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    kv_width = config.num_key_value_heads * config.head_dim
    block = 2 * D * D + 2 * D * kv_width + 3 * D * F + 2 * D
    slot_head = 5 * D * D + D + 2 * D
    return V * D + L * block + D + slot_head


@pytest.mark.parametrize(("preset", "count"), [("base", 154_826_496), ("advanced", 574_227_072)])
def test_presets_have_the_printed_number_of_parameters(preset, count):
    config = InsNextConfig.preset(preset)
    with torch.device("meta"):
        model = InsNextForInsertionLM(config)
    model.tie_weights()
    assert model.num_parameters() == parameters_by_formula(config) == count


def test_grouped_heads_and_untied_embeddings_change_the_count_by_their_size():
    for overrides, more in (({"num_key_value_heads": 1}, -2 * 2 * 32 * 24), ({"tie_word_embeddings": False}, 23 * 32)):
        assert tiny_model(**overrides).num_parameters() - tiny_model().num_parameters() == more


# what the training fields mean


def test_labels_of_minus_100_leave_a_token_out_of_both_losses():
    model = tiny_model()
    ids, positions = random_text(8, 2, seeded())
    interval = build_interval(ids.shape, CPU, positions=positions, context_length=2)
    position, token, _ = losses_by_state(model, ids, interval)
    labels = ids.clone()
    labels[0, [3, 6]] = -100
    kept = [1, 3, 4, 6]
    out = model(ids, positions=positions, context_length=2, labels=labels)
    assert difference(out.token_loss, token[0, kept].sum() / 4) < BUDGET
    assert difference(out.position_loss, position[0, [*kept, 7]].sum() / 4) < BUDGET
    assert difference(out.loss, out.position_loss + out.token_loss) < BUDGET


def test_step_weights_weigh_the_loss_and_leave_what_is_logged_alone():
    model = tiny_model()
    ids, positions = random_text(6, 2, seeded())
    interval = build_interval(ids.shape, CPU, positions=positions, context_length=2)
    position, token, _ = losses_by_state(model, ids, interval)
    plain = model(ids, positions=positions, context_length=2, labels=ids)
    weights = torch.tensor([[9.0, 9.0, 0.5, 2.0, 0.0, 3.0]])
    out = model(ids, positions=positions, context_length=2, labels=ids, step_weights=weights)
    each = (position + token)[0]
    expected = (0.5 * each[1] + 2 * each[2] + 0 * each[3] + 3 * each[4] + each[5]) / 4
    assert difference(out.loss, expected) < BUDGET
    assert out.position_loss == plain.position_loss and out.token_loss == plain.token_loss


def test_stop_is_trained_where_stop_targets_say_so_and_nowhere_else():
    model = tiny_model()
    row = build_row([[[0], [1], [1]], [[0], [1]]], pads=1)
    ids, interval, N = random_ids(row, seeded()), row.interval(), 6
    default = losses_by_state(model, ids, interval)[0][0]
    assert [bool(x) for x in default > 0] == [True, True, True, True, True, False]
    for ends in ([2, 4], [4], []):
        targets = torch.zeros(1, N, dtype=torch.bool)
        targets[0, ends] = True
        position = losses_by_state(model, ids, interval, stop_targets=targets)[0][0]
        expected = default.clone()
        expected[[state for state in (2, 4) if state not in ends]] = 0
        assert difference(position, expected) == 0
    early = torch.zeros(1, N, dtype=torch.bool)
    early[0, 1] = True  # not the end of a text
    assert losses_by_state(model, ids, interval, stop_targets=early)[0][0][1] == default[1]


def test_num_items_in_batch_divides_the_loss():
    model = tiny_model()
    ids, positions = random_text(6, 2, seeded())
    fields = {"positions": positions, "context_length": 2, "labels": ids}
    assert difference(model(ids, **fields, num_items_in_batch=8).loss, model(ids, **fields).loss / 2) < BUDGET
    assert difference(model(ids, labels=ids, num_items_in_batch=10).loss, model(ids, labels=ids).loss / 2) < BUDGET


def test_a_batch_without_anything_supervised_has_loss_zero_and_gradients():
    model = tiny_model()
    ids, positions = random_text(6, 2, seeded())
    out = model(ids, positions=positions, context_length=2, labels=torch.full_like(ids, -100),
                stop_targets=torch.zeros_like(ids, dtype=torch.bool))  # fmt: skip
    out.loss.backward()
    assert out.loss == 0
