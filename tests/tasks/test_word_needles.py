"""Needles in words: where they stand, what they say, what decides it, and that answers are found by reading alone."""

import dataclasses
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from modeling_insnext.tasks import (
    FILLER,
    WORD_KINDS,
    NeedleDataset,
    NeedleTally,
    NeedleTask,
    WordNeedleTask,
    draw_needles,
    generated_score,
    needles,
    read_haystack,
    word_needles,
    write_needles,
)
from modeling_insnext.tasks.word_needles import REACH


MINI = Path(__file__).parents[2] / "examples" / "checkpoints" / "insnext-mini"


class CharTokenizer:
    """One id a character; 0 is special."""

    all_special_ids = [0]

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(char) for char in text]

    def __len__(self):
        return 128

    def decode(self, ids):
        return "".join(map(chr, ids))


CHARS = CharTokenizer()
RNG = np.random.default_rng(0)
SENTENCES = [f"{''.join(RNG.choice(list('abcdefgh    '), RNG.integers(10, 60)))}." for _ in range(400)]
HAYSTACK = np.array(CHARS.encode(" ".join(SENTENCES), False), dtype=np.uint8)
OPTIONS = {
    "passkey": [{}, {"num_digits": 12}],
    "multi_key": [{}, {"num_noise": 9, "num_questions": 3}],
    "multi_value": [{}, {"num_values": 5}],
    "variable_tracking": [{"hops": n} for n in (1, 2, 3, 4)] + [{"num_questions": 2, "num_noise": 0}],
    "common_words": [{}, {"common_count": 4, "num_noise": 2}],
}
CASES = [(kind, options) for kind in WORD_KINDS for options in OPTIONS[kind]]
every_case = pytest.mark.parametrize(("kind", "options"), CASES)


def task_of(kind, **options):
    return WordNeedleTask(kind, CHARS, **{"chunk_size": 80, **options})


def found_by_reading(text, asked):
    """The answer to a question, looked up in the text by regular expressions and nothing else."""
    if "passkey" in asked:
        return re.findall(r"The passkey is (\d+)\.", text)
    if "VAR" in asked:
        name = re.search(r"value of VAR (\w+)\?", asked)[1]
        while not name.isdigit():
            (name,) = re.findall(rf"VAR {name} = (?:VAR )?(\w+)\.", text)
        return [name]
    if "words of the list" in asked:
        listed = re.findall(r"A word of the list is (\w+)\.", text)
        common = [word for word, _ in Counter(listed).most_common(3)]
        return sorted(common, key=listed.index)
    key = re.search(r"special magic numbers? for (\w+ \w+)\?", asked)[1]
    return re.findall(rf"One of the special magic numbers for {key} is (\d+)\.", text)


def broken_rules(task, sample, length):
    ids, S = sample.input_ids, task.chunk_size
    spans = sorted([*sample.needles, *((q.start, q.stop) for q in sample.questions)])
    rest = np.concatenate(
        [ids[b:a] for (_, b), (a, _) in zip([(0, 0), *spans], [*spans, (len(ids),) * 2], strict=True)]
    )
    again = np.tile(HAYSTACK, 5).tobytes()
    prompt = CHARS.decode(ids[: sample.questions[0].start])
    hidden = re.findall(r"\d+", prompt)
    rules = {
        "length": len(ids) == length,
        "haystack": rest.astype(np.uint8).tobytes() in again,
        "apart": all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)),
        "two chunks": all(stop <= sample.questions[0].end - S for _, stop in sample.needles),
        # where there is room for sentences
        "between sentences": length < 8000 or all(CHARS.decode(ids[a - 1 : a]) == "." for a, _ in sample.needles if a),
        "aligned": all(q.end % S == 0 for q in sample.questions) and sample.questions[-1].end == length - S,
        "once": len(set(hidden)) == len(hidden),
        "whole needles": all(CHARS.decode(ids[a:b])[0] == " " and ids[b - 1] == ord(".") for a, b in sample.needles),
        "labels": sum(sample.labels >= 0) == sum(q.stop - q.end - 1 for q in sample.questions),
    }
    for q in sample.questions:
        answer = CHARS.decode(ids[q.answer])
        found = found_by_reading(prompt, CHARS.decode(ids[q.start : q.end + 1]))
        rules["answers"] = rules.get("answers", True) and answer == f" {', '.join(found)}."
        mine = "".join(CHARS.decode(ids[a:b]) for a, b in (sample.needles[n] for n in q.needles))
        rules["own needles"] = rules.get("own needles", True) and all(word in mine for word in found)
    return {name for name, kept in rules.items() if not kept}


@every_case
def test_samples_keep_the_rules_at_every_length(kind, options):
    task = task_of(kind, **options)
    for index, length in enumerate([task.min_length, task.min_length + 80, 8000, 40_000]):
        assert broken_rules(task, draw_needles(task, HAYSTACK, length, index), length) == set()
    with pytest.raises(ValueError, match=f"length must be at least {task.min_length}"):
        draw_needles(task, HAYSTACK, task.min_length - 80, 0)


def test_control_every_rule_notices_its_breach():
    task = task_of("multi_value")
    sample = draw_needles(task, HAYSTACK, 8000, 0)
    a, b = sample.needles[sample.questions[0].needles[1]]

    def changed(**fields):
        return broken_rules(task, dataclasses.replace(sample, **fields), 8000)

    def written(place, text):
        ids = sample.input_ids.copy()
        ids[place : place + len(text)] = CHARS.encode(text, False)
        return changed(input_ids=ids)

    assert changed() == set()
    assert changed(input_ids=sample.input_ids[:-1]) == {"length"}
    assert written(b - 3, "xx") >= {"answers"}
    assert written(a - 1, ",") == {"between sentences", "haystack"}
    assert written(5, CHARS.decode(sample.input_ids[b - 8 : b - 1])) >= {"once", "haystack"}
    moved = [question._replace(needles=(0,)) for question in sample.questions]
    assert sample.questions[0].needles != (0,) and changed(questions=tuple(moved)) == {"own needles"}


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_grid_of_depths_places_the_first_needle_and_its_chain_behind_it(depth):
    for kind in ("passkey", "variable_tracking", "multi_key"):
        task = task_of(kind, depth=depth)
        for index in range(4):
            sample = draw_needles(task, HAYSTACK, 8000, index)
            own = sample.questions[0].needles
            free = task._limit(8000) - sum(b - a for a, b in sample.needles)
            assert abs(sample.depths[own[0]] * free - round(depth * free)) <= REACH
            assert list(own) == sorted(own)
    # control: without it they stand anywhere
    anywhere = [draw_needles(task_of("passkey"), HAYSTACK, 8000, index).depths[0] for index in range(20)]
    assert min(anywhere) < 0.25 and max(anywhere) > 0.75


def test_seed_epoch_length_and_index_decide_and_nothing_else():
    task = task_of("multi_key")
    first = draw_needles(task, HAYSTACK, 8000, 3, seed=1)
    again = draw_needles(task_of("multi_key"), HAYSTACK, 8000, 3, seed=1)
    assert np.array_equal(first.input_ids, again.input_ids) and first.needles == again.needles
    for other in ((8000, 4, 1, 0), (8000, 3, 2, 0), (8000, 3, 1, 1), (8080, 3, 1, 0)):
        ids = draw_needles(task, HAYSTACK, *other).input_ids
        assert len(ids) != 8000 or not np.array_equal(ids, first.input_ids)


@pytest.mark.parametrize("kind", WORD_KINDS)
def test_a_text_streamed_to_a_map_is_the_one_in_memory(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(needles, "BLOCK", 97)
    task = task_of(kind)
    drawn, written = (
        draw_needles(task, HAYSTACK, 40_000, 2),
        write_needles(tmp_path / "x.npy", task, HAYSTACK, 40_000, 2),
    )
    assert isinstance(written.input_ids, np.memmap) and np.array_equal(written.input_ids, drawn.input_ids)
    assert (written.needles, written.questions, written.depths) == (drawn.needles, drawn.questions, drawn.depths)
    # a number that ends in another block than it begins in is noticed too
    number = np.array(CHARS.encode("51", False))
    holds = np.concatenate([HAYSTACK[:96], number, HAYSTACK[:500]]).astype(np.uint8)
    for haystack, stands in ((holds, True), (HAYSTACK, False)):
        assert word_needles._stands_in(number, haystack, 0, len(haystack)) == stands


def test_numbers_that_the_haystack_holds_are_not_hidden():
    """Of ninety numbers of two digits all but one stand in it; then all of them do."""
    numbers = [n for n in range(10, 100) if n != 57]
    holds = np.array(CHARS.encode("".join(f"There are {n} of them. " for n in numbers), False), dtype=np.uint8)
    task = task_of("passkey", num_digits=2)
    sample = draw_needles(task, holds, 8000, 0)
    assert CHARS.decode(sample.input_ids[sample.questions[0].answer]) == " 57."
    full = np.array(CHARS.encode("".join(f"There are {n} of them. " for n in range(10, 100)), False), dtype=np.uint8)
    with pytest.raises(ValueError, match="the haystack must leave numbers of 2 digits to hide"):
        draw_needles(task, full, 8000, 0)


def test_only_the_whole_answer_is_right():
    task = task_of("passkey")
    sample, tally = draw_needles(task, HAYSTACK, 8000, 0), NeedleTally()
    answer = sample.input_ids[sample.questions[0].answer].tolist()
    longer = [*answer[:-1], ord("3"), *answer[-1:]]
    for written, right in ((answer, True), ([*answer, 5], True), (answer[:-1], False), (longer, False)):
        score = generated_score(written, sample)
        assert score.exact == right and score.published is None
        tally.add(score)
    assert tally.summary()["exact"]["right"] == 2 and tally.summary()["published"] == {"right": 0, "n": 0}
    assert "whole answer 50.0 % (n=4, 15.0-85.0)" in str(tally)


def test_a_tokenizer_of_pieces_writes_the_same_sentences():
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    haystack = read_haystack("noise", tokenizer)
    for kind in WORD_KINDS:
        task = WordNeedleTask(kind, tokenizer)
        sample = draw_needles(task, haystack, 1024, 1)
        (question,) = sample.questions
        text = tokenizer.decode(sample.input_ids[: question.start])
        asked = tokenizer.decode(sample.input_ids[question.start : question.end + 1])
        answer = tokenizer.decode(sample.input_ids[question.answer]).strip()
        assert answer == f"{', '.join(found_by_reading(text, asked))}."
        assert question.end == 1024 - 64 and question.stop - question.end > 2


def test_both_kinds_of_task_mix_in_a_data_set():
    ids = NeedleTask("passkey", CHARS, chunk_size=80)
    data = NeedleDataset([(task_of("multi_key"), 1), (ids, 1)], HAYSTACK, 4000, size=12)
    kinds = {data.sample(index).kind for index in range(12)}
    assert kinds == {"word_multi_key", "passkey"} and data[0]["labels"].shape == (4000,)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("two_hop", {}, "kind must be one of passkey, multi_key"),
        ("passkey", {"num_noise": 1}, "num_noise must be 0 for passkey, got 1"),
        ("common_words", {"num_questions": 2}, "num_questions must be 1 for common_words, got 2"),
        ("passkey", {"hops": 2}, "hops is for variable_tracking only, got 2 for passkey"),
        ("variable_tracking", {"hops": 5}, "hops must be at most 4, got 5"),
        ("multi_value", {"num_values": 1}, "num_values must be an integer of at least 2, got 1"),
        ("multi_key", {"num_digits": 1, "num_noise": 9}, "num_digits must allow 10 different numbers, got 1"),
        ("passkey", {"depth": 1.5}, r"depth must be in 0..1 or None, got 1.5"),
        ("passkey", {"chunk_size": 9}, "chunk_size must be at least 10, .* got 9"),
        (
            "passkey",
            {"tokenizer": type("Odd", (CharTokenizer,), {"all_special_ids": [10]})()},
            "without special tokens",
        ),
    ],
)
def test_bad_tasks(kind, options, message):
    tokenizer = options.get("tokenizer", CHARS)
    with pytest.raises(ValueError, match=message):
        WordNeedleTask(kind, tokenizer, **{name: value for name, value in options.items() if name != "tokenizer"})


def test_haystacks_are_read_from_texts_and_tables(tmp_path):
    assert CHARS.decode(read_haystack("noise", CHARS)) == FILLER
    (tmp_path / "a.txt").write_text("one two\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "one"}) + "\n" + json.dumps({"code": "x = 1"}) + "\n")
    assert CHARS.decode(read_haystack(tmp_path / "a.txt", CHARS)) == "one two\n"
    assert CHARS.decode(read_haystack(tmp_path / "b.jsonl.gz", CHARS)) == "one\n\nx = 1\n\n"
    assert CHARS.decode(read_haystack(tmp_path / "b.jsonl.gz", CHARS, limit=2)) == "one\n\n"
    np.save(tmp_path / "c.npy", HAYSTACK)
    assert np.array_equal(read_haystack(tmp_path / "c.npy", CHARS), HAYSTACK)
    (tmp_path / "d.jsonl").write_text('{"title": "x"}\n')
    (tmp_path / "e.txt").write_text("")
    for name, message in (
        ("d.jsonl", "must have a text in text or code"),
        ("e.txt", "got 0 tokens"),
        ("f.csv", "f.csv"),
    ):
        with pytest.raises(ValueError, match=message):
            read_haystack(tmp_path / name, CHARS)
