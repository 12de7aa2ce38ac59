"""Bodies and hosts that are no good, and the page's headers."""

import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.serving import post, served, tiny_engine


ROOT = Path(__file__).parents[2]
GOOD = {"model": "tiny", "prompt": "the old man", "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def url():
    with served(tiny_engine(body=5000)) as url:
        yield url


BAD = {
    "no JSON": (b"{", 400, "must be JSON"),
    "nothing": (b"", 400, "must be JSON"),
    "not UTF-8": (json.dumps(GOOD).encode().replace(b"old", b"\xff\xfe"), 400, "UTF-8"),
    "half a character": (json.dumps({**GOOD, "prompt": "\ud800"}).encode(), 400, "UTF-8"),
    "deep": (b"[" * 4000, 400, "must be JSON"),
    "a list": (b"[]", 400, "the body"),
    "not a number": (json.dumps({**GOOD, "temperature": float("nan")}).encode(), 400, "temperature"),
    "too long": (json.dumps({**GOOD, "prompt": "a" * 5000}).encode(), 413, "at most 5000 bytes"),
}


@pytest.mark.parametrize("path", ["/v1/completions", "/infill", "/v1/canvas", "/generate"])
@pytest.mark.parametrize("body, status, message", BAD.values(), ids=BAD)
def test_a_body_that_is_no_good_is_refused(url, path, body, status, message):
    got, answer = post(url + path, body)
    assert got in (status, 400)
    told = answer["error"] if path == "/generate" else answer["error"]["message"]
    # what the others have no field for is unknown there
    assert message in told or (path != "/v1/completions" and message == "temperature")
    # control
    assert post(f"{url}/v1/completions", GOOD)[0] == 200


def test_control_characters_and_html_are_text(url):
    prompt = "\x00\x07\x1b[31m<script>alert(1)</script>\r\n\u202e<pad></s>___"
    status, answer = post(f"{url}/v1/completions", {**GOOD, "prompt": prompt, "echo": True})
    assert status == 200 and answer["choices"][0]["text"].startswith(prompt)
    status, answer = post(f"{url}/v1/canvas", {"text": f"{prompt} GAP </b>", "gap": "GAP", "max_tokens": 3})
    assert status == 200 and answer["text"].startswith(prompt) and answer["text"].endswith(" </b>")


def test_a_form_of_another_page_is_refused(url):
    assert post(f"{url}/v1/completions", GOOD, **{"Content-Type": "text/plain"})[0] == 415


def test_another_name_for_loopback_is_refused(url):
    status, answer = post(f"{url}/v1/completions", GOOD, Host="evil.example:80")
    assert status == 421 and "evil.example" in answer["error"]["message"]
    for name in ("localhost", "localhost:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert post(f"{url}/v1/completions", GOOD, Host=name)[0] == 200


def test_what_is_not_there_is_told_in_the_same_shape(url):
    for path in ("/v1/nothing", "/page/../../setup.py", "/page/%2e%2e/app.py", "/docs", "/openapi.json"):
        status, answer = post(url + path, GOOD)
        assert status in (404, 405) and path.split("/")[1] in answer["error"]["message"]


def test_the_page_loads_nothing_from_elsewhere(url):
    with urllib.request.urlopen(url) as response:
        policy, page = response.headers["Content-Security-Policy"], response.read().decode()
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "http" not in page.replace("http-equiv", "")


def test_without_its_extra_the_server_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['fastapi'] = None; sys.argv = ['serve'];"
        "from importlib import util; find = util.find_spec;"
        "util.find_spec = lambda name, *rest: None if name == 'fastapi' else find(name, *rest);"
        "import runpy; runpy.run_module('examples.serve', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install ".[serve]"' in done.stderr


def test_a_port_that_is_taken_is_told_before_a_model_is_read():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code = (
            "import sys; sys.modules['torch'] = None;"
            "import runpy; runpy.run_module('examples.serve', run_name='__main__')"
        )
        done = subprocess.run([sys.executable, "-c", code, "--port", port], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert f"port {port}: Address already in use" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_without_a_model_is_told_in_one_line(monkeypatch, capsys):
    from examples.serve.__main__ import main

    monkeypatch.setattr(sys, "argv", ["serve", "--port", "0", "--model", "nowhere"])
    assert main() == 1
    said = capsys.readouterr()
    assert said.out == "reading the model ...\n"
    assert said.err == "model must be a folder, got 'nowhere'\n"


def test_loopback_is_the_default():
    from examples.serve.__main__ import parse

    assert parse([]).host == "127.0.0.1"
    assert parse(["--host", "0.0.0.0"]).host == "0.0.0.0"
