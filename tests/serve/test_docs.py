"""The commands of docs/serving.md, as a reader would paste them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.serve.engine import Engine
from tests.support.serving import served


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
CURL = [block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) if block.startswith("curl")]
CLIENT = re.search(r"```py\n(.*?)```", PAGE, re.S)[1]


@pytest.fixture(scope="module")
def url():
    folder = ROOT / "examples" / "checkpoints" / "insnext-mini"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with served(Engine(model, AutoTokenizer.from_pretrained(folder), "insnext-mini")) as url:
        yield url


def here(block: str, url: str) -> str:
    assert "http://127.0.0.1:8000" in block
    # the page serves what `make serve` does, which needs weights from elsewhere
    return block.replace("http://127.0.0.1:8000", url).replace("insnext-smol", "insnext-mini")


# a machine may have none; the other tests send the same bodies
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_lines_write_between_the_words(url):
    answers = [
        subprocess.run(["bash", "-c", here(block, url)], capture_output=True, text=True, check=True).stdout
        for block in CURL
    ]
    assert len(answers) == 3
    assert all('"error"' not in answer for answer in answers)
    assert '"finish_reason":"stop"' in answers[0] or '"finish_reason":"length"' in answers[0]
    assert '"content":' in answers[1]
    assert "event: done" in answers[2] and re.search(r'"text": "[^"]*dog[^"]*(run|runs|ran)\b[^"]*park', answers[2])


def test_the_client_writes_between_the_words(url, capsys):
    exec(here(CLIENT, url), {})
    assert capsys.readouterr().out.strip()
