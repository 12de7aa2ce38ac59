"""The model against its formulae, written out in loops (`twin_drt`), in float64."""

import pytest
import torch

from modeling_insnext.drt import attention, layers, memory, retriever
from modeling_insnext.drt.retrieval import best_chunks
from tests.support.drt import FORMS, MEMORY, ROPE, random_ids, tiny_model, whole
from tests.support.twin_drt import brute_force_logits


SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_lower_layers": 1, "chunk_size": 3, "sliding_window": 6}
CLOSE = 1e-9
LENGTH = 23

CONFIGS = {
    "x1": {"retrieval_groups": [2]},
    "x2": {},
    "x3": {"retrieval_groups": [1, 1, 1], "num_lower_layers": 0},
    "unequal_groups": {"retrieval_groups": [1, 2]},
    "stream": {"residual": "stream"},
    "dropped": {"landmark_slot": "dropped"},
    "cls": {"landmark_source": "cls"},
    "mean": {"landmark_source": "mean", "landmark_slot": "dropped"},
    "cca": {"fusion": "cca"},
    "cca_dropped": {"fusion": "cca", "landmark_slot": "dropped"},
    "first_layers": {"retrieval_groups": [2, 1], "cross_attention_layers": 1},
    "keys_per_layer": {"retrieval_groups": [2, 1], "keys_per_layer": True},
    "gated": MEMORY,
    "by_token": {"retrieval_by": "token"},
    "by_token_mean": {**MEMORY, "retrieval_by": "token"},
    "by_token_cca": {"retrieval_by": "token", "fusion": "cca"},
    "fixed": {"retriever": "fixed"},
    "fixed_mean": {"retriever": "fixed", "landmark_source": "mean"},
    "one_head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "heads_of_two": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "all_heads": {"num_key_value_heads": 4},
    "chunks_of_one": {"chunk_size": 1, "num_retrieved_chunks": 5},
    "chunks_of_eight": {"chunk_size": 8, "sliding_window": 10, "num_retrieved_chunks": 1},
    "more_than_there_are": {"num_retrieved_chunks": 20},
    "window_of_a_chunk_and_one": {"sliding_window": 5},
    "no_window": {"sliding_window": None},
    "window_model": {"retrieval_groups": [], "num_lower_layers": 2},
    "window_of_one": {"retrieval_groups": [], "num_lower_layers": 2, "sliding_window": 1},
    "full_attention": {"retrieval_groups": [], "num_lower_layers": 2, "sliding_window": None},
    "two_encoder_layers": {"num_encoder_layers": 2, "encoder_rope_theta": 50.0},
    "untied": {"tie_word_embeddings": False},
    "large_eps": {"rms_norm_eps": 0.3, "encoder_rms_norm_eps": 0.7},
    "rope_window_model": {**ROPE, "retrieval_groups": [], "num_lower_layers": 2},
    **FORMS,
}


def error(model, ids) -> float:
    return float((whole(model, ids)[0] - brute_force_logits(model, ids[0].tolist())).abs().max())


def make(**changes):
    model = tiny_model(**{**SMALL, **changes})
    # norms are ones when new, and a mistake in their order would not show
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "gate")):
                weight.add_(torch.rand(weight.shape, generator=generator, dtype=weight.dtype) - 0.5)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_its_formulae(name):
    model, ids = make(**CONFIGS[name]), random_ids(1, LENGTH)
    expected = brute_force_logits(model, ids[0].tolist())
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert (whole(model, ids)[0] - expected).abs().max() < CLOSE


@pytest.mark.parametrize("length", range(1, 10))
def test_texts_of_every_length_are(length):
    assert error(make(), random_ids(1, length)) < CLOSE


def ask_for_oneself(score_block, asking_BC, total, k, *block):
    return best_chunks(score_block, asking_BC + 1, total, k, *block)


def no_shift(retrieve):
    """Chunk t is served by what chunk t found."""

    def wrong(*args):
        served = retrieve(*args)
        return served._replace(indices_BCK=served.indices_BCK.roll(-1, 1), weights_BCK=served.weights_BCK.roll(-1, 1))

    return wrong


def one_more_key(bias):
    def wrong(distance, size, *args):
        return bias(distance, size if size is None else size + 1, *args)

    return wrong


CONTROLS = {
    "a chunk asks for itself": (memory, "best_chunks", lambda right: ask_for_oneself),
    "no shift by one": (retriever.Retriever, "retrieve", no_shift),
    "a window of w + 1": (attention, "_bias", one_more_key),
    "unrotated chunks": (layers, "rotate", lambda right: lambda x, theta: x),
    "equal weights": (
        retriever,
        "chunk_weights",
        lambda right: lambda scores, chunks: right(torch.zeros_like(scores), chunks),
    ),
    "steeper slopes": (attention, "alibi_slopes", lambda right: lambda *args: 2 * right(*args)),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_every_rule_of_the_formulae_shows(name, monkeypatch):
    model, ids = make(), random_ids(1, LENGTH)
    holder, attribute, wrong = CONTROLS[name]
    monkeypatch.setattr(holder, attribute, wrong(getattr(holder, attribute)))
    assert error(model, ids) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": "stream"},
        {"landmark_slot": "dropped"},
        {"fusion": "cca"},
        {"rms_norm_eps": 1e-2},
        {"encoder_rms_norm_eps": 1e-2},
        {"encoder_rope_theta": 100.0},
        {"num_retrieved_chunks": 3},
        {"retrieval_by": "token"},
        {"sliding_window": 7},
        {"hidden_act": "gelu"},
        {"position_encoding": "rope"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_choice_of_the_config_shows(changes):
    """Same weights, another field: other logits."""
    ids, model, other = random_ids(1, LENGTH), make(), make(**changes)
    other.load_state_dict(model.state_dict())
    assert (whole(other, ids) - whole(model, ids)).abs().max() > 1e-4


def test_every_choice_of_rotary_positions_shows():
    ids, model = random_ids(1, LENGTH), make(**ROPE)
    for given in (
        {"rope_theta": 50.0},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ):
        other = make(**ROPE, rope_parameters=given)
        other.load_state_dict(model.state_dict())
        assert (whole(other, ids) - whole(model, ids)).abs().max() > 1e-4
