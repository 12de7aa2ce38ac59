"""A memory on top of lower layers that do not change: they are read once, and each epoch runs the rest.

Rows hold C chunks, of which the last ones hold questions. Of the upper layers only what an answer can see by
self-attention is run, the first chunk (for its sink) and the last ones, as if they were one text: states in between
differ a little from those of the whole text, retrieval does not. Rows of a batch search the chunks of all its rows, so
a batch of B rows of C chunks has B C of them to choose from.

Shape suffixes as in modeling_drt: B rows, L tokens of a row, C chunks of a row, K chunks found, S tokens a chunk, D
width, U tokens that the upper layers read.
"""

from copy import copy

import torch

from modeling_insnext.drt.layout import Layout, build_layout
from modeling_insnext.drt.retrieval import best_chunks, gumbel_like, wide_scores


class SharedChunks:
    """The chunks of a batch, each row's and the other rows', as a memory; gradients included.

    Args:
        keys_values_BC2GSD: Keys and values.
        landmarks_BCD: What is searched.
        allowed_BUN: Which of the N = B C chunks each chunk of the upper text may find.
    """

    def __init__(self, keys_values_BC2GSD: torch.Tensor, landmarks_BCD: torch.Tensor, allowed_BUN: torch.Tensor):
        self.chunks, self.landmarks = keys_values_BC2GSD.flatten(0, 1), landmarks_BCD.flatten(0, 1)
        self.allowed = allowed_BUN

    @property
    def total(self) -> int:
        return len(self.landmarks)

    def find(self, queries_BUD: torch.Tensor, asking_BU: torch.Tensor, k: int, noisy: bool = False) -> torch.Tensor:
        """Return the numbers of the k best allowed chunks, `[B, U, K]`; `noisy` adds Gumbel noise to the choice."""

        def score(start, stop):
            scores = self.scores(queries_BUD, start, stop)
            scores = scores + gumbel_like(scores) if noisy else scores
            return scores.masked_fill(~self.allowed[:, :, start:stop], -torch.inf)

        return best_chunks(score, torch.full_like(asking_BU, self.total), self.total, k)

    def scores(self, queries: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the scores of chunks `[B, U, N]` for queries `[B, U, D]`, of those from `start` to `stop`."""
        return wide_scores(queries, self.landmarks[None, start:stop]) * queries.shape[-1] ** -0.5

    def of_rows(self, count: int) -> "SharedChunks":
        """Return the same memory for the first rows alone."""
        fewer = copy(self)
        fewer.allowed = self.allowed[:count]
        return fewer

    def landmarks_of(self, chunks_BUK: torch.Tensor) -> torch.Tensor:
        return self.landmarks[chunks_BUK.clamp_min(0)]

    def read(self, chunks_BUK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, values = self.chunks.unbind(1)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None], chunks_BUK


def run_layers(model, states_BLD: torch.Tensor, layers: range) -> torch.Tensor:
    """Return the states after some layers that retrieve nothing, of texts that begin with the first state."""
    layout = whole_layout(model, states_BLD)
    return model._run(layers, states_BLD, model._carry(layout, None, states_BLD), None)


def whole_layout(model, states_BLD: torch.Tensor) -> Layout:
    B, L = states_BLD.shape[:2]
    return build_layout((B, L), states_BLD.device, model.config.grid, [0], [L])


@torch.no_grad()
def lower_states(model, ids_BL: torch.Tensor) -> torch.Tensor:
    """Return what leaves the lower layers, `[B, L, D]`."""
    return run_layers(model, model.embed_tokens(ids_BL), range(model.config.num_lower_layers))


def encode(model, lower_BLD: torch.Tensor, banned_BN: torch.Tensor, tail: int) -> SharedChunks:
    """Return the memory of a batch.

    Args:
        model: A `DrtModel`.
        lower_BLD: What leaves its lower layers, whole chunks.
        banned_BN: True where a row must not find a chunk of the batch.
        tail: Chunks at the end of the rows that ask, besides the first one.
    """
    S = model.config.chunk_size
    B, C = lower_BLD.shape[0], lower_BLD.shape[1] // S
    landmarks, keys_values = model.encoder(lower_BLD.unflatten(1, (C, S)))
    # chunk t of a row finds its own chunks before t, and those of other rows
    number_U = torch.tensor([0, *range(C - tail, C)])
    own_BBC = torch.eye(B, dtype=torch.bool)[:, None, :, None].expand(B, tail + 1, B, C)
    before_UC = torch.arange(C) < number_U[:, None]
    allowed_BUN = (~own_BBC | before_UC[None, :, None]).flatten(2) & ~banned_BN[:, None]
    return SharedChunks(keys_values, landmarks, allowed_BUN)


def question_scores(model, lower_BLD: torch.Tensor, memory: SharedChunks) -> torch.Tensor:
    """Return the scores `[B, N]` of what the last chunk but one of each row asks for, `-inf` where it may not.

    The first group asks with a state that leaves the lower layers.
    """
    S = model.config.chunk_size
    queries_BD = model.query_norms[0](lower_BLD[:, -S - 1])
    scores_BN = memory.scores(queries_BD[None])[0]
    return scores_BN.masked_fill(~memory.allowed[:, -2], -torch.inf)


def upper_states(model, lower_BLD: torch.Tensor, memory: SharedChunks) -> torch.Tensor:
    """Return the last states `[B, tail S, D]` of the chunks that ask, of the first B rows of the batch."""
    S, tail = model.config.chunk_size, memory.allowed.shape[1] - 1
    text = torch.cat([lower_BLD[:, :S], lower_BLD[:, -tail * S :]], 1)
    memory, layout = memory.of_rows(len(text)), whole_layout(model, text)
    carried, hidden, first = model._carry(layout, None, text), text, model.config.num_lower_layers
    for group, count in enumerate(model.config.retrieval_groups):
        served = model.retriever.retrieve(model, group, hidden, layout, memory, None)
        hidden = model._run(range(first, first + count), hidden, carried._replace(served=served), None)
        first += count
    return model.norm(hidden[:, S:])
