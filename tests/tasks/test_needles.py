"""Where needles, questions and answers stand, what they say, and what decides it."""

import dataclasses
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext.tasks import NeedleTask, draw_needles
from modeling_insnext.tasks.needles import BLOCK, NOISE, PHRASES, haystack_blocks
from tests.support import forked


KINDS = list(NOISE)
MINI = Path(__file__).parents[2] / "examples" / "checkpoints" / "insnext-mini"


class CharTokenizer:
    """One id a character, 1 to 127, then `extra` ids no phrase has; 0 is special."""

    all_special_ids = [0]

    def __init__(self, extra=400):
        self.extra = extra

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(char) for char in text]

    def __len__(self):
        return 128 + self.extra

    def decode(self, ids):
        """Text, a random id as `<id>`."""
        return "".join(chr(i) if 0 < i < 128 else f"<{i}>" for i in ids.tolist())


CHARS = CharTokenizer()
# ids no needle can draw: all of the haystack is told from the needles
HAYSTACK = np.random.default_rng(0).integers(528, 900, 20_000).astype(np.uint16)
EXTRA = (128, 528)


def make_task(kind, **options):
    return NeedleTask(kind, CHARS, **{"id_range": EXTRA, **options})


def occurrences(text, part):
    windows = np.lib.stride_tricks.sliding_window_view(text, len(part))
    return np.flatnonzero((windows == part).all(1)).tolist()


def broken_rules(sample, chunk_size, num_noise):
    """The rules of the module that a sample breaks, read from nothing but its ids and what it says about itself."""
    ids, questions = sample.input_ids, sample.questions
    first, length = questions[0], len(ids)
    limit = min(first.end - chunk_size, first.start)
    free = limit - sum(stop - start for start, stop in sample.needles)
    spans = sorted([*sample.needles, *((q.start, q.stop) for q in questions)])
    in_front = [start - sum(b - a for a, b in sample.needles if a < start) for start, _ in sample.needles]
    haystack = np.ones(length, dtype=bool)
    for start, stop in spans:
        haystack[start:stop] = False
    rules = {
        "apart": all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)),
        "inside": spans[0][0] >= 0 and spans[-1][1] <= length,
        "two chunks": all(stop <= length - 2 * chunk_size for _, stop in sample.needles),
        "limit": all(stop <= limit for _, stop in sample.needles),
        "once": all(occurrences(ids, ids[a:b]) == [a] for a, b in sample.needles),
        "depth": np.allclose(np.array(sample.depths) * free, in_front, atol=1e-6 * length),
        "aligned": all(q.end % chunk_size == 0 for q in questions),
        "last chunk": questions[-1].end == length - chunk_size,
        "one chunk": all(q.stop <= q.end + chunk_size for q in questions),
        "haystack": (ids[haystack] >= 528).all() and (ids[~haystack] < 528).all(),
        "answers": all(told(sample, question) == sample.kind for question in questions),
        "noise": len(sample.needles) == (len(questions) + num_noise) * (1 + (sample.kind == "two_hop")),
        "labels": expected_labels(sample) == sample.labels.tolist(),
    }
    return {name for name, kept in rules.items() if not kept}


def expected_labels(sample):
    answers = {i for q in sample.questions for i in range(q.end + 1, q.stop)}
    return [int(token) if i in answers else -100 for i, token in enumerate(sample.input_ids)]


def told(sample, question):
    """The kind whose needles, looked up by the words of the question in the whole text, give its answer; or None."""
    text = CHARS.decode(sample.input_ids[: question.start])
    asked = CHARS.decode(sample.input_ids[question.start : question.end + 1])
    answer = CHARS.decode(sample.input_ids[question.answer])

    def between(opening, closing):
        parts = text.split(opening)
        return parts[1].split(closing)[0] if len(parts) == 2 else None

    if asked == "|What is the passkey? The passkey is":
        return "passkey" if between("|The passkey is:", "|") == answer else None
    if asked.startswith("|The special magic number for"):
        key = asked.removeprefix("|The special magic number for").removesuffix("is")
        return "multi_key" if between(f"|One of the special magic numbers for{key}is", "|") == answer else None
    a = asked.removeprefix("|The path from").removesuffix("is")
    b = between(f"|DEF{a}->", "|")
    return "two_hop" if f"{b},{between(f'|DEF{b}->', '|')}" == answer else None


options = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "chunk_size": st.integers(14, 70),
        "num_ids": st.integers(1, 6),
        "num_questions": st.integers(1, 4),
        "num_noise": st.integers(0, 4),
        "key_ids": st.none() | st.integers(1, 4),
    }
)


@given(options=options, more=st.integers(0, 12), index=st.integers(0, 99), size=st.integers(1, 3000))
@settings(max_examples=150, deadline=None)
def test_samples_keep_the_rules_at_every_length(options, more, index, size):
    if options["kind"] != "multi_key":
        options["key_ids"] = None
    if options["kind"] == "passkey":
        options |= {"num_questions": 1, "num_noise": 0}
    task = make_task(**options)
    length = task.min_length + more * task.chunk_size
    sample = draw_needles(task, HAYSTACK[:size], length, index)
    assert broken_rules(sample, task.chunk_size, options["num_noise"]) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_numbers_of_needles_and_ids(kind):
    sample = draw_needles(make_task(kind), HAYSTACK, 2048, 0)
    assert broken_rules(sample, 64, NOISE[kind]) == set()
    assert len(sample.needles) == {"passkey": 1, "multi_key": 6, "two_hop": 4}[kind]
    assert (sample.labels != -100).sum() == {"passkey": 5, "multi_key": 5, "two_hop": 11}[kind]
    assert sample.questions[0].end == 2048 - 64 and len(sample.questions) == 1


def test_control_every_rule_notices_its_breach():
    task = make_task("two_hop", num_questions=2)
    sample = draw_needles(task, HAYSTACK, 1024, 0)
    (start, stop), question = sample.needles[0], sample.questions[1]

    def after(ids=None, **changes):
        broken = dataclasses.replace(sample, **changes)
        if ids is not None:
            broken = dataclasses.replace(broken, input_ids=np.array(ids))
        return broken_rules(broken, 64, 1)

    ids = sample.input_ids
    twice, gone, other = ids.copy(), ids.copy(), ids.copy()
    free = next(at for at in range(0, 900, 40) if (ids[at : at + stop - start] >= 528).all())
    twice[free : free + stop - start] = ids[start:stop]
    gone[start:stop] = 600
    other[question.end + 1] = 128 + (other[question.end + 1] - 127) % 400
    assert after() == set()
    assert "once" in after(twice)
    assert {"haystack", "answers"} <= after(gone)
    assert after(other) == {"answers"}
    assert "noise" in after(needles=sample.needles[:-1], depths=sample.depths[:-1])
    assert "depth" in after(depths=(sample.depths[0] + 0.01, *sample.depths[1:]))
    assert {"two chunks", "limit"} <= after(needles=((900, 919), *sample.needles[1:]))
    assert "apart" in after(needles=((sample.needles[1][0] + 1, sample.needles[1][1] + 1), *sample.needles[1:]))
    late = (sample.questions[0], question._replace(start=question.start + 1, end=question.end + 1))
    assert {"aligned", "last chunk"} <= after(questions=late)
    assert broken_rules(sample, 32, 1) >= {"last chunk"}


def test_several_questions_ask_for_different_facts_and_leave_no_chunk_unused():
    task = make_task("multi_key", num_questions=5, num_noise=2)
    sample = draw_needles(task, HAYSTACK, 2048, 0)
    assert [q.end for q in sample.questions] == [2048 - 64 * i for i in (5, 4, 3, 2, 1)]
    assert len({tuple(sample.input_ids[q.answer]) for q in sample.questions}) == 5
    assert len({q.needles for q in sample.questions}) == 5
    # 35 tokens of question, 5 of answer: every third chunk of 14
    narrow = draw_needles(make_task("multi_key", num_questions=3, chunk_size=14), HAYSTACK, 56 * 14, 0)
    assert [q.end // 14 for q in narrow.questions] == [49, 52, 55]
    # 17 tokens of question, 3 of answer: every chunk of 20, every second one of 19
    for chunk_size, apart in ((20, 1), (19, 2)):
        task = make_task("two_hop", num_questions=3, chunk_size=chunk_size, num_ids=1)
        sample = draw_needles(task, HAYSTACK, 40 * chunk_size, 0)
        assert sample.questions[0].stop - sample.questions[0].start == 20
        assert np.diff([q.end // chunk_size for q in sample.questions]).tolist() == [apart, apart]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shortest_text_is_as_short_as_can_be(kind):
    task = make_task(kind, chunk_size=32)
    sample = draw_needles(task, HAYSTACK, task.min_length, 0)
    limit = min(sample.questions[0].end - 32, sample.questions[0].start)
    assert limit - 32 < sum(b - a for a, b in sample.needles) <= limit


def chi_square(counts):
    counts = np.asarray(counts, dtype=float)
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


@pytest.mark.parametrize(("kind", "needle"), [("passkey", 0), ("multi_key", 0), ("multi_key", 5), ("two_hop", 1)])
def test_depth_is_uniform(kind, needle):
    depths = np.array([draw_needles(make_task(kind), HAYSTACK, 4096, i).depths[needle] for i in range(800)])
    # 9 degrees of freedom: 27.9 is the 0.1 % point
    assert chi_square(np.histogram(depths, 10, (0, 1))[0]) < 27.9
    # control: the depth of the deepest of six needles is not uniform
    assert chi_square(np.histogram(depths ** (1 / 6), 10, (0, 1))[0]) > 200


def test_a_passkey_may_stand_at_every_place_and_nowhere_else():
    task = make_task("passkey", chunk_size=36, num_ids=1)
    length = task.min_length + 36
    starts = Counter(draw_needles(task, HAYSTACK, length, i).needles[0][0] for i in range(1500))
    assert set(starts) == set(range(length - 2 * 36 - 18 + 1))
    assert chi_square(list(starts.values())) < len(starts) + 4 * np.sqrt(2 * len(starts))


def test_needles_come_in_any_order():
    orders = Counter(
        tuple(np.argsort([start for start, _ in draw_needles(make_task("two_hop"), HAYSTACK, 1024, i).needles]))
        for i in range(1200)
    )
    # 23 degrees of freedom: 49.7 is the 0.1 % point
    assert len(orders) == 24 and chi_square(list(orders.values())) < 49.7


def test_needles_without_haystack_between_them_come_in_any_order_too():
    task = make_task("two_hop", chunk_size=29, num_noise=0, num_ids=3)
    assert task.min_length - sum(b - a for a, b in draw_needles(task, HAYSTACK, task.min_length, 0).needles) < 87
    samples = [draw_needles(task, HAYSTACK, task.min_length, i) for i in range(400)]
    ties = [s.needles[0] < s.needles[1] for s in samples if s.depths[0] == s.depths[1]]
    assert len(ties) > 10 and 0 < sum(ties) < len(ties)


def test_random_ids_are_uniform_over_the_allowed_ones():
    task = make_task("passkey", id_range=(120, 150))
    counts = Counter()
    for i in range(800):
        sample = draw_needles(task, HAYSTACK, 512, i)
        counts.update(sample.input_ids[sample.questions[0].answer].tolist())
    taken = {ord(char) for phrase in PHRASES for char in phrase} | {0}
    assert set(counts) == set(range(120, 150)) - taken == set(task.allowed_ids.tolist())
    assert len(counts) < 30 and chi_square(list(counts.values())) < 60


def test_no_two_strings_are_equal_when_all_of_them_are_needed():
    task = make_task("two_hop", num_ids=2, num_noise=2, id_range=(128, 131))
    text = draw_needles(task, HAYSTACK, 1024, 0)
    variables = {tuple(text.input_ids[a + 4 : a + 6]) for a, _ in text.needles}
    variables |= {tuple(text.input_ids[b - 3 : b - 1]) for _, b in text.needles}
    assert variables == {(a, b) for a in range(128, 131) for b in range(128, 131)}
    with pytest.raises(ValueError, match="must allow 12 distinct strings of 2 ids, got 3 ids"):
        make_task("two_hop", num_ids=2, num_noise=3, id_range=(128, 131))


PRINT = """
import hashlib
from tests.tasks.test_needles import HAYSTACK, KINDS, draw_needles, make_task
for kind in KINDS:
    sample = draw_needles(make_task(kind), HAYSTACK, 1024, 7, 3, 1)
    print(hashlib.sha256(sample.input_ids.tobytes()).hexdigest(), sample.needles, sample.depths)
"""


def test_a_sample_is_the_same_in_another_process_and_after_other_draws():
    run = forked.run([sys.executable, "-c", PRINT], Path(__file__).parents[2], dict(os.environ), forked.READING)
    assert run.returncode == 0, run.stderr
    np.random.seed(5)
    here = []
    for kind in reversed(KINDS):
        draw_needles(make_task(kind), HAYSTACK, 1024, 8, 3, 1)
        sample = draw_needles(make_task(kind), HAYSTACK, 1024, 7, 3, 1)
        digest = hashlib.sha256(sample.input_ids.tobytes()).hexdigest()
        here.append(f"{digest} {sample.needles} {sample.depths}")
    assert run.stdout.splitlines() == here[::-1]


def test_index_seed_epoch_and_length_each_make_another_sample():
    def answer(length=1024, index=7, seed=3, epoch=1):
        sample = draw_needles(make_task("passkey"), HAYSTACK, length, index, seed, epoch)
        return tuple(sample.input_ids[sample.questions[0].answer].tolist())

    others = [answer(), answer(1088), answer(index=8), answer(seed=4), answer(epoch=2), answer(index=3, seed=7)]
    assert len(set(others)) == len(others) and answer() == others[0]


@pytest.mark.parametrize("size", [1, 7, 1023, 1024, 5000])
def test_the_haystack_is_read_cyclically_from_a_random_start(size):
    haystack = np.arange(528, 528 + size)
    starts = set()
    for index in range(20):
        sample = draw_needles(make_task("passkey"), haystack, 1024, index)
        kept = sample.input_ids >= 528
        shift = (sample.input_ids - 528 - np.arange(1024))[kept] % size
        assert len(set(shift.tolist())) == 1
        starts.add(int(shift[0]))
        if size >= 1024:
            assert (np.diff(sample.input_ids[kept]) > 0).all()
    assert len(starts) > 5 or size in (1, 1024) or size == 7 and len(starts) > 3


@pytest.mark.parametrize(("size", "first", "length"), [(3, 2, BLOCK + 10), (BLOCK + 5, BLOCK, 2 * BLOCK + 99)])
def test_blocks_join_to_the_cyclic_text(size, first, length):
    haystack = np.arange(size)
    blocks = list(haystack_blocks(haystack, first, length))
    assert len(blocks) < 8 and [at for at, _ in blocks] == [0, *np.cumsum([len(b) for _, b in blocks])[:-1]]
    assert (np.concatenate([block for _, block in blocks]) == (first + np.arange(length)) % size).all()


def test_a_real_tokenizer_writes_the_phrases():
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(MINI / "tokenizer.json"))
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"})
    sample = draw_needles(NeedleTask("passkey", tokenizer), HAYSTACK, 512, 0)
    (start, stop), question = sample.needles[0], sample.questions[0]
    needle = tokenizer.decode(sample.input_ids[start:stop])
    answer = tokenizer.decode(sample.input_ids[question.answer])
    asked = tokenizer.decode(sample.input_ids[question.start : question.end + 1])
    assert needle.split() == f"|The passkey is: {answer} |".split()
    assert asked.strip() == "|What is the passkey? The passkey is"


def test_a_tokenizer_without_the_marks_is_refused():
    class NoBar(CharTokenizer):
        def encode(self, text, add_special_tokens=True):
            return [0 if char == "|" else ord(char) for char in text]

    with pytest.raises(ValueError, match=r"must write '\|' without special tokens, got ids \[0\]"):
        NeedleTask("passkey", NoBar())


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("needle", {}, "kind must be one of passkey, multi_key, two_hop, got 'needle'"),
        ("passkey", {"num_ids": 0}, "num_ids must be an integer of at least 1, got 0"),
        ("passkey", {"num_ids": 2.0}, "num_ids must be an integer of at least 1, got 2.0"),
        ("passkey", {"chunk_size": 5}, "chunk_size must be at least 6.*got 5"),
        ("two_hop", {"chunk_size": 11}, "chunk_size must be at least 12.*got 11"),
        ("passkey", {"chunk_size": 1}, "chunk_size must be an integer of at least 2, got 1"),
        ("passkey", {"num_questions": 2}, "num_questions must be 1 for passkey.*got 2"),
        ("passkey", {"num_noise": 1}, "num_noise must be 0 for passkey.*got 1"),
        ("two_hop", {"num_noise": -1}, "num_noise must be an integer of at least 0, got -1"),
        ("two_hop", {"key_ids": 3}, "key_ids is for multi_key only, got 3 for two_hop"),
        ("multi_key", {"key_ids": 0}, "key_ids must be an integer of at least 1, got 0"),
        ("multi_key", {"num_questions": 0}, "num_questions must be an integer of at least 1, got 0"),
        ("multi_key", {"id_range": (5, 5)}, r"id_range must be \(low, high\).*got \(5, 5\)"),
        ("multi_key", {"id_range": (0, 529)}, r"high <= 528, got \(0, 529\)"),
        ("multi_key", {"id_range": (128, 133), "key_ids": 1}, "6 distinct strings of 1 ids, got 5 ids"),
        ("passkey", {"id_range": (124, 125)}, "1 distinct strings of 5 ids, got 0 ids"),
    ],
)
def test_bad_tasks(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        make_task(kind, **changes)


@pytest.mark.parametrize(
    ("haystack", "numbers", "message"),
    [
        (HAYSTACK[:0], {}, "haystack must have at least one token, got 0 tokens"),
        (HAYSTACK.astype(float), {}, r"haystack must be .* integers \[N\], got float64 \(20000,\)"),
        (HAYSTACK[None], {}, r"got uint16 \(1, 20000\)"),
        (HAYSTACK.tolist(), {}, "haystack must be a numpy array .*got list"),
        (HAYSTACK, {"length": 1000}, "length must be a multiple of chunk_size, 64, got 1000"),
        (HAYSTACK, {"length": 128}, "length must be at least 192.*got 128"),
        (HAYSTACK, {"length": -64}, "length must be an integer of at least 0, got -64"),
        (HAYSTACK, {"index": -1}, "index must be an integer of at least 0, got -1"),
        (HAYSTACK, {"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
        (HAYSTACK, {"epoch": 0.5}, "epoch must be an integer of at least 0, got 0.5"),
    ],
)
def test_bad_requests(haystack, numbers, message):
    with pytest.raises(ValueError, match=message):
        draw_needles(make_task("passkey"), haystack, **{"length": 512, "index": 0, **numbers})


def test_a_task_can_be_changed_with_replace():
    task = dataclasses.replace(make_task("multi_key"), kind="two_hop", num_ids=2)
    assert broken_rules(draw_needles(task, HAYSTACK, 512, 0), 64, 1) == set()
