"""Search with faiss finds what the exact search finds, however the text is read and whatever becomes of its rows."""

import copy

import pytest
import torch

from modeling_insnext import ChunkMemoryCache
from modeling_insnext.drt import search as search_module
from modeling_insnext.drt.memory import ChunkMemory
from tests.support.drt import padded, random_ids, read, tiny_model, whole
from tests.support.equality import same_bits, within_rounding


CLOSE = {"rtol": 0, "atol": 1e-10}


def two_memories(counts, width=16, seed=0):
    """Return an exact and a faiss memory of the same random landmarks."""
    torch.manual_seed(seed)
    landmarks = torch.randn(sum(counts), width)
    memories = []
    for search in ("exact", "faiss"):
        memory = ChunkMemory("host", search=search)
        memory.begin(len(counts), (2, 1, 1, 2), width, torch.float32, "cpu")
        memory.reserve(counts)
        memory.append(torch.zeros(sum(counts), 2, 1, 1, 2), landmarks, counts)
        memories.append(memory)
    return memories


@pytest.mark.parametrize("k", [1, 4, 300])
def test_faiss_finds_the_same_chunks(k):
    exact, faiss = two_memories([257, 100, 3])
    queries = torch.randn(3, 5, 16)
    asking = torch.tensor([[252, 253, 254, 255, 256], [98, 99, 0, 0, 0], [0, 1, 2, 0, 0]])
    found = faiss.find(queries, asking, k)
    assert same_bits(found, exact.find(queries, asking, k))
    # the oldest that asks decides what the index holds
    assert [index.ntotal for index in faiss.indexes] == [252, 98, 1]


def test_chunks_that_are_newer_than_the_index_must_be_scored(monkeypatch):
    exact, faiss = two_memories([60])
    queries, asking = torch.randn(1, 20, 16), torch.arange(40, 60)[None]
    expected = exact.find(queries, asking, 4)
    assert same_bits(faiss.find(queries, asking, 4), expected)
    monkeypatch.setattr(search_module, "wide_scores", lambda q, m: torch.full((1, q.shape[1], m.shape[1]), -torch.inf))
    assert not same_bits(faiss.find(queries, asking, 4), expected)


@pytest.mark.parametrize("step", [1, 7, 60])
def test_reading_with_faiss_gives_the_logits_of_the_exact_search(step):
    model, ids = tiny_model(), random_ids(2, 60)
    past = ChunkMemoryCache(model.config, search="faiss")
    torch.testing.assert_close(read(model, ids, past, step), whole(model, ids), **CLOSE)
    # the choice matters: another one gives other logits
    assert not torch.allclose(whole(tiny_model(retriever="random"), ids), whole(model, ids), **CLOSE)


def test_ragged_rows_are_searched_alike():
    model = tiny_model()
    text, mask = padded(random_ids(2, 60), [60, 33], "left")
    logits = read(model, text, ChunkMemoryCache(model.config, search="faiss"), 9, mask)
    exact = read(model, text, ChunkMemoryCache(model.config), 9, mask)
    torch.testing.assert_close(logits, exact, **CLOSE)


def reordered(model, past):
    past.reorder_cache(torch.tensor([1, 0]))
    return past


def cropped(model, past):
    """Take back three chunks, and read others without asking for any."""
    past.crop(-17)
    return model.prefill(random_ids(2, 70, seed=2), past_key_values=past, lower_only=True)


def copied(model, past):
    return copy.deepcopy(past)


@pytest.mark.parametrize("change", [reordered, cropped, copied])
def test_the_index_follows_the_rows(change):
    model, ids, more = tiny_model(), random_ids(2, 42), random_ids(2, 30, seed=1)
    logits = {}
    for kind in ("exact", "faiss", "stale"):
        past = ChunkMemoryCache(model.config, "host", search="faiss" if kind == "stale" else kind, crop_margin=20)
        read(model, ids, past, 8)
        indexes = past.memory.indexes
        past = change(model, past)
        if kind == "stale":
            past.memory.indexes = indexes
        logits[kind] = read(model, more, past, 4)
    torch.testing.assert_close(logits["faiss"], logits["exact"], **CLOSE)
    # control: the index of before; that of a copy would be right
    assert torch.allclose(logits["stale"], logits["exact"], **CLOSE) == (change is copied)


def test_a_saved_cache_is_searched_by_faiss_when_it_is_loaded(tmp_path):
    model, ids, more = tiny_model(), random_ids(2, 42), random_ids(2, 30, seed=1)
    past = ChunkMemoryCache(model.config, search="faiss")
    read(model, ids, past, 8)
    past.save(tmp_path / "book", model)
    expected = read(model, more, past, 4)
    for search in ("faiss", "exact"):
        loaded = ChunkMemoryCache.load(tmp_path / "book", model, search=search)
        assert within_rounding(read(model, more, loaded, 4), expected)
        assert loaded.memory.search == search


def test_with_faiss_no_landmark_is_on_the_device():
    exact, faiss = two_memories([100])
    exact.find(torch.randn(1, 1, 16), torch.tensor([[99]]), 4)
    faiss.find(torch.randn(1, 1, 16), torch.tensor([[99]]), 4)
    table = 100 * 8
    assert exact.device_bytes() == 100 * 16 * 4 + table and faiss.device_bytes() == table
    assert faiss.host_bytes() - exact.host_bytes() == 100 * 16 * 4 + 99 * 16 * 4


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    config = tiny_model().config
    ChunkMemoryCache(config, search="faiss")
    monkeypatch.setattr(search_module, "faiss", None)
    ChunkMemoryCache(config)
    with pytest.raises(ImportError, match=r'pip install "modeling-insnext\[faiss\]"'):
        ChunkMemoryCache(config, search="faiss")
