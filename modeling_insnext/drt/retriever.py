"""Which chunks serve which slots: one class for each way of choosing them.

Chunk t asks with the state of its last position for chunks i < t, and what it finds serves chunk t + 1; or every token
of chunk t asks for itself (`retrieval_by="token"`). The weights
that a retriever needs belong to the model, under the names that checkpoints have; methods take the model for them.

Shape suffixes: B rows, Q columns, L slots, C chunks that ask, K chunks found, P positions a chunk, D width, W width of
what stands beside the lower states.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .configuration_drt import DrtConfig
from .layout import Layout, put_in
from .retrieval import Retrieved, Served, best_chunks, chance, chunk_weights


# width of the frozen bag-of-tokens vectors, and what their cosine is multiplied by
FIXED_WIDTH = 64
FIXED_SHARPNESS = 10.0


class Asking(NamedTuple):
    """The chunks that a pass completes: their numbers, and the slots of their last positions, `[B, C]`.

    Rows that complete fewer than others are filled up with chunk 0, which has nothing to find.
    """

    chunks_BC: torch.Tensor
    slots_BC: torch.Tensor


def chunks_that_ask(layout: Layout, rows: int, device: torch.device) -> Asking:
    """Return what asks in this pass; at least one chunk must be completed."""
    begun_B1, completed_B1, first_B1 = torch.tensor(
        [layout.chunks_begun, layout.chunks_completed, layout.first], device=device
    )[..., None]
    place_C = torch.arange(max(layout.chunks_completed), device=device)
    number_BC = begun_B1 + place_C
    chunks_BC = torch.where(place_C < completed_B1, number_BC, 0)
    slots_BC = ((number_BC + 1) * layout.grid.length - 1 - first_B1).clamp_max(layout.width - 1)
    return Asking(chunks_BC.expand(rows, -1), slots_BC.expand(rows, -1))


def slots_that_ask(layout: Layout, hidden_BLD: torch.Tensor) -> Asking:
    """Return every slot of a pass, as one that asks among the chunks before the one it is in."""
    B, L = hidden_BLD.shape[:2]
    slot_L = torch.arange(L, device=hidden_BLD.device)
    first_B1 = torch.tensor(layout.first, device=hidden_BLD.device)[:, None]
    return Asking(((first_B1 + slot_L) // layout.grid.length).expand(B, -1), slot_L.expand(B, -1))


class Retriever:
    """What all retrievers share; each says how it asks."""

    def __init__(self, config: DrtConfig):
        self.config = config

    @property
    def landmark_width(self) -> int:
        return self.config.hidden_size

    def add_weights(self, model: nn.Module) -> None:
        """Give the model what this retriever needs."""

    def init_weights(self, model: nn.Module) -> None:
        """Fill what :meth:`add_weights` added and no module of its own fills."""

    def beside(self, model, input_ids: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what a chunk keeps beside its lower states, `[B, L, W]`, if anything."""
        return None

    def landmarks(self, encoded_BCD: torch.Tensor, beside_BCPW: torch.Tensor) -> torch.Tensor:
        """Return what is searched, of what the encoder made of each chunk and what stood beside it."""
        return encoded_BCD

    def ask(self, model, group: int, hidden_BLD: torch.Tensor, asking: Asking, memory) -> Retrieved:
        """Retrieve for every chunk that this pass completes."""
        raise NotImplementedError

    def retrieve(self, model, group: int, hidden_BLD: torch.Tensor, layout: Layout, memory, past) -> Served:
        """Return what serves the slots of a group's layers.

        Place 0 is what the cache holds for the chunk in progress, place j what this pass finds at the end of the j-th
        chunk it completes. Where each token asks for itself, every slot has a place, and nothing is kept.
        """
        B, completed = hidden_BLD.shape[0], layout.chunks_completed
        if self.config.retrieval_by == "token":
            return self._retrieve_by_token(model, group, hidden_BLD, layout, memory)
        joined = past.retrieved_for_current(group) if past is not None else None
        if joined is None:
            joined = self._none_found(hidden_BLD, 1)
        if max(completed):
            found = self.ask(model, group, hidden_BLD, chunks_that_ask(layout, B, hidden_BLD.device), memory)
            joined = Retrieved(*(torch.cat(pair, 1) for pair in zip(joined, found, strict=True)))
        spanned = layout.chunks_spanned
        serving = Retrieved(*(tensor[:, :spanned] for tensor in joined))
        if memory is None or not memory.total:
            key, value, indices = self._nothing(hidden_BLD, serving)
        elif spanned == 1 and past is not None and memory is past.memory:
            key, value, indices = past.read(group, serving)
        else:
            key, value, indices = memory.read(serving.chunks_BCK)
        if past is not None:
            past.keep_retrieved(group, joined, completed)
        return Served(key, value, serving.weights_BCK, indices, None if spanned == 1 else layout.phases)

    def _retrieve_by_token(self, model, group: int, hidden_BLD: torch.Tensor, layout: Layout, memory) -> Served:
        if memory is None or not memory.total:
            found = self._none_found(hidden_BLD, hidden_BLD.shape[1])
            key, value, indices = self._nothing(hidden_BLD, found)
        else:
            found = self.ask(model, group, hidden_BLD, slots_that_ask(layout, hidden_BLD), memory)
            key, value, indices = memory.read(found.chunks_BCK)
        return Served(key, value, found.weights_BCK, indices, None)

    def _none_found(self, hidden_BLD: torch.Tensor, places: int) -> Retrieved:
        shape = (hidden_BLD.shape[0], places, self.config.num_retrieved_chunks)
        nothing = torch.full(shape, -1, device=hidden_BLD.device)
        wide = torch.promote_types(hidden_BLD.dtype, torch.float32)
        return Retrieved(nothing, torch.zeros_like(nothing, dtype=wide))

    def _nothing(self, hidden_BLD, serving: Retrieved):
        """Return one empty chunk: before the first chunk is complete there is nothing to read."""
        config = self.config
        empty = hidden_BLD.new_zeros((1, config.memory_heads, 1, config.chunk_size, config.head_dim))
        return empty, empty, serving.chunks_BCK


class SearchingRetriever(Retriever):
    """Chooses by <q, l_i> / sqrt(W) of a query and the landmarks."""

    noisy_in_training = False

    def queries(self, model, group: int, hidden_BLD, asking: Asking, memory) -> torch.Tensor:
        """Return `[B, C, W]`."""
        raise NotImplementedError

    def ask(self, model, group, hidden_BLD, asking, memory):
        queries_BCW = self.queries(model, group, hidden_BLD, asking, memory)
        noisy = model.training and self.noisy_in_training
        with torch.no_grad():
            chunks_BCK = memory.find(queries_BCW, asking.chunks_BC, self.config.num_retrieved_chunks, noisy)
        wide = torch.promote_types(queries_BCW.dtype, torch.float32)
        landmarks_BCKW = memory.landmarks_of(chunks_BCK).to(wide)
        scores_BCK = torch.einsum("bcd,bckd->bck", queries_BCW.to(wide), landmarks_BCKW)
        return Retrieved(chunks_BCK, chunk_weights(scores_BCK * queries_BCW.shape[-1] ** -0.5, chunks_BCK))


class LearnedRetriever(SearchingRetriever):
    """`retriever="learned"`: end to end, through the weights of what was chosen; a query is a normed state."""

    noisy_in_training = True

    def add_weights(self, model):
        D, eps = self.config.hidden_size, self.config.rms_norm_eps
        model.query_norms = nn.ModuleList([nn.RMSNorm(D, eps=eps) for _ in self.config.retrieval_groups])

    def queries(self, model, group, hidden_BLD, asking, memory):
        index_BCD = asking.slots_BC[..., None].expand(-1, -1, hidden_BLD.shape[-1])
        return model.query_norms[group](hidden_BLD.gather(1, index_BCD))


class FixedRetriever(SearchingRetriever):
    """`retriever="fixed"`: the cosine of frozen bag-of-tokens vectors."""

    landmark_width = FIXED_WIDTH

    def add_weights(self, model):
        model.register_buffer("bag_of_tokens", torch.zeros(self.config.vocab_size, FIXED_WIDTH))

    def init_weights(self, model):
        init.normal_(model.bag_of_tokens)

    def beside(self, model, input_ids, layout, dtype):
        return put_in(layout, model.bag_of_tokens.to(dtype)[input_ids], None)

    def landmarks(self, encoded_BCD, beside_BCPW):
        bags_BCW = nn.functional.normalize(beside_BCPW.detach().sum(2), dim=-1)
        return bags_BCW * (FIXED_SHARPNESS * FIXED_WIDTH**0.5) ** 0.5

    def queries(self, model, group, hidden_BLD, asking, memory):
        return memory.landmarks_of(asking.chunks_BC[..., None])[:, :, 0]


class RandomRetriever(Retriever):
    """`retriever="random"`: any chunks, weighted alike; drawn anew in training, otherwise always the same."""

    def ask(self, model, group, hidden_BLD, asking, memory):
        def score(start, stop):
            number = torch.arange(start, stop, device=hidden_BLD.device)
            scores = chance(asking.chunks_BC, number, group)
            return torch.rand_like(scores) if model.training else scores

        with torch.no_grad():
            chunks_BCK = best_chunks(score, asking.chunks_BC, memory.total, self.config.num_retrieved_chunks)
        weights_BCK = chunk_weights(torch.zeros_like(chunks_BCK, dtype=torch.float32), chunks_BCK)
        return Retrieved(chunks_BCK, weights_BCK.to(hidden_BLD.dtype))


RETRIEVERS = {"learned": LearnedRetriever, "random": RandomRetriever, "fixed": FixedRetriever}

__all__ = ["RETRIEVERS", "Retriever"]
