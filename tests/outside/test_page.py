"""The page in a browser: Debian's chromium, driven by Playwright, with everything but the server cut off."""

import json
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.serve.engine import Engine
from tests.support.serving import served


pytestmark = pytest.mark.outside

FOLDER = Path(__file__).parents[2] / "examples" / "checkpoints" / "insnext-mini"
VIEWS = {"light, wide": ("light", 1100), "dark, a phone's": ("dark", 390)}
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def url():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32").eval()
    with served(Engine(model, AutoTokenizer.from_pretrained(FOLDER), "insnext-mini")) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=VIEWS.values(), ids=VIEWS)
def page(request, browser, url):
    """The page, and afterwards the claim that it complained of nothing and asked nobody else."""
    scheme, width = request.param
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page, complaints = context.new_page(), []
    # a browser tells its console of every refusal
    page.on("console", lambda message: "status of 400" in message.text or complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: sent.url.startswith(url) or complaints.append(sent.url))
    context.route(lambda address: not address.startswith(url), lambda route: route.abort())
    page.goto(url)
    expect(page.locator("#model")).to_have_text("insnext-mini")
    yield page
    assert complaints == []
    # nothing sticks out on the right
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    context.close()


def written(page) -> str:
    """Return the text once it is written."""
    expect(page.locator("#facts")).to_contain_text(re.compile(r"tokens in \d+ steps"))
    return page.locator("#tokens").inner_text()


def test_a_text_with_gaps_is_filled_stepped_through_and_rewritten(page):
    page.fill("#text", "The old man ___{2,8} the sea.")
    page.press("#text", "Control+Enter")
    text = written(page)
    assert text.startswith("The old man ") and text.endswith(" the sea.")
    expect(page.locator("#tokens")).to_be_in_viewport()
    steps = page.locator("#shown").inner_text()
    # step back to what was given, and forth again
    for _ in range(8):
        page.keyboard.press("Alt+ArrowLeft")
    assert page.locator("#tokens").inner_text() == "The old man the sea."
    expect(page.locator("#shown")).to_have_text("given")
    for _ in range(8):
        page.keyboard.press("Alt+ArrowRight")
    assert page.locator("#tokens").inner_text() == text
    # what else could have stood there
    page.locator("#tokens .written").first.click()
    shares = [float(share.split()[0]) for share in page.locator("#alternatives .share").all_inner_texts()]
    assert len(shares) >= 8 and 0 < sum(shares) <= 100.5
    expect(page.locator("#alternatives .took")).to_have_count(1)
    # by keys: one token more, and write both anew
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator("#tokens .picked")).to_have_count(2)
    page.keyboard.press("r")
    assert "___" in page.input_value("#text")
    again = written(page)
    assert again.startswith("The old man ") and again.endswith(" the sea.")
    page.keyboard.press("Alt+z")
    assert page.locator("#tokens").inner_text() == text
    # watch it grow from what was given
    page.click("#play")
    expect(page.locator("#shown")).to_have_text(re.sub(r"step \d+", "step 1", steps))
    expect(page.locator("#shown")).to_have_text(steps)
    # keep a word of it, write the rest anew
    page.locator("#tokens .written").first.click()
    kept = page.locator("#tokens .picked").inner_text().strip()
    page.keyboard.press("k")
    assert re.search(rf"The old man {re.escape(kept)}\W*___", page.input_value("#text"))
    assert written(page).startswith(f"The old man {kept}")


def test_words_with_alternatives_occur(page):
    page.check("input[value=words]")
    for word in ("dog", "run / runs / ran", "park"):
        page.fill("#word", word)
        page.press("#word", "Enter")
    expect(page.locator("#words li")).to_have_count(3)
    page.click("#write")
    text = written(page)
    assert re.search(r"dog.* (run|runs|ran)\b.*park", text)
    assert page.locator("#tokens .given").all_inner_texts()[0] == "dog"


def test_markup_is_text(page):
    page.fill("#text", "<b onclick=alert(1)>bold</b> ___{1} <script>alert(1)</script>")
    page.click("#write")
    text = written(page)
    assert text.startswith("<b onclick=alert(1)>bold</b>") and text.endswith("<script>alert(1)</script>")
    assert page.locator("#tokens b, #tokens script").count() == 0


def test_a_gap_that_stays_empty_is_told_with_what_helps(page):
    def nothing(route):
        done = {"tokens": [], "text": "", "finish_reason": "stop", "reencoded_at": [], "reencoded_tokens": [],
                "encoded_tokens": 3, "usage": {"completion_tokens": 0}}  # fmt: skip
        route.fulfill(content_type="text/event-stream", body=f"event: done\ndata: {json.dumps(done)}\n\n")

    page.route("**/v1/canvas", nothing)
    page.click("#write")
    expect(page.locator("#facts")).to_contain_text("at least two tokens is ___{2,}")


def test_a_server_that_has_gone_is_told(browser, url):
    page = browser.new_page()
    page.goto(url)
    page.route("**/v1/canvas", lambda route: route.abort())
    page.click("#write")
    expect(page.locator("#error")).to_contain_text("is it still running?")
    expect(page.locator("#stop")).to_be_disabled()
    page.close()


def test_a_refusal_is_shown(page):
    page.fill("#text", "no gap")
    page.click("#write")
    expect(page.locator("#error")).to_contain_text("at least one mark")


def test_the_python_that_is_copied_writes_the_same(page, browser, capsys):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#temperature").fill("0.7")
    page.locator("#max-tokens").fill("20")
    page.fill("#text", "The ___ ran to the ___{1,6} .")
    page.click("#write")
    text = written(page)
    page.click("#copy-text")
    expect(page.locator("#copied")).to_have_text("text copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == text
    page.click("#copy-python")
    expect(page.locator("#copied")).to_have_text("Python copied")
    exec(page.evaluate("() => navigator.clipboard.readText()"), {})
    assert capsys.readouterr().out.strip() == text
