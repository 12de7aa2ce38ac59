"""Copying initialisation of the DRT examples: the products that its docstring states, for every kind of reader."""

import copying_init
import pytest
import torch

from modeling_insnext import DrtConfig, DrtForCausalLM
from tests.support.equality import same_bits


def model(**fields) -> DrtForCausalLM:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_lower_layers": 1,
        "retrieval_groups": [1, 1],
        "chunk_size": 8,
        "sliding_window": 24,
    }
    torch.manual_seed(0)
    return DrtForCausalLM(DrtConfig(**{**sizes, **fields}))


def scaled_identity(product: torch.Tensor, scale: float) -> bool:
    return torch.allclose(product, scale * torch.eye(len(product)), atol=1e-5)


@pytest.mark.parametrize("baseline", [None, "sliding_window", "random_retriever", "full_attention"])
def test_readers_undo_the_turn_of_the_first_layer_and_take_over_what_they_find(baseline):
    config = model().config if baseline is None else model().config.baseline(baseline)
    drt = DrtForCausalLM(config)
    untouched = drt.model.layers[0].mlp.down_proj.weight.clone()
    copying_init.start_from_copying(drt)
    layers = drt.model.layers
    first = layers[0].self_attn
    s, b, a = copying_init.WRITE, copying_init.MATCH, copying_init.TAKE
    turn = first.o_proj.weight @ first.v_proj.weight / s**2
    assert scaled_identity(turn @ turn.T, 1) and not scaled_identity(turn, 1)
    assert scaled_identity(first.q_proj.weight.T @ first.k_proj.weight, -(copying_init.LOOK_PAST**2))
    readers = [layer.cross_attn or layer.self_attn for layer in layers[-(2 if config.retrieval_groups else 1) :]]
    for reader in readers:
        memory = drt.model.encoder if config.retrieval_groups else reader
        assert scaled_identity(reader.o_proj.weight @ memory.v_proj.weight, a**2)
        # a query x and a key that holds x, turned, match as x and x would
        assert scaled_identity(reader.q_proj.weight.T @ memory.k_proj.weight @ turn, b**2)
    assert same_bits(layers[0].mlp.down_proj.weight, untouched)


@pytest.mark.parametrize(
    "fields", [{"num_key_value_heads": 1}, {"tie_word_embeddings": False}, {"num_lower_layers": 0}], ids=str
)
def test_shapes_that_have_no_such_products_are_refused(fields):
    with pytest.raises(ValueError, match="copying_init needs"):
        copying_init.start_from_copying(model(**fields))
