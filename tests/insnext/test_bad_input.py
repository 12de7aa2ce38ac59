"""Bad input gets a `ValueError` that names the rule and the value, before any work."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_insnext import InsertionCache, InsNextConfig, InsNextForInsertionLM, InsNextModel
from modeling_insnext.insnext.attention import build_interval
from tests.support.equality import same_bits
from tests.support.insnext import tiny_model


IDS = torch.tensor([[1, 5, 6, 7]])
RANKS = torch.tensor([[0, 2, 1, 3]])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_position_embeddings=8)


def rows(*values):
    return torch.tensor([list(values)])


INTERVALS = {
    "horizon below the query": (
        {"positions": RANKS, "horizon": rows(0, 1, 1, 3)},
        "horizon must not lie below the query, got 1 for query 2 of row 0",
    ),
    "horizon behind the last key": (
        {"positions": RANKS, "horizon": rows(0, 1, 2, 4)},
        r"horizon must lie inside the keys, got 4 for query 3 of row 0 \(4 keys\)",
    ),
    "start above the query": (
        {"positions": RANKS, "start": rows(0, 2, 2, 2)},
        "start must not lie above the query, got 2 for query 1 of row 0",
    ),
    "negative start": ({"positions": RANKS, "start": rows(-1, 0, 0, 0)}, "start must not be negative, got -1"),
    "ties": (
        {"positions": rows(0, 2, 1, 2)},
        "positions of one text must differ, got 2 for both token 1 and token 3 of row 0",
    ),
    "ties in a packed row": (
        {"positions": rows(0, 1, 0, 0), "start": rows(0, 0, 2, 2), "horizon": rows(0, 1, 2, 3)},
        "positions of one text must differ, got 0 for both token 2 and token 3 of row 0",
    ),
    "mask with a hole": (
        {"attention_mask": rows(1, 0, 1, 1)},
        r"ones of an attention_mask row must form one run, got 2 runs in row 0: \[1, 0, 1, 1\]",
    ),
    "empty mask": ({"attention_mask": rows(0, 0, 0, 0)}, "must form one run, got 0 runs in row 0"),
    "mask of another shape": ({"attention_mask": rows(1, 1, 1)}, r"attention_mask must be \[1, 4\], got \[1, 3\]"),
    "positions of another shape": (
        {"positions": rows(0, 1, 2)},
        r"positions must cover cached and new tokens, \[1, 4\], got \[1, 3\]",
    ),
    "start of another shape": ({"positions": RANKS, "start": rows(0, 0)}, r"start must be \[1, 4\], .*, got \[1, 2\]"),
    "horizon of another shape": (
        {"positions": RANKS, "horizon": torch.arange(4)},
        r"horizon must be \[1, 4\], .*, got \[4\]",
    ),
    "positions that are no integers": (
        {"positions": RANKS.double()},
        "positions must be integers, got torch.float64",
    ),
    "contexts of other rows": (
        {"positions": RANKS, "context_length": torch.tensor([1, 2])},
        r"context_length must be one integer or one for each of the 1 rows, got \[1, 2\]",
    ),
    "negative context": (
        {"positions": RANKS, "context_length": -1},
        r"context_length must be at least 1 \(BOS\), got -1",
    ),
    "context_length and horizon": (
        {"positions": RANKS, "context_length": 1, "horizon": rows(0, 1, 2, 3)},
        "context_length and horizon exclude each other, got both",
    ),
    "context longer than the text": (
        {"positions": RANKS, "context_length": 5},
        "horizon must lie inside the keys, got 4 for query 0",
    ),
    "context longer than a padded text": (
        {"positions": rows(0, 1, 0, 0), "attention_mask": rows(1, 1, 0, 0), "context_length": 3},
        r"horizon \(or context_length\) must not reach beyond the text, got horizon 2 for query 0 of row 0",
    ),
    "context longer than a packed text": (
        {"positions": rows(0, 0, 1, 2), "start": rows(0, 1, 1, 1), "context_length": 2},
        r"horizon \(or context_length\) must not reach beyond the text, got horizon 1 for query 0 of row 0",
    ),
    "horizon in another text": (
        {"positions": rows(0, 1, 0, 1), "start": rows(0, 0, 2, 2), "horizon": rows(0, 3, 2, 3)},
        r"horizon \(or context_length\) must not reach beyond the text, got horizon 3 for query 1 of row 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), INTERVALS.values(), ids=INTERVALS)
def test_what_is_no_text_is_refused_before_any_work(model, monkeypatch, fields, message):
    monkeypatch.setattr(InsNextModel, "_prepare", lambda *args: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        model(IDS, **fields)
    with pytest.raises(ValueError, match=message):
        model.model(IDS, is_causal=False, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": RANKS, "horizon": rows(1, 1, 2, 3)},
        {"positions": rows(0, 1, 0, 1), "start": rows(0, 0, 2, 2), "horizon": rows(0, 1, 3, 3)},
        {"positions": rows(0, 1, 5, 5), "attention_mask": rows(1, 1, 0, 0), "context_length": 2},
        {"attention_mask": rows(0, 1, 1, 0)},
        {"positions": rows(-4, 90, 2, 3)},
    ],
    ids=str,
)
def test_what_is_a_text_passes(model, fields):
    """Control: each refused input has a neighbour that is none."""
    assert model.model(IDS, is_causal=False, **fields).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(("token", "named"), [(23, 23), (-1, -1)])
def test_ids_out_of_the_vocabulary_are_refused(model, token, named):
    for fields in ({}, {"positions": RANKS}):
        with pytest.raises(ValueError, match=rf"ids must be in the model's vocabulary \[0, 23\), got {named}"):
            model(torch.tensor([[1, 5, token, 7]]), **fields)


def test_a_text_longer_than_the_model_is_refused(model):
    assert model(torch.ones(1, 8, dtype=torch.long)).logits.shape[1] == 8
    with pytest.raises(ValueError, match="at most max_position_embeddings=8 tokens, got 9"):
        model(torch.ones(1, 9, dtype=torch.long))
    cache = DynamicCache()
    model(torch.ones(1, 8, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="at most max_position_embeddings=8 tokens, got 9"):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_a_batch_without_tokens_is_refused(model, shape):
    with pytest.raises(ValueError, match=r"there must be at least one token, got input of shape \[\d, \d\]"):
        model(torch.zeros(shape, dtype=torch.long))


def test_ids_and_embeddings_exclude_each_other(model):
    embeddings = torch.zeros(1, 4, 32, dtype=torch.float64)
    for fields in ({}, {"input_ids": IDS, "inputs_embeds": embeddings}):
        for part in (model, model.model):
            with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given"):
                part(**fields)


@pytest.mark.parametrize("name", ["stop_targets", "target_kinds", "unit_starts", "step_weights"])
def test_training_fields_need_positions(model, name):
    with pytest.raises(ValueError, match="need positions, got None"):
        model(IDS, labels=IDS, **{name: torch.zeros_like(IDS)})


def test_target_kinds_need_unit_starts(model):
    with pytest.raises(ValueError, match="target_kinds need unit_starts, got None"):
        model(IDS, positions=RANKS, context_length=1, labels=IDS, target_kinds=torch.ones_like(IDS))


def test_nothing_is_written_left_of_the_leftmost_token(model):
    with pytest.raises(ValueError, match="left of the leftmost token .*, got position 0 for token 2 of row 0"):
        model(IDS, positions=rows(1, 2, 0, 3), context_length=1, labels=IDS)
    assert model(IDS, positions=rows(1, 2, 0, 3), context_length=3, labels=IDS).loss.isfinite()


@pytest.mark.parametrize("horizon", [(2, 1, 2, 3), (1, 3, 3, 3)])
def test_losses_need_horizons_that_form_blocks(model, horizon):
    with pytest.raises(ValueError, match="all entries from a token up to its horizon must have the same horizon, got"):
        model(IDS, positions=RANKS, horizon=rows(*horizon), labels=IDS)


def test_structure_as_a_label_is_refused_left_to_right(model):
    labels = IDS.clone()
    labels[0, 2] = 0
    with pytest.raises(ValueError, match=r"ids \[0\] are structure and have probability 0, got label 0"):
        model(IDS, labels=labels)
    labels[0, 2] = 2  # EOS is STOP
    assert model(IDS, labels=labels).loss.isfinite()


@pytest.mark.parametrize("token", [0, 1, 2])
def test_structure_as_a_written_token_is_refused(model, token):
    ids = IDS.clone()
    ids[0, 2] = token
    with pytest.raises(ValueError, match=rf"\[0, 1, 2\] are structure and never written, got label {token}"):
        model(ids, positions=RANKS, context_length=1, labels=ids)
    assert model(ids, positions=RANKS, context_length=3, labels=ids).loss.isfinite()


def test_rows_behind_an_insertion_cache_are_padded_on_the_right(model):
    with pytest.raises(
        ValueError, match=r"row must come first behind an InsertionCache, got 1 runs in row 0: \[0, 1\]"
    ):
        model.model(IDS[:, :2], attention_mask=rows(0, 1), past_key_values=InsertionCache(1))


def test_positions_behind_a_cache_cover_the_cached_tokens_too(model):
    cache = InsertionCache(1)
    model.model(IDS[:, :3], positions=rows(0, 2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"positions must cover cached and new tokens, \[1, 4\], got \[1, 1\]"):
        model.model(IDS[:, 3:], positions=rows(1), past_key_values=cache)
    assert cache.lengths.tolist() == [3]


CONFIGS = [
    ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ({"intermediate_size": -1}, "intermediate_size must be at least 1, got -1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
    ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
    ({"hidden_size": 30}, "hidden_size must be a multiple of num_attention_heads, got 30 and 4"),
    ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3"),
    ({"num_key_value_heads": 0}, "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 0"),
    (
        {"position_encoding": "rope"},
        r"position_encoding must be one of \('alibi', 'sinusoidal', 'rotary'\), got 'rope'",
    ),
    ({"norm": "layer"}, r"norm must be one of \('rmsnorm', 'deepnorm', .*\), got 'layer'"),
    ({"classifier_pooling": "cls"}, r"classifier_pooling must be one of \('mean', 'last'\), got 'cls'"),
    ({"hidden_act": "swish5"}, "hidden_act must be one of .* got 'swish5'"),
    ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    ({"alibi_slope_ratio": 0.0}, "alibi_slope_ratio must be positive, got 0.0"),
    ({"alibi_slope_ratio": float("nan")}, "alibi_slope_ratio must be positive, got nan"),
    ({"position_logit_cap": -1.0}, "position_logit_cap must be positive, got -1.0"),
    ({"attention_dropout": 1.5}, r"attention_dropout must be in \[0, 1\), got 1.5"),
    ({"pad_token_id": 23}, r"pad_token_id must be in \[0, 23\), got 23"),
    ({"bos_token_id": -1}, r"bos_token_id must be in \[0, 23\), got -1"),
    ({"eos_token_id": 99}, r"eos_token_id must be in \[0, 23\), got 99"),
]


@pytest.mark.parametrize(("fields", "message"), CONFIGS, ids=[str(fields) for fields, _ in CONFIGS])
def test_bad_configurations_are_refused(fields, message):
    good = {"vocab_size": 23, "hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 4}
    InsNextConfig(**good)
    with pytest.raises(ValueError, match=message):
        InsNextConfig(**{**good, **fields})


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of \['advanced', 'base'\], got 'large'"):
        InsNextConfig.preset("large")


def test_labels_other_than_the_tokens_are_refused(model):
    with pytest.raises(
        ValueError, match="labels must be input_ids, or -100, got label 9 for id 6 at token 2 of row 0"
    ):
        model(IDS, positions=RANKS, context_length=1, labels=rows(1, 5, 9, 7))


def test_stop_left_to_right_needs_eos():
    lonely = tiny_model(eos_token_id=None)
    assert lonely.score(IDS, stop=False).isfinite().all()
    with pytest.raises(ValueError, match="stop=True left to right needs an eos_token_id, .*, got None"):
        lonely.score(IDS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("auto_class", [InsNextForInsertionLM, AutoModelForCausalLM])
def test_weights_that_are_not_finite_are_refused_on_load(tmp_path, value, auto_class):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert same_bits(loaded.slot_head.edge, model.slot_head.edge)
    with torch.no_grad():
        model.slot_head.edge[3:5] = value
    model.save_pretrained(tmp_path)
    for options in ({}, {"output_loading_info": True}, {"dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match="weights must be finite, got 2 that are not in slot_head.edge"):
            auto_class.from_pretrained(tmp_path, **options)


def test_loading_still_reports_what_it_loaded(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    model, info = InsNextForInsertionLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, InsNextForInsertionLM) and not info["missing_keys"]


def test_a_causal_interval_ignores_neither_mask_nor_context():
    """Control of the shape checks: mask and context reach the interval."""
    interval = build_interval((1, 4), CPU, attention_mask=rows(1, 1, 1, 0), context_length=2)
    assert interval.horizon_BQ.tolist() == [[1, 1, 2, 3]] and interval.start_BQ.tolist() == [[0, 0, 0, 3]]


def test_a_misspelt_argument_of_forward_is_refused():
    model = tiny_model()
    with pytest.raises(TypeError, match="no argument 'positons'"):
        model(IDS, positons=RANKS)
    model(IDS, positions=RANKS)


def test_labels_need_the_logits_of_all_tokens():
    model = tiny_model()
    with pytest.raises(ValueError, match="labels need the logits of all tokens, got logits_to_keep=1"):
        model(IDS, labels=IDS, logits_to_keep=1)
    model(IDS, labels=IDS)
