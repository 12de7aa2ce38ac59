"""The batch, column by column, against a plain Python account of the text it describes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modeling_insnext.data import ContextMixture, InsertionCollator, first_fit
from tests.support.equality import same_bits


PAD, BOS, EOS = 0, 1, 2
DTYPES = {
    "input_ids": torch.int64,
    "positions": torch.int64,
    "start": torch.int64,
    "horizon": torch.int64,
    "labels": torch.int64,
    "stop_targets": torch.bool,
    "target_kinds": torch.int64,
    "unit_starts": torch.bool,
    "step_weights": torch.float32,
}
MIXED = ContextMixture(words=0.3, spans=0.2, prefix=0.2, reencode=0.4, windowed=0.4)
WORD_STARTS = np.arange(50) % 3 > 0


def make_collator(**options):
    return InsertionCollator(**{"pad_token_id": PAD, "contexts": MIXED, "word_starts": WORD_STARTS} | options)


def make_texts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [{"input_ids": [BOS, *rng.integers(3, 50, size=length - 1).tolist()]} for length in lengths]


def split_texts(batch):
    """Cut the rows into texts, with start and horizon from the text's own beginning; pads left out."""
    out = []
    for row in range(len(batch["input_ids"])):
        columns = {name: values[row].tolist() for name, values in batch.items()}
        ends = np.flatnonzero(np.diff(columns["start"], append=-1)) + 1
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            text = {name: values[start:end] for name, values in columns.items()}
            if text["step_weights"][0] or len(text["start"]) > 1:
                text["start"] = [i - start for i in text["start"]]
                text["horizon"] = [i - start for i in text["horizon"]]
                out.append(text)
    return out


def same_texts(left, right):
    return sorted(map(str, split_texts(left))) == sorted(map(str, split_texts(right)))


def equal(left, right):
    return same_bits(left, right)


def test_the_picture_of_the_docstring():
    text = {"input_ids": [1, 10, 12, 13, 11], "given": [0, 1, 0, 0, 1]}
    table = np.ones(20, dtype=bool)
    table[13] = False
    batch = InsertionCollator(PAD, word_starts=table, pad_to_multiple_of=3)([text])
    expected = {
        "input_ids": [1, 10, 11, 12, 13, PAD],
        "positions": [0, 1, 4, 2, 3, 0],
        "start": [0, 0, 0, 0, 0, 5],
        "horizon": [2, 2, 2, 3, 4, 5],
        "labels": [-100, -100, -100, 12, 13, -100],
        "stop_targets": [False] * 4 + [True, False],
        "target_kinds": [0, 0, 0, 1, 0, 0],
        "unit_starts": [True, True, True, True, False, False],
        "step_weights": [1.0] * 5 + [0.0],
    }
    assert {name: values[0].tolist() for name, values in batch.items()} == expected
    assert {name: values.dtype for name, values in batch.items()} == DTYPES


@given(
    st.lists(st.integers(1, 14), min_size=1, max_size=6),
    st.sampled_from(["uniform", "left_to_right", "binary_tree", {"gap_left_to_right": 0.6, "uniform": 0.4}]),
    st.sampled_from([None, 14, 20]),
    st.integers(0, 99),
)
@settings(deadline=None)
def test_blocks_horizons_and_labels(lengths, order, pack_to, seed):
    features = make_texts(lengths, seed)
    batch = make_collator(order=order, pack_to=pack_to, seed=seed, context_step_weight=3.0)(features)
    texts = split_texts(batch)
    assert sorted(tuple(np.array(text["input_ids"])[np.argsort(text["positions"])]) for text in texts) == sorted(
        tuple(feature["input_ids"]) for feature in features
    )
    for text in texts:
        size, horizon = len(text["start"]), text["horizon"]
        assert sorted(text["positions"]) == list(range(size))
        assert text["positions"][0] == 0
        assert text["start"] == [0] * size
        assert horizon == sorted(horizon)
        assert all(horizon[i] >= i and horizon[horizon[i]] == horizon[i] for i in range(size))
        label = next((i for i in range(size) if text["labels"][i] != -100), size)
        assert text["labels"] == [-100] * label + text["input_ids"][label:]
        assert horizon[label:] == list(range(label, size))
        assert len(set(horizon[:label])) in (1, 2)
        assert text["stop_targets"] == [False] * (size - 1) + [True]
        assert not any(text["target_kinds"][:label])
        assert text["step_weights"] == [3.0 if i == label > 1 else 1.0 for i in range(size)]


def test_blocks_hold_the_context_in_text_order_then_the_written_in_order_of_writing():
    feature = make_texts([30])[0] | {"given": np.arange(30) % 5 == 0}
    order = {"binary_tree": 1}
    plain = make_collator(order=order, contexts=ContextMixture())([feature])
    assert plain["horizon"][0].tolist() == [5] * 6 + list(range(6, 30))
    assert plain["positions"][0, :6].tolist() == [0, 5, 10, 15, 20, 25]
    seen = set()
    for seed in range(40):
        struck = make_collator(order=order, contexts=ContextMixture(reencode=0.5, windowed=0.5), seed=seed)([feature])
        assert same_bits(struck["positions"], plain["positions"])
        blocks = sorted(set(struck["horizon"][0].tolist()))
        seen.add((blocks[0], *blocks[1:2]))
    assert len(seen) > 20


def test_reencoding_strikes_inside_words():
    contexts = ContextMixture(reencode=1.0)
    batches = [make_collator(contexts=contexts, seed=seed)(make_texts([12])) for seed in range(30)]
    first_labels = [(batch["labels"][0] != -100).int().argmax() for batch in batches]
    assert {bool(batch["unit_starts"][0, i]) for batch, i in zip(batches, first_labels, strict=True)} == {True, False}


def test_packing_gives_the_same_texts_isolated():
    features = make_texts([9, 4, 12, 1, 7, 3, 12, 5])
    packed, single = make_collator(pack_to=16)(features), make_collator()(features)
    assert packed["input_ids"].shape == (4, 16)
    assert same_texts(packed, single)
    assert not same_texts(packed, make_collator(seed=1)(features))


def test_a_text_does_not_depend_on_its_batch():
    features = make_texts([9, 4, 12])
    assert same_texts(make_collator()(features), make_collator()(features[::-1]))
    alone = make_collator()(features[:1])
    assert split_texts(alone)[0] in split_texts(make_collator()(features))


def test_equal_texts_in_a_batch_get_different_draws():
    texts = split_texts(make_collator(order="uniform", contexts=ContextMixture())(make_texts([20]) * 4))
    assert len({tuple(text["positions"]) for text in texts}) == 4


def test_first_fit_takes_the_first_row_with_room():
    assert first_fit([5, 4, 3, 2, 1], 8) == [(0, 0), (1, 0), (0, 5), (1, 4), (1, 6)]
    with pytest.raises(ValueError, match="fit into a row of 4 tokens, got 5"):
        first_fit([5], 4)


def test_padding_to_a_multiple():
    assert make_collator(pad_to_multiple_of=8)(make_texts([9]))["input_ids"].shape == (1, 16)
    assert make_collator(pad_to_multiple_of=8, pack_to=12)(make_texts([9]))["input_ids"].shape == (1, 16)
    assert make_collator(pad_to_multiple_of=8)(make_texts([8]))["input_ids"].shape == (1, 8)


def test_bos_is_put_in_front_and_eos_taken_off():
    collator = make_collator(bos_token_id=BOS, eos_token_id=EOS, contexts=ContextMixture())
    raw = {"input_ids": [7, 8, 9, EOS], "given": [True, False, False, False], "keywords": [0, 0, 1, 0]}
    with_bos = {"input_ids": [BOS, 7, 8, 9], "given": [True, True, False, False], "keywords": [0, 0, 0, 1]}
    assert equal(collator([raw]), collator([with_bos]))


def test_incomplete_and_truncated_texts_have_no_stop():
    feature = make_texts([9])[0]
    assert not make_collator()([feature | {"complete": False}])["stop_targets"].any()
    for options in ({"max_length": 5}, {"pack_to": 5}):
        batch = make_collator(truncate=True, **options)([feature | {"given": np.arange(9) > 3}])
        assert not batch["stop_targets"].any()
        assert sorted(batch["input_ids"][0].tolist()) == sorted(feature["input_ids"][:5])
    assert make_collator(truncate=True, max_length=9)([feature])["stop_targets"].any()


def test_a_text_of_bos_alone_asks_for_stop():
    batch = make_collator()([{"input_ids": [BOS]}])
    assert batch["stop_targets"].tolist() == [[True]]
    assert batch["labels"].tolist() == [[-100]]


def test_tensors_arrays_and_lists_are_read_alike_and_left_alone():
    tokens, flags = [1, 7, 8, 9, 4], [0, 0, 1, 0, 1]
    batches = []
    for convert in (list, np.array, torch.tensor):
        feature = {"input_ids": convert(tokens), "given": convert(flags), "text": "ignored"}
        batches.append(make_collator(bos_token_id=BOS)([feature]))
        assert list(feature["input_ids"]) == tokens
        assert list(feature["given"]) == flags
    assert equal(batches[0], batches[1])
    assert equal(batches[0], batches[2])


def test_rarity_and_sentences_reach_the_orders():
    rarity = np.arange(50.0)
    options = {"word_starts": None, "contexts": ContextMixture()}
    batch = make_collator(order="keyword_first", token_rarity=rarity, **options)([{"input_ids": [1, 5, 9, 4, 8]}])
    assert batch["input_ids"][0, 1] == 9
    batch = make_collator(order="sentence_local", sentence_ends=np.arange(50) == 9, **options)(
        [{"input_ids": [1, 5, 9, 4, 8]}]
    )
    assert sorted(batch["positions"][0, 1:3].tolist()) == [1, 2]
    assert batch["target_kinds"].tolist() == [[0, 0, 0, 1, 1]]


def test_draws_are_a_function_of_seed_and_epoch():
    features = make_texts([20, 20, 5])
    first, again, other = make_collator(), make_collator(), make_collator(seed=1)
    assert equal(first(features), first(features))
    assert equal(first(features), again(features))
    assert not same_texts(first(features), other(features))
    first.set_epoch(3)
    assert not same_texts(first(features), again(features))
    again.set_epoch(3)
    assert equal(first(features), again(features))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_make_the_same_batches_in_every_epoch(persistent):
    features = make_texts([6] * 6)
    there, here = make_collator(), make_collator()
    workers = DataLoader(
        features, batch_size=2, collate_fn=there, num_workers=2, persistent_workers=persistent, prefetch_factor=1
    )
    alone = DataLoader(features, batch_size=2, collate_fn=here)
    epochs = []
    for epoch in range(2):
        there.set_epoch(epoch)
        here.set_epoch(epoch)
        epochs.append(list(workers))
        assert all(equal(left, right) for left, right in zip(epochs[-1], alone, strict=True))
    assert not any(map(equal, *epochs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "unifrom"}, "order must be one of .*, got 'unifrom'"),
        ({"pack_to": 0}, "pack_to must be at least 1, got 0"),
        ({"max_length": -1}, "max_length must be at least 1, got -1"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1, got 0"),
        ({"truncate": True}, "truncate=True needs max_length or pack_to, got neither"),
        ({"context_step_weight": -1.0}, "context_step_weight must be finite and at least 0, got -1.0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"word_starts": np.ones(3)}, r"word_starts must be a boolean table \[V\], got float64 \(3,\)"),
        ({"sentence_ends": np.ones((3, 1), bool)}, r"sentence_ends must be a boolean table \[V\], got bool \(3, 1\)"),
        ({"token_rarity": np.arange(3)}, r"token_rarity must be a float table \[V\], got int64 \(3,\)"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_collator(**options)


@pytest.mark.parametrize(
    ("options", "feature", "error", "message"),
    [
        ({}, {"input_ids": []}, ValueError, "at least one token .BOS., got 0"),
        ({}, {"tokens": [1]}, ValueError, r"a feature needs input_ids, got \['tokens'\]"),
        ({}, {"input_ids": [1.0, 2.0]}, TypeError, "one list of integers, got float64"),
        ({}, {"input_ids": [[1, 2]]}, TypeError, r"one list of integers, got int64 of shape \(1, 2\)"),
        ({}, {"input_ids": [1, -3]}, ValueError, "token ids must be at least 0, got -3"),
        ({}, {"input_ids": [1, 60]}, ValueError, r"token ids must be in \[0, 50\), got 1 to 60"),
        ({}, {"input_ids": [1, 3], "given": [1]}, ValueError, r"given needs one flag per token, 2, got \(1,\)"),
        ({}, {"input_ids": [1, 3], "keywords": [1] * 3}, ValueError, r"keywords needs one flag per token, 2, got"),
        ({"max_length": 2}, {"input_ids": [1, 3, 4]}, ValueError, "at most 2 tokens .max_length, pack_to., got 3"),
        ({"pack_to": 2}, {"input_ids": [1, 3, 4]}, ValueError, "at most 2 tokens .max_length, pack_to., got 3"),
        ({}, {"input_ids": [1, 3, PAD]}, ValueError, "pad_token_id is never written, .* got 0 at index 2 of a text"),
        ({"eos_token_id": EOS}, {"input_ids": [1, EOS, 3]}, ValueError, "eos_token_id is never written, .* got 2"),
        ({"bos_token_id": BOS}, {"input_ids": [1, 3, BOS]}, ValueError, "bos_token_id is never written, .* got 1"),
    ],
)
def test_bad_features_are_refused(options, feature, error, message):
    with pytest.raises(error, match=message):
        make_collator(**options)([feature])


def test_an_empty_batch_and_a_negative_epoch_are_refused():
    with pytest.raises(ValueError, match="at least one text, got 0 features"):
        make_collator()([])
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        make_collator().set_epoch(-1)


def test_given_special_tokens_are_allowed():
    batch = make_collator(eos_token_id=EOS)([{"input_ids": [1, EOS, 3], "given": [1, 1, 0]}])
    assert batch["input_ids"][0, :2].tolist() == [1, EOS]
