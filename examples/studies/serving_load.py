"""What the server answers while many clients ask, and whether each gets its own text.

    python -m examples.serve --model examples/checkpoints/insnext-mini --port 8000
    python examples/studies/serving_load.py --url http://127.0.0.1:8000 --seconds 120

Clients ask without a pause, of every interface in turn, streamed and not; every tenth request is hung up on. Those
with a seed must get what was written alone, before; the others must get their own words, in order. Memory is that of
the server's process, found by the port it listens on, before and after every quarter of the time.
"""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles
from urllib.parse import urlparse

import psutil
from report import RESULTS, command, environment, write_report
from tqdm import tqdm
from transformers import HfArgumentParser


WORDS = ("dog", "boat", "girl", "tree", "horse", "bread", "river", "lamp")
HANG_UP_EVERY = 10


@dataclass
class LoadArguments:
    url: str = field(default="http://127.0.0.1:8000", metadata={"help": "Where the server is; loopback only."})
    clients: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"help": "Numbers of clients at once."})
    seconds: float = field(default=120.0, metadata={"help": "How long each number asks."})
    seeds: bool = field(default=True, metadata={"help": "Whether four of seven requests have a seed."})
    output: str = field(default=f"{RESULTS}/serving_load", metadata={"help": "Writes .json and .md."})

    def __post_init__(self):
        if urlparse(self.url).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"url must be of this machine, got {self.url!r}")
        if min(self.clients) < 1 or not 0 < self.seconds <= 600:
            raise ValueError(f"clients must be at least 1 and seconds in (0, 600], got {self.clients}, {self.seconds}")


@dataclass
class Request:
    """What is asked, and how its text and number of tokens are read from the answer."""

    path: str
    body: dict
    words: tuple[str, str]
    expected: str | None = None

    def read(self, data: bytes) -> tuple[str, int]:
        """Return the text and the written tokens.

        Raises:
            ValueError: If the answer is not whole.
        """
        if not self.body.get("stream"):
            return self._of(json.loads(data))
        frames = [frame.split("data: ", 1)[1] for frame in data.decode().split("\n\n") if "data: " in frame]
        if self.path == "/v1/canvas":
            return self._of(json.loads(frames[-1]))
        if frames[-1] != "[DONE]":
            raise ValueError("a stream without an end")
        chunks = [json.loads(frame) for frame in frames[:-1]]
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        return text, chunks[-1]["usage"]["completion_tokens"]

    def _of(self, answer: dict) -> tuple[str, int]:
        if self.path == "/infill":
            return answer["content"], answer["tokens_predicted"]
        text = answer["text"] if self.path == "/v1/canvas" else answer["choices"][0]["text"]
        return text, answer["usage"]["completion_tokens"]

    def is_right(self, text: str) -> bool:
        """Whether a text is the answer to this request: what it must be, or at least its own words, in order."""
        if self.expected is not None:
            return text == self.expected
        if self.path == "/v1/canvas":
            first, second = self.words
            return first in text and second in text[text.index(first) + len(first) :]
        return text.startswith(f"The {self.words[0]} ") if self.body.get("echo") else True


def requests_of(model: str) -> list[Request]:
    """Return what is asked, each pair of words by every interface."""
    asked = []
    for index, first in enumerate(WORDS):
        second = WORDS[(index + 3) % len(WORDS)]
        words = (first, second)
        plain = {"model": model, "prompt": f"The {first} ", "max_tokens": 24}
        around = {**plain, "suffix": f" the {second}.", "seed": index}
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        asked += [
            Request("/v1/completions", around, words),
            Request("/v1/completions", {**around, **streamed}, words),
            Request("/v1/completions", {**plain, "seed": index, **streamed}, words),
            Request("/v1/completions", {**plain, "prompt": f"The {first} and", "echo": True}, words),
            Request("/infill", {"input_prefix": f"A {first}", "input_suffix": f" near the {second}.", "n_predict": 24,
                                "seed": index}, words),
            Request("/v1/canvas", {"keywords": list(words), "max_tokens": 24, "temperature": 0.8}, words),
            Request("/v1/canvas", {"keywords": list(words), "max_tokens": 24, "stream": True}, words),
        ]  # fmt: skip
    return asked


def ask(url: str, request: Request, hang_up: bool = False) -> bytes | None:
    """Return the body of an answer, None where the client hung up.

    Raises:
        ValueError: If the server refuses.
    """
    connection = http.client.HTTPConnection(urlparse(url).netloc, timeout=300)
    try:
        connection.request("POST", request.path, json.dumps(request.body), {"Content-Type": "application/json"})
        if hang_up:
            return None
        response = connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise ValueError(f"{response.status}: {data[:200]!r}")
        return data
    finally:
        connection.close()


class Load:
    """A number of clients that ask until the time is over."""

    def __init__(self, url: str, requests: list[Request], seconds: float):
        self.url, self.requests, self.seconds, self.end = url, requests, seconds, time.monotonic() + seconds
        self.counts, self.latencies, self.tokens = Counter(), [], 0
        self.lock = threading.Lock()

    def client(self, number: int) -> None:
        """Ask one thing after the other."""
        turn = number * 5
        while time.monotonic() < self.end:
            request, turn = self.requests[turn % len(self.requests)], turn + 1
            began = time.monotonic()
            try:
                data = ask(self.url, request, hang_up=turn % HANG_UP_EVERY == 0)
                text, tokens = ("", 0) if data is None else request.read(data)
                kind = "hung up" if data is None else "right" if request.is_right(text) else "mixed up"
            except (OSError, ValueError, http.client.HTTPException) as error:
                kind, tokens = f"lost: {type(error).__name__}", 0
            with self.lock:
                self.counts[kind] += 1
                if kind == "right":
                    self.latencies.append(time.monotonic() - began)
                    self.tokens += tokens

    def run(self, clients: int, look: Callable[[], None] = lambda: None) -> float:
        """Return the seconds until the last client has its answer; `look` is called at every quarter of the time."""
        began = time.monotonic()
        threads = [threading.Thread(target=self.client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for left in (3, 2, 1, 0):
            time.sleep(max(self.end - left / 4 * self.seconds - time.monotonic(), 0))
            look()
        for thread in threads:
            thread.join()
        return time.monotonic() - began


def server_process(url: str) -> psutil.Process:
    """Return the process that listens there.

    Raises:
        ValueError: If none of ours does.
    """
    port = urlparse(url).port
    for process in psutil.process_iter():
        try:
            connections = process.net_connections("inet")
        except psutil.Error:
            continue
        if any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections):
            return process
    raise ValueError(f"no process of this machine listens on port {port}")


def note_memory(process: psutil.Process, noted: list[int]) -> None:
    """Note how many MiB a process holds."""
    noted.append(round(process.memory_info().rss / 2**20))


def measure(args: LoadArguments) -> list[dict]:
    """Return a row for each number of clients."""
    process = server_process(args.url)
    connection = http.client.HTTPConnection(urlparse(args.url).netloc)
    connection.request("GET", "/v1/models")
    requests = requests_of(json.load(connection.getresponse())["data"][0]["id"])
    if not args.seeds:
        for request in requests:
            request.body.pop("seed", None)
    for request in tqdm(requests, desc="alone"):
        text, _ = request.read(ask(args.url, request))
        if "seed" in request.body:
            request.expected = text
    rows = []
    for clients in args.clients:
        memory = []
        note_memory(process, memory)
        load = Load(args.url, requests, args.seconds)
        seconds = load.run(clients, partial(note_memory, process, memory))
        lost = sum(count for kind, count in load.counts.items() if kind.startswith("lost"))
        rows.append(
            {
                "clients": clients,
                "right": load.counts["right"],
                "lost": lost,
                "mixed up": load.counts["mixed up"],
                "hung up": load.counts["hung up"],
                "p50 s": round(median(load.latencies), 2),
                "p95 s": round(quantiles(load.latencies, n=20)[-1], 2),
                "tokens a second": round(load.tokens / seconds, 1),
                "MiB by quarters": ", ".join(map(str, memory)),
            }
        )
        tqdm.write(str(rows[-1]))
    return rows


def main() -> None:
    (args,) = HfArgumentParser(LoadArguments).parse_args_into_dataclasses()
    rows = measure(args)
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    busy = f"{psutil.getloadavg()[0]:.1f}"
    report = {
        "command": command(__file__),
        "environment": environment(cores=psutil.cpu_count(), **{"load average at the end": busy}),
        "rows": rows,
    }
    write_report(args.output, report, "\n".join(lines))


if __name__ == "__main__":
    main()
