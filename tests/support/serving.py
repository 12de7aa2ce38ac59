"""A server on a free port of loopback, in a thread of the tests."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from examples.serve.app import LOOPBACK, make_app
from examples.serve.engine import Engine, Limits
from tests.support import drt, insnext
from tests.support.tokenizers import tiny_tokenizer


VOCAB = 300


def tiny_engine(architecture: str = "insnext", least: int = 0, **limits) -> Engine:
    """Return an engine with a model of random weights that writes any byte, and at least so many tokens."""
    tokenizer = tiny_tokenizer(VOCAB, all_bytes=True)
    if architecture == "insnext":
        model = insnext.shipped_model(vocab_size=VOCAB, max_position_embeddings=256)
    else:
        model = drt.tiny_model(dtype=None, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if least:
        model.generation_config.min_new_tokens = least
    return Engine(model, tokenizer, "tiny", Limits(**limits))


@contextmanager
def served(engine: Engine, hosts=LOOPBACK) -> Iterator[str]:
    """Yield the address of a server that runs until the block ends."""
    server = uvicorn.Server(uvicorn.Config(make_app(engine, hosts), port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def post(url: str, body, **headers) -> tuple[int, dict]:
    """Return the status and the JSON that a body of bytes, or of JSON, is answered with."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def events(url: str, body: dict) -> list[tuple[str | None, dict | str]]:
    """Return the server-sent events that a body is answered with: (name, data)."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        found = []
        for frame in response.read().decode().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in frame.splitlines() if not line.startswith(":"))
            if "data" in fields:
                plain = fields["data"] == "[DONE]"
                found.append((fields.get("event"), fields["data"] if plain else json.loads(fields["data"])))
    return found
