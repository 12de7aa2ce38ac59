"""Many clients at once: the queue's bound, hang-ups, time limits, and seeds that know of nobody else."""

import gc
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

import pytest

from examples.serve.asked import Asked
from examples.serve.engine import Engine
from examples.serve.job import Cuts, Job, Row, Settings
from examples.serve.openai_api import job_fields
from examples.serve.schema import Completion
from examples.serve.texts import Around
from examples.serve.watch import Watch
from modeling_insnext.insnext.draft import Draft
from tests.support.serving import post, served, tiny_engine


ASKED = {"model": "tiny", "prompt": "the old man", "max_tokens": 20, "temperature": 1.0}


class Slow:
    """Holds an engine's thread at every batch until it is let go, and counts steps."""

    def __init__(self, engine: Engine):
        self.gate, self.batches, self.entered = threading.Event(), [], threading.Semaphore(0)
        run = engine._run

        def held(jobs):
            self.entered.release()
            assert self.gate.wait(60)
            self.batches.append([len(job.rows) for job in jobs])
            run(jobs)

        engine._run = held


def waits(condition) -> None:
    """Return once a condition holds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    "way",
    [{}, {"suffix": " and the sea"}, {"suffix": " and the sea", "order": "reading"}],
    ids=["continued", "inserted", "in_order"],
)
def test_a_seed_writes_the_same_alone_and_under_load(way):
    engine = tiny_engine()
    asked = [{**ASKED, **way, "seed": seed} for seed in range(4)]
    others = [{**ASKED, **way} for _ in range(8)]
    with served(engine) as url, ThreadPoolExecutor(12) as pool:

        def ask(fields):
            return post(f"{url}/v1/completions", fields)[1]["choices"][0]["text"]

        alone = [ask(fields) for fields in asked]
        loaded = list(pool.map(ask, [one for pair in zip(others[:4], asked, others[4:], strict=True) for one in pair]))
    assert loaded[1::3] == alone
    assert len(set(alone)) > 1
    # control: unseeded ones differ
    assert len({*loaded[::3], *loaded[2::3]}) > 1


def test_rows_of_equal_settings_share_a_batch_and_get_their_own_text():
    engine = tiny_engine()
    slow = Slow(engine)
    prompts = [f"{word} {number}" for word in ("fox", "dog", "sea") for number in range(2)]
    greedy = {**ASKED, "temperature": 0, "suffix": " man"}
    with served(engine) as url, ThreadPoolExecutor(8) as pool:
        first = pool.submit(post, f"{url}/v1/completions", greedy)
        assert slow.entered.acquire(timeout=30)
        together = [pool.submit(post, f"{url}/v1/completions", {**greedy, "prompt": one}) for one in prompts]
        seeded = pool.submit(post, f"{url}/v1/completions", {**greedy, "seed": 1})
        waits(lambda: engine.waiting == 7)
        slow.gate.set()
        texts = [one.result()[1]["choices"][0]["text"] for one in together]
        assert seeded.result()[1]["choices"] == first.result()[1]["choices"]
        alone = [post(f"{url}/v1/completions", {**greedy, "prompt": p})[1]["choices"][0]["text"] for p in prompts]
    assert sorted(slow.batches[:3]) == [[1], [1], [1] * 6]
    assert texts == alone and len(set(texts)) > 1


def test_one_too_many_gets_429_and_the_others_their_text():
    engine = tiny_engine(queue=2)
    slow = Slow(engine)
    with served(engine) as url, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(post, f"{url}/v1/completions", {**ASKED, "seed": 0})]
        assert slow.entered.acquire(timeout=30)
        waiting += [pool.submit(post, f"{url}/v1/completions", {**ASKED, "seed": seed}) for seed in (1, 2)]
        waits(lambda: engine.waiting == 2)
        status, body = post(f"{url}/v1/completions", ASKED)
        assert status == 429 and body["error"]["code"] == "rate_limit_exceeded"
        slow.gate.set()
        assert [one.result()[0] for one in waiting] == [200, 200, 200]
        assert post(f"{url}/v1/completions", ASKED)[0] == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_who_hangs_up_stops_the_writing(stream):
    engine = tiny_engine(max_tokens=200)
    jobs = []
    submit = engine.submit
    engine.submit = lambda job: (jobs.append(job), submit(job))[1]
    slow = Slow(engine)
    with served(engine) as url:
        connection = http.client.HTTPConnection(urlparse(url).netloc)
        endless = {**ASKED, "max_tokens": 200, "logit_bias": {"2": -100}}
        body = json.dumps({**endless, "stream": stream})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert slow.entered.acquire(timeout=30)
        connection.close()
        waits(lambda: jobs[0].cancelled.is_set())
        slow.gate.set()
        assert post(f"{url}/v1/completions", {**endless, "max_tokens": 20})[0] == 200
    assert len(jobs[0].rows[0].written) <= 1
    # control: the one who stayed has all of it
    assert len(jobs[1].rows[0].written) == 20


class Held:
    """Holds the writing before a step until it is let go, or for two seconds, and counts steps."""

    def __init__(self, monkeypatch, at: int):
        self.gate, self.in_time, self.steps, see = threading.Event(), None, 0, Watch.see

        def held(watch, seen, scores):
            self.steps = watch.step + 1
            if self.steps == at:
                self.in_time = self.gate.wait(2)
            see(watch, seen, scores)

        monkeypatch.setattr(Watch, "see", held)


def first_text_of(url, **fields) -> tuple[http.client.HTTPConnection, str]:
    """Ask for a stream and return when its first text is there."""
    connection = http.client.HTTPConnection(urlparse(url).netloc)
    body = json.dumps({**ASKED, "suffix": " and the sea", "seed": 3, "stream": True, **fields})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    while True:
        line = response.readline().decode()
        assert line, "no text"
        if line.startswith("data: {") and (text := json.loads(line[6:])["choices"][0]["text"]):
            return connection, text


@pytest.mark.parametrize("order", ["reading", "free"])
def test_text_before_a_suffix_comes_while_it_is_written_in_reading_order_only(order, monkeypatch):
    held = Held(monkeypatch, at=5)
    with served(tiny_engine(least=8)) as url:
        connection, _ = first_text_of(url, order=order)
        held.gate.set()
        waits(lambda: held.in_time is not None)
        connection.close()
    assert held.in_time == (order == "reading")


def test_who_hangs_up_while_a_suffix_is_streamed_stops_the_writing(monkeypatch):
    engine, jobs = tiny_engine(least=8), []
    submit = engine.submit
    engine.submit = lambda job: (jobs.append(job), submit(job))[1]
    held = Held(monkeypatch, at=5)
    with served(engine) as url:
        connection, _ = first_text_of(url)
        connection.close()
        waits(lambda: jobs[0].cancelled.is_set())
        held.gate.set()
        whole = post(f"{url}/v1/completions", {**ASKED, "suffix": " and the sea", "seed": 3, "order": "reading"})[1]
    assert len(jobs[0].rows[0].written) <= 5
    # control: the one who stayed has more
    assert whole["usage"]["completion_tokens"] > 5


def test_what_waits_too_long_is_told_so_and_what_writes_too_long_ends():
    engine = tiny_engine(seconds=2.0)
    slow = Slow(engine)
    with served(engine) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, f"{url}/v1/completions", {**ASKED, "seed": 1})
        assert slow.entered.acquire(timeout=30)
        second = pool.submit(post, f"{url}/v1/completions", {**ASKED, "seed": 2})
        waits(lambda: engine.waiting == 1)
        time.sleep(2.1)
        slow.gate.set()
        status, body = first.result()
        assert status == 200 and body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 1
        status, body = second.result()
    assert status == 503 and body["error"]["code"] == "timeout"


def alive() -> int:
    """Return how many requests, and texts of them, are still there."""
    gc.collect()
    return sum(isinstance(thing, (Job, Row, Watch, Asked, Draft)) for thing in gc.get_objects())


def test_no_request_is_kept_once_it_is_answered():
    with served(tiny_engine()) as url:

        def one() -> int:
            """Return what is there of the last request, which the writing thread still holds."""
            post(f"{url}/v1/completions", ASKED)
            return alive()

        least = one()
        for seed in range(9):
            post(f"{url}/v1/completions", {**ASKED, "suffix": " and the sea", "seed": seed})
            post(f"{url}/v1/completions", {**ASKED, "seed": seed, "prompt": "sea " * 300})
            first_text_of(url, seed=seed)[0].close()
        # who hung up is noticed a little later
        waits(lambda: one() == least)
        # control: what somebody keeps is counted
        kept = [thing for thing in gc.get_objects() if isinstance(thing, Job)]
        assert kept and one() > least > 0


def test_what_waits_when_the_server_ends_is_told_so():
    engine = tiny_engine()
    slow, told = Slow(engine), []
    engine.start()
    for _ in range(2):
        fields = job_fields(engine, Completion(**ASKED, seed=1))
        engine.submit(Job(tell=told.append, deadline=time.monotonic() + 60, **fields))
    assert slow.entered.acquire(timeout=30)
    threading.Timer(0.2, slow.gate.set).start()
    engine.close()
    assert [event.error.status for event in told if event.kind == "failed"] == [503]
    # the one that was being written has its text
    assert [event.kind for event in told].count("finished") == 1


def test_a_text_that_ends_is_answered_while_others_of_its_batch_are_written():
    engine = tiny_engine(max_tokens=200)
    told = []
    settings = Settings(insert=False, max_tokens=60, repetition_penalty=2.0)

    def job(name, stops):
        def tell(event):
            told.append((name, event.kind))

        return Job(settings, [Around("the old man")], tell, time.monotonic() + 60, cuts=Cuts(stops))

    # greedy, so both write the same, and only one of them ends early; at one step the first would be told first
    jobs = [job("long", ()), job("short", tuple("abcdefghijklmnopqrstuvwxyz \n"))]
    engine._run([each for each in jobs if engine._prepare(each)])
    assert told.index(("short", "finished")) < told.index(("long", "row"))
