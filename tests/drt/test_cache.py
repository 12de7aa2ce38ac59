"""ChunkMemoryCache: rows may be moved, repeated, dropped and cut, and what follows is what a fresh reading gives."""

import copy
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_insnext import ChunkMemoryCache
from modeling_insnext.drt.cache import Tail
from tests.support.drt import padded, random_ids, read, tiny_model, whole


LOCATIONS = ("device", "host", "disk")
CLOSE = {"rtol": 0, "atol": 1e-10}


def filled(model, ids, location="device", step=7, mask=None, **options):
    past = ChunkMemoryCache(model.config, location, **options)
    read(model, ids, past, step, mask)
    return past


@pytest.mark.parametrize("location", LOCATIONS)
def test_reordered_rows_go_on_as_the_rows_they_came_from(location):
    model, ids, more = tiny_model(), random_ids(3, 38), random_ids(3, 17, seed=1)
    past = filled(model, ids, location)
    rows = torch.tensor([2, 0, 2])
    past.reorder_cache(rows)
    first = read(model, more[:, :9], past)
    past.reorder_cache(torch.tensor([1, 1, 0]))
    second = read(model, more[:, 9:], past)
    text = torch.cat([ids[rows], more[:, :9]], 1)
    expected = whole(model, text)[:, 38:]
    torch.testing.assert_close(first, expected, **CLOSE)
    text = torch.cat([text[[1, 1, 0]], more[:, 9:]], 1)
    torch.testing.assert_close(second, whole(model, text)[:, 47:], **CLOSE)
    assert past.memory.counts == [11] * 3 and past.memory.used == 3 * 7 + 3 * 2 + 3 * 2


def test_reordering_needs_the_table_of_places_and_what_serves_the_chunk_in_progress():
    model, ids, more = tiny_model(), random_ids(2, 38), random_ids(2, 9, seed=1)
    expected = whole(model, torch.cat([ids.flip(0), more], 1))[:, 38:]
    for forget in ("memory", "served", "nothing"):
        past = filled(model, ids, "host", step=1)
        table, served = past.memory.table.clone(), [copy.copy(fetch) for fetch in past.served]
        past.reorder_cache(torch.tensor([1, 0]))
        if forget == "memory":
            past.memory.table, past.served = table, [None, None]
        elif forget == "served":
            past.served = served
        wrong = not torch.allclose(read(model, more, past), expected, **CLOSE)
        assert wrong == (forget != "nothing"), forget


def test_repeated_rows_share_chunks_and_then_part():
    model, ids, more = tiny_model(), random_ids(2, 31), random_ids(6, 20, seed=1)
    past = filled(model, ids, "host")
    used = past.memory.used
    past.batch_repeat_interleave(3)
    assert past.memory.used == used
    logits = read(model, more, past)
    text = torch.cat([ids.repeat_interleave(3, 0), more], 1)
    torch.testing.assert_close(logits, whole(model, text)[:, 31:], **CLOSE)


@pytest.mark.parametrize("chosen", [[2, 0], [False, True, True]])
def test_chosen_rows_stay(chosen):
    model, ids, more = tiny_model(), random_ids(3, 31), random_ids(2, 9, seed=1)
    past = filled(model, ids)
    past.batch_select_indices(torch.tensor(chosen))
    text = torch.cat([ids[torch.tensor(chosen)], more], 1)
    torch.testing.assert_close(read(model, more, past), whole(model, text)[:, 31:], **CLOSE)


@pytest.mark.parametrize(
    "margin, changes",
    [(13, {}), (5, {"sliding_window": None}), (5, {"retriever": "fixed", "landmark_source": "mean"})],
)
def test_cropped_text_goes_on_as_if_never_read(margin, changes):
    model, ids, more = tiny_model(**changes), random_ids(1, 33), random_ids(1, 14, seed=1)
    # five lengths: every place of a chunk
    for length in range(29, 34):
        read_once = filled(model, ids[:, :length], "host", 9, crop_margin=margin)
        for n in range(1, margin + 3):
            past = copy.deepcopy(read_once)
            try:
                past.crop(-n)
            except ValueError:
                assert n > margin
                continue
            assert (past.columns, past.seen) == (length - n, [length - n])
            text = torch.cat([ids[:, : length - n], more], 1)
            logits = read(model, more, past, 9)
            torch.testing.assert_close(logits, whole(model, text)[:, length - n :], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_are_cropped_by_columns(side):
    model, ids, more = tiny_model(), random_ids(3, 33), random_ids(3, 11, seed=1)
    lengths = [33, 29, 12]
    text, mask = padded(ids, lengths, side)
    for n in range(1, 6):
        past = filled(model, text, mask=mask)
        past.crop(-n)
        kept = mask[:, :-n].sum(1).tolist()
        assert past.seen == kept
        full_mask = torch.cat([mask[:, :-n], torch.ones_like(more)], 1)
        logits = read(model, more, past, 3, full_mask)
        for row, length in enumerate(kept):
            alone = whole(model, torch.cat([ids[row : row + 1, :length], more[row : row + 1]], 1))
            torch.testing.assert_close(logits[row], alone[0, length:], **CLOSE)


@pytest.mark.parametrize("part", ["states", "found", "memory", "keys"])
def test_crop_must_cut_every_part(part, monkeypatch):
    model, ids, more = tiny_model(), random_ids(1, 32), random_ids(1, 40, seed=1)
    past = filled(model, ids)
    if part == "memory":
        monkeypatch.setattr(past.memory, "forget", lambda chunks: None)
    else:
        held = [tail for name, tail in past.named_tails().items() if name.startswith(part)]
        drop = Tail.drop
        monkeypatch.setattr(Tail, "drop", lambda self, counts: None if self in held else drop(self, counts))
    past.crop(-4)
    text = torch.cat([ids[:, :28], more], 1)
    try:
        wrong = not torch.allclose(read(model, more, past, 4), whole(model, text)[:, 28:], **CLOSE)
    except (RuntimeError, IndexError):
        wrong = True
    assert wrong


@pytest.mark.parametrize("n, rule", [(-9, "at most crop_margin=5"), (-33, "at most the 32"), (1, "negative")])
def test_a_crop_too_far_is_refused_and_changes_nothing(n, rule):
    model, ids, more = tiny_model(), random_ids(2, 32), random_ids(2, 9, seed=1)
    past = filled(model, ids)
    with pytest.raises(ValueError, match=rule):
        past.crop(n)
    text = torch.cat([ids, more], 1)
    torch.testing.assert_close(read(model, more, past), whole(model, text)[:, 32:], **CLOSE)


def test_short_texts_can_be_cropped_to_nothing():
    model, ids = tiny_model(), random_ids(1, 6)
    past = filled(model, ids)
    past.crop(-6)
    assert past.seen == [0] and past.get_seq_length() == 0
    torch.testing.assert_close(read(model, ids.flip(1), past), whole(model, ids.flip(1)), **CLOSE)


def test_the_sequence_length_counts_padding_and_reset_forgets_it():
    model, ids = tiny_model(), random_ids(2, 20)
    text, mask = padded(ids, [20, 14], "left")
    past = filled(model, text, mask=mask)
    assert past.get_seq_length() == 20 and past.seen == [20, 14]
    past.reset()
    assert past.get_seq_length() == 0 and past.device_bytes() == 0 and not past.is_initialized
    # another number of rows is fine now
    torch.testing.assert_close(read(model, ids[:1], past, 6), whole(model, ids[:1]), **CLOSE)


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_copied_cache_is_independent(location):
    model, ids, more = tiny_model(), random_ids(2, 33), random_ids(2, 40, seed=1)
    past = filled(model, ids, location)
    twin = copy.deepcopy(past)
    read(model, more.flip(1), past, 6)
    logits = read(model, more, twin, 6)
    torch.testing.assert_close(logits, whole(model, torch.cat([ids, more], 1))[:, 33:], **CLOSE)
    shared = copy.copy(past)
    read(model, more, shared, 6)
    text = torch.cat([ids, more.flip(1), more], 1)
    # control: a shallow copy shares windows and chunks
    assert not torch.allclose(read(model, more, past, 6), whole(model, text)[:, 73:], **CLOSE)


def test_threads_with_a_cache_each_do_not_disturb_one_another():
    model, ids = tiny_model(), random_ids(4, 60)
    expected, results = whole(model, ids), {}

    def run(row):
        past = ChunkMemoryCache(model.config, LOCATIONS[row % 3])
        results[row] = read(model, ids[row : row + 1], past, 1 + row)[0]

    threads = [threading.Thread(target=run, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in range(4):
        torch.testing.assert_close(results[row], expected[row], **CLOSE)


class MadeBytes(TorchDispatchMode):
    """Counts the bytes of every tensor an operator makes, views left out."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.total += tensor.nbytes
                self.largest = max(self.largest, tensor.nbytes)
        return out


def bytes_of_a_step(model, length, location):
    ids = random_ids(1, length + 1)
    past = filled(model, ids[:, :-1], location, step=200)
    with MadeBytes() as made:
        read(model, ids[:, -1:], past)
    return made.total


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_decode_step_inside_a_chunk_moves_as_much_at_any_length(location):
    model = tiny_model()
    assert bytes_of_a_step(model, 81, location) == bytes_of_a_step(model, 811, location)
    # control: a window over everything does not
    model = tiny_model(sliding_window=None)
    assert bytes_of_a_step(model, 81, location) < bytes_of_a_step(model, 811, location)


@pytest.mark.parametrize("step", [6, 150])
def test_the_cache_on_the_device_grows_by_landmarks_and_places_alone(step):
    model, ids = tiny_model(), random_ids(1, 450)
    held = []
    for length in (150, 450):
        past = filled(model, ids[:, :length], "host", step)
        held.append((past.device_bytes() - past.memory.device_bytes(), past.memory.device_bytes()))
    assert held[0][0] == held[1][0]
    # room for 64 and 128 chunks, each a landmark of 32 numbers and a number in the table
    assert [bytes_of_memory for _, bytes_of_memory in held] == [64 * 33 * 8, 128 * 33 * 8]


def test_a_long_prefill_leaves_no_long_tensors_behind():
    model, ids = tiny_model(), random_ids(1, 500)
    past = filled(model, ids, step=500)
    for name, tail in past.named_tails().items():
        longest = 2 * tail.places * tail.tensor.numel() // max(tail.tensor.shape[tail.dim], 1) * tail.tensor.itemsize
        assert tail.nbytes() <= longest, name
    # control: a view keeps the storage of what it views
    keys = past.keys[0].tensor
    assert keys.new_zeros(1, 2, 500, 8)[:, :, -10:].untyped_storage().nbytes() > 10 * past.keys[0].nbytes()


def test_a_cache_of_another_batch_is_refused():
    model, ids = tiny_model(), random_ids(3, 12)
    past = filled(model, ids[:2])
    with pytest.raises(ValueError, match="holds 2 rows, got input of 3"):
        read(model, ids, past)


@pytest.mark.parametrize(
    "options, rule",
    [
        ({"location": "tape"}, "location must be one of"),
        ({"search": "hnsw"}, "search must be"),
        ({"crop_margin": -1}, "crop_margin must be at least 0"),
        ({"location": "host", "folder": "here"}, 'folder needs location="disk"'),
    ],
)
def test_unknown_choices_are_refused(options, rule):
    with pytest.raises(ValueError, match=rule):
        ChunkMemoryCache(tiny_model().config, **options)
