"""The study of many clients counts what it should."""

import json

import pytest
from serving_load import Load, LoadArguments, ask, measure, requests_of

from tests.support.serving import served, tiny_engine


def test_everybody_gets_an_answer_of_their_own():
    with served(tiny_engine()) as url:
        (row,) = measure(LoadArguments(url, [3], 1.5))
    assert row["lost"] == row["mixed up"] == 0
    assert row["right"] >= 3 and row["tokens a second"] > 0
    # before, and at every quarter of the time
    assert len(row["MiB by quarters"].split(", ")) == 5


def test_without_seeds_nothing_has_one(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "serving_load.ask", lambda url, request, hang_up=False: asked.append(request) or ask(url, request)
    )
    with served(tiny_engine()) as url:
        (row,) = measure(LoadArguments(url, [1], 0.5, seeds=False))
    assert row["right"] > 0 and not any("seed" in request.body or request.expected for request in asked)


def test_an_answer_to_another_request_is_noticed():
    requests = requests_of("tiny")
    with served(tiny_engine()) as url:
        answers = [request.read(ask(url, request))[0] for request in requests]
        for request, text in zip(requests, answers, strict=True):
            request.expected = text if "seed" in request.body else None
        assert all(request.is_right(text) for request, text in zip(requests, answers, strict=True))
    moved = answers[7:] + answers[:7]
    others = [(request, text) for request, own, text in zip(requests, answers, moved, strict=True) if own != text]
    assert len(others) > len(requests) / 2
    assert not any(request.is_right(text) for request, text in others)


def test_what_is_refused_is_lost():
    requests = requests_of("another")[:1]
    with served(tiny_engine()) as url:
        load = Load(url, requests, 0.2)
        load.run(1)
    assert set(load.counts) <= {"lost: ValueError", "hung up"} and load.counts["lost: ValueError"]


def test_an_answer_that_breaks_off_is_no_answer():
    request = requests_of("tiny")[1]
    frame = json.dumps({"choices": [{"text": "a"}]})
    with pytest.raises(ValueError, match="without an end"):
        request.read(f"data: {frame}\n\n".encode())
