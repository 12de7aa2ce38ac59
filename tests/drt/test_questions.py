"""Several questions to one book: each has a cache of its own behind the same chunks, which nobody copies."""

import pytest
import torch

from modeling_insnext import ChunkMemoryCache
from modeling_insnext.drt import memory
from tests.support.drt import MEMORY, padded, random_ids, read, tiny_model, whole
from tests.support.equality import difference, same_bits


CLOSE = 1e-9
BOOK, QUESTION = 63, 17
PLAIN = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FORMS = {"plain": {}, "memory": MEMORY}
LOCATIONS = ["device", "host", "disk"]


def asked(location="device", **changes):
    """Return a model, a book, three questions and the cache behind the book, which has chunks to spare."""
    model, book, questions = tiny_model(**changes), random_ids(1, BOOK), random_ids(3, QUESTION, seed=1)
    past = model.prefill(book, past_key_values=ChunkMemoryCache(model.config, location), segment_length=20)
    return model, book, questions, past


def behind(book, question):
    return torch.cat([book, question[None]], 1)


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_the_answer_to_a_question_is_the_one_in_a_fresh_cache(form, location):
    """Questions are read by turns, over several ends of chunks, so that their new chunks lie mixed."""
    model, book, questions, past = asked(location, **FORMS[form])
    forks, logits = [past.fork() for _ in questions], [[] for _ in questions]
    for column in range(0, QUESTION, 4):
        for fork, question, parts in zip(forks, questions, logits, strict=True):
            parts.append(read(model, question[None, column : column + 4], fork, 4))
    for fork, question, parts in zip(forks, questions, logits, strict=True):
        expected = whole(model, behind(book, question))[:, -QUESTION:]
        assert difference(torch.cat(parts, 1), expected) < CLOSE
        assert fork.memory.counts == [(BOOK + QUESTION) // 5]
    # the book itself is as it was, and one more question is asked behind it
    assert past.seen == [BOOK] and past.memory.counts == [BOOK // 5]
    again = read(model, questions[:1], past.fork(), QUESTION)
    assert difference(again, whole(model, behind(book, questions[0]))[:, -QUESTION:]) < CLOSE


def test_questions_that_take_the_same_places_disturb_one_another(monkeypatch):
    model, book, questions, past = asked()
    monkeypatch.setattr(memory.ChunkStore, "used", property(lambda self: past.memory.high))
    forks = [past.fork(), past.fork()]
    for fork, question in zip(forks, questions, strict=False):
        read(model, question[None], fork, 4)
    more = random_ids(1, 9, seed=7)
    errors = []
    for fork, question in zip(forks, questions, strict=False):
        text = torch.cat([behind(book, question), more], 1)
        errors.append(difference(read(model, more, fork, 1), whole(model, text)[:, -9:]))
    assert min(errors) > 1e-3


@pytest.mark.parametrize("location", LOCATIONS)
def test_nothing_of_the_book_is_copied(location):
    model, _, questions, past = asked(location)
    fork = past.fork()
    assert fork.memory.slab is past.memory.slab and fork.memory.landmarks is past.memory.landmarks
    tails = past.named_tails()
    for name, tail in fork.named_tails().items():
        assert tail is not tails[name]
        if tail.tensor is not None:
            assert tail.tensor.data_ptr() == tails[name].tensor.data_ptr()

    def places():
        slab = past.memory.slab
        parts = [slab.chunks] if location == "device" else slab.parts
        return [part.data_ptr() for part in parts], past.memory.landmarks.data_ptr()

    before, windows = places(), [tail.tensor.clone() for tail in past.keys]
    model.generate(questions[:1], attention_mask=ones(QUESTION), past_key_values=fork, **PLAIN)
    assert places() == before and fork.memory.slab is past.memory.slab
    assert all(same_bits(tail.tensor, window) for tail, window in zip(past.keys, windows, strict=True))
    # a copy has another slab
    assert past.__deepcopy__({}).memory.slab is not past.memory.slab


def ones(new, rows=1):
    return torch.ones(rows, BOOK + new, dtype=torch.long)


def test_what_questions_have_written_is_free_again_when_they_are_gone():
    model, _, questions, past = asked()
    forks = [past.fork() for _ in questions]
    for fork, question in zip(forks, questions, strict=True):
        read(model, question[None], fork, QUESTION)
    # each completes the chunk in progress and three more
    assert past.memory.used == BOOK // 5 + 3 * 4
    forks.pop(0)
    assert past.memory.used == BOOK // 5 + 3 * 4
    forks.clear()
    del fork
    assert past.memory.used == BOOK // 5


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 6}])
def test_generate_takes_its_usual_options_behind_a_book(options):
    model, book, questions, past = asked()
    # a question that repeats itself, for prompt lookup to find candidates
    questions = torch.cat([questions, questions[:, :9]], 1)
    for question in questions:
        fork = past.fork(options.get("num_beams", 1))
        mask = ones(question.shape[0], rows=1)
        out = model.generate(question[None], attention_mask=mask, past_key_values=fork, **PLAIN, **options)
        expected = model.generate(behind(book, question), **PLAIN, **options)
        assert same_bits(out, expected[:, BOOK:])


def test_a_batch_of_questions_is_asked_at_once():
    model, book, questions, past = asked()
    lengths = [QUESTION, 6, 11]
    batch, mask = padded(questions, lengths, "left")
    mask = torch.cat([ones(0, rows=3), mask], 1)
    out = model.generate(batch, attention_mask=mask, past_key_values=past.fork(3), **PLAIN)
    for row, length in enumerate(lengths):
        text = behind(book, questions[row, :length])
        assert same_bits(out[row, QUESTION:], model.generate(text, **PLAIN)[0, BOOK + length :])


def test_a_fork_takes_back_its_own_tokens_only():
    model, book, questions, past = asked()
    forks = [past.fork(), past.fork()]
    for fork, question in zip(forks, questions, strict=False):
        read(model, question[None, :6], fork, 6)
    forks[0].crop(-4)
    logits = [
        read(model, question[None, n:], fork, 1) for fork, question, n in zip(forks, questions, (2, 6), strict=False)
    ]
    for out, question in zip(logits, questions, strict=False):
        expected = whole(model, behind(book, question))
        assert difference(out, expected[:, -out.shape[1] :]) < CLOSE


@pytest.mark.parametrize(("free", "place"), [(1 << 40, "device"), (1 << 13, "disk")])
def test_auto_lays_chunks_where_there_is_room(free, place, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_free_host_bytes", lambda: free)
    model, book = tiny_model(), random_ids(1, BOOK)
    past = model.prefill(book, past_key_values=ChunkMemoryCache(model.config, "auto"), segment_length=20)
    assert past.memory.location == place
    more = random_ids(1, 6, seed=2)
    expected = whole(model, torch.cat([book, more], 1))[:, -6:]
    assert difference(read(model, more, past.fork()), expected) < CLOSE
    past.save(tmp_path / "book", model)
    loaded = ChunkMemoryCache.load(tmp_path / "book", model, "auto")
    assert loaded.memory.location == place and difference(read(model, more, loaded), expected) < CLOSE
    # what is read in a pass alone counts too, and a short text has room anywhere
    assert model(
        book[:, :10], past_key_values=ChunkMemoryCache(model.config, "auto")
    ).past_key_values.memory.location == ("device")


def test_auto_needs_a_system_that_says_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / "absent")
    with pytest.raises(ValueError, match='location="auto" needs /proc/meminfo'):
        tiny_model().prefill(random_ids(1, 9), past_key_values=ChunkMemoryCache(tiny_model().config, "auto"))
