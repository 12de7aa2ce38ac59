"""Search of landmarks with faiss: the scores of the exact search in float32, on the CPU.

Every row has a flat index of inner products, to which chunks are added as they complete. Flat means exact: at 16M
tokens (262,144 chunks of width 768) a search reads 0.8 GB, once a chunk and group, so an approximate index would gain
little.

Shape suffixes: B rows, C chunks that ask, K chunks found, N chunks, D width.
"""

import torch

from .retrieval import wide_scores


try:
    import faiss
except ImportError:
    faiss = None


def require_faiss() -> None:
    """Raise an `ImportError` that says what to install, if faiss is missing."""
    if faiss is None:
        raise ImportError('search="faiss" needs faiss: pip install "modeling-insnext[faiss]" (or faiss-cpu)')


def find_with_faiss(memory, queries_BCD: torch.Tensor, asking_BC: torch.Tensor, k: int) -> torch.Tensor:
    """Return the numbers of the k best chunks i < t before each asking chunk t, `[B, C, K]`, -1 where there are fewer.

    An index holds the chunks before the first one that asks; the newer ones, of which each asking chunk may choose
    others, are scored directly.
    """
    found = torch.full((*asking_BC.shape, k), -1)
    for row, asking_C in enumerate(asking_BC.cpu()):
        # chunk 0 has nothing to find, and rows that complete fewer chunks than others are filled up with it
        places = asking_C.nonzero()[:, 0]
        if len(places):
            found[row, places] = _find_in_row(memory, row, queries_BCD[row, places], asking_C[places], k)
    return found.to(asking_BC.device)


def _find_in_row(memory, row: int, queries_CD: torch.Tensor, asking_C: torch.Tensor, k: int) -> torch.Tensor:
    first, last = int(asking_C.min()), int(asking_C.max())
    queries_CD = queries_CD.detach().cpu()
    scores_CK, chunks_CK = _row_index(memory, row, first).search(queries_CD.float().numpy(), min(k, first))
    newer_CN = wide_scores(queries_CD[None], memory.landmarks_of_row(row, first, last)[None])[0]
    number_N = torch.arange(first, last)
    newer_CN = newer_CN.masked_fill(number_N >= asking_C[:, None], -torch.inf)
    scores = torch.cat([torch.from_numpy(scores_CK).to(newer_CN.dtype), newer_CN], 1)
    numbers = torch.cat([torch.from_numpy(chunks_CK), number_N.expand_as(newer_CN)], 1)
    best, place = scores.topk(min(k, scores.shape[1]), dim=1)
    chunks = numbers.gather(1, place).masked_fill(best.isneginf(), -1)
    return torch.nn.functional.pad(chunks, (0, k - chunks.shape[1]), value=-1)


def _row_index(memory, row: int, count: int):
    """Return an index of the row's first `count` chunks, never fewer than the last time."""
    if memory.indexes[row] is None:
        memory.indexes[row] = faiss.IndexFlatIP(memory.landmarks.shape[1])
    index = memory.indexes[row]
    if index.ntotal < count:
        index.add(memory.landmarks_of_row(row, index.ntotal, count).float().numpy())
    return index
