"""Weights from which copying is soon learned: an initialisation for small models and short runs.

Copying what followed an earlier occurrence of a token takes two attention layers that fit one another (induction
heads, arXiv:2209.11895): one writes into each state what stood before it, another compares that with the token at hand
and takes what it finds over. Models find this out, after millions of tokens in which the loss stands still. Here
weights begin in its neighbourhood, as in mimetic initialisation (arXiv:2305.09828) by products of matrices: with D x D
orthogonal Q, R, P, U,

    first layer             W_q = c Q, W_k = -c Q: a token looks past its equals, which ALiBi puts first;
                            W_o W_v = s^2 R: what it finds is written, turned by R
    other self-attention    W_o W_v = s^2 I
    reading layers          W_q = b P, W_k = b P R^T: the token at hand against what stood before;
                            W_o W_v = a^2 I: what is found is the prediction, heads being tied to embeddings

and all else as `DrtConfig.initializer_range` says. Reading layers are the upper ones: their attention to chunks, or
their self-attention where nothing is retrieved. Retrieval itself gets no help: which chunk to look into is learned.
"""

import torch

from modeling_insnext import DrtForCausalLM


LOOK_PAST, WRITE, MATCH, TAKE = 1.2, 0.1, 0.7, 0.7


def orthogonal(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width))[0]


@torch.no_grad()
def start_from_copying(model: DrtForCausalLM) -> None:
    """Overwrite attention weights of `model` in place; random matrices come from PyTorch's generator.

    Raises:
        ValueError: If key heads are shared, the head is not tied, or there is only one layer.
    """
    config = model.config
    if config.num_key_value_heads != config.num_attention_heads or not config.tie_word_embeddings:
        raise ValueError(
            "copying_init needs as many key heads as query heads and a tied head, got "
            f"num_key_value_heads={config.num_key_value_heads} of {config.num_attention_heads}, "
            f"tie_word_embeddings={config.tie_word_embeddings}"
        )
    if config.num_hidden_layers < 2 or config.num_lower_layers < 1:
        raise ValueError(f"copying_init needs a layer below the reading ones, got {config.num_lower_layers}")
    turn, compare, take = (orthogonal(config.hidden_size) for _ in range(3))
    layers = [layer.self_attn for layer in model.model.layers]
    for i, attention in enumerate(layers):
        basis = orthogonal(config.hidden_size)
        attention.v_proj.weight.copy_(WRITE * basis)
        attention.o_proj.weight.copy_(WRITE * (turn if i == 0 else torch.eye(len(turn))) @ basis.T)
    basis = orthogonal(config.hidden_size)
    layers[0].q_proj.weight.copy_(LOOK_PAST * basis)
    layers[0].k_proj.weight.copy_(-LOOK_PAST * basis)
    if config.retrieval_groups:
        readers = [layer.cross_attn for layer in model.model.layers if layer.cross_attn is not None]
        written = [model.model.encoder]
    else:
        readers = written = layers[-max(1, len(layers) // 2) :]
    for reader in readers:
        reader.q_proj.weight.copy_(MATCH * compare)
        reader.o_proj.weight.copy_(TAKE * take.T)
    for memory in written:
        memory.k_proj.weight.copy_(MATCH * compare @ turn.T)
        memory.v_proj.weight.copy_(TAKE * take)
