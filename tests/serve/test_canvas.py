"""`/v1/canvas` and the events of a text that grows."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.serving import events, post, served, tiny_engine


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@pytest.fixture(scope="module")
def url(engine):
    with served(engine) as url:
        yield f"{url}/v1/canvas"


ASKED = {"text": "the ___{2,3} man and ___{1} sea", "max_tokens": 9, "temperature": 1.0, "seed": 5, "alternatives": 3}


def canvas(url, **fields) -> dict:
    status, body = post(url, fields)
    assert status == 200, body
    return body


def test_the_events_build_the_text(url):
    found = events(url, {**ASKED, "stream": True})
    assert [name for name, _ in found] == ["start"] + ["insert"] * (len(found) - 2) + ["done"]
    texts, steps = [token["text"] for token in found[0][1]["tokens"]], [0] * len(found[0][1]["tokens"])
    for _, insert in found[1:-1]:
        texts.insert(insert["place"], insert["text"])
        steps.insert(insert["place"], insert["step"])
    done = found[-1][1]
    assert texts == [token["text"] for token in done["tokens"]]
    assert steps == [token["step"] for token in done["tokens"]]
    assert done == canvas(url, **ASKED)
    # control: all at the end would be another text
    assert max(steps) > 1 and steps != sorted(steps)


def test_it_is_what_generate_writes(url, engine):
    model, tokenizer = tiny_engine().model, engine.tokenizer
    answer = canvas(url, **ASKED)
    output = model.generate(
        **model.canvas(tokenizer, ASKED["text"]), max_new_tokens=9, do_sample=True, top_k=0, seed=5,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert [token["id"] for token in answer["tokens"]] == output.sequences[0, 1:].tolist()
    assert [token["step"] or -1 for token in answer["tokens"]] == output.insertion_steps[0, 1:].tolist()
    assert answer["encoded_tokens"] == int(output.encoded_tokens[0])


def test_texts_of_tokens_make_the_text(url, engine):
    """A character of several bytes is several tokens here, each of which would be decoded to � alone."""
    answer = canvas(url, text="caf\u00e9 \u2615\u2615 ___{1} sea", max_tokens=1)
    texts = [token["text"] for token in answer["tokens"]]
    assert "".join(texts).removeprefix(" ") == answer["text"]
    assert "caf\u00e9 \u2615\u2615" in answer["text"]
    assert any("\ufffd" in engine.pieces[token["id"]] for token in answer["tokens"])


def test_bounds_of_gaps_hold(url):
    written = [token["step"] > 0 for token in canvas(url, **ASKED)["tokens"]]
    assert 3 <= sum(written) <= 4


def test_one_form_of_each_keyword_stands_in_the_text(url):
    asked = {"keywords": ["man", ["sea", "dog"]], "max_tokens": 4}
    given = [token["text"] for token in canvas(url, **asked)["tokens"] if token["step"] == 0]
    text = "".join(given)
    assert text in (" man sea", " man dog")
    only = {"keywords": [["sea", "dog"], ["man", "fox"]], "max_tokens": 4}
    assert canvas(url, **only)["usage"]["prompt_tokens"] > 0


def test_keywords_without_an_order_are_written_whole_beside_texts_that_have_none(url):
    # the second has no keyword, the third others
    bodies = [
        {"keywords": ["man", ["sea", "dog"]], "ordered": False, "max_tokens": 6},
        {"text": "the ___ sea", "max_tokens": 6},
        {"keywords": ["the old man"], "ordered": False, "max_tokens": 6},
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        texts = [answer["text"] for answer in pool.map(lambda body: canvas(url, **body), bodies)]
    assert re.search(r"\bman\b", texts[0]) and re.search(r"\b(sea|dog)\b", texts[0])
    assert texts[1].startswith("the") and re.search(r"\bthe old man\b", texts[2])


def test_alternatives_hold_the_token_and_are_ranked(url):
    for token in canvas(url, **{**ASKED, "temperature": 0, "seed": None})["tokens"]:
        if token["step"]:
            log_p = [one["logprob"] for one in token["alternatives"]]
            assert log_p == sorted(log_p, reverse=True) and len(log_p) == 3
            assert token["alternatives"][0]["id"] == token["id"]
        else:
            assert "alternatives" not in token


def test_ebr_is_told(url):
    asked = {"text": "the ___{12} sea", "max_tokens": 16, "temperature": 1.0, "seed": 2}
    anew = canvas(url, **asked, ebr=True)
    assert anew["reencoded_at"] and len(anew["reencoded_at"]) == len(anew["reencoded_tokens"])
    assert canvas(url, **asked, ebr=False)["reencoded_at"] == []


REFUSED = {
    "no mark": ({"text": "the sea"}, "at least one mark"),
    "bounds": ({"text": "the ___{3,2} sea"}, "bounds of gap 0"),
    "both": ({"text": "a ___", "keywords": ["sea"]}, "exactly one"),
    "neither": ({}, "exactly one"),
    "an empty keyword": ({"keywords": [" "]}, "not blank"),
    "too many gaps": ({"text": "a ___" * 65}, "at most 64"),
    "too many forms": ({"keywords": ["a", ["b"] * 65]}, "at most 64"),
    "no room": ({"keywords": ["man", "sea"], "ordered": False, "max_tokens": 1}, "room for all pending keywords"),
    "minima": ({"text": "the ___{80} sea", "max_tokens": 8}, "minima"),
    "greedy nucleus": ({"text": "the ___ sea", "top_p": 0.5}, "temperature must be above 0"),
    "a path": ({"text": "the ___ sea", "model": "../../etc"}, "does not exist here"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_a_canvas_that_breaks_a_rule_is_refused(url, fields, message, stream):
    status, body = post(url, {**fields, "stream": stream})
    assert status in (400, 404)
    assert message in body["error"]["message"]


def test_a_drt_has_no_canvas():
    with served(tiny_engine("drt")) as url:
        status, body = post(f"{url}/v1/canvas", ASKED)
    assert status == 400 and "needs an InsNeXt" in body["error"]["message"]
