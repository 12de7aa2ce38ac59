"""`/infill` as llama.vim and llama.vscode send it."""

import itertools

import pytest

from examples.serve.job import Cuts, held_back
from examples.serve.texts import cut_place
from tests.support.serving import events, post, served, tiny_engine


# the fields that llama.vim sends on a keystroke, in its order (autoload/llama.vim of ggml-org/llama.vim)
KEYSTROKE = {
    "input_prefix": "the old man\n",
    "input_suffix": "\nand the sea\n",
    "input_extra": [{"text": "a quick brown fox\n", "time": [5, 7], "filename": "fox.txt"}],
    "prompt": "the lazy",
    "n_predict": 8,
    "stop": [],
    "n_indent": 0,
    "top_k": 40,
    "top_p": 0.90,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": [
        "content",
        "timings/prompt_n",
        "timings/prompt_ms",
        "timings/prompt_per_token_ms",
        "timings/prompt_per_second",
        "timings/predicted_n",
        "timings/predicted_ms",
        "timings/predicted_per_token_ms",
        "timings/predicted_per_second",
        "truncated",
        "tokens_cached",
    ],
}
# what it sends to warm a cache: nothing is written, nothing is wanted back
WARMING = {
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": KEYSTROKE["input_extra"],
    "prompt": "",
    "n_predict": 0,
    "temperature": 0.0,
    "stream": False,
    "samplers": [],
    "cache_prompt": True,
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
}
PLAIN = {"input_prefix": "the old man", "input_suffix": " and the sea", "n_predict": 6, "seed": 1}


@pytest.fixture(scope="module")
def url():
    with served(tiny_engine()) as url:
        yield url


@pytest.fixture(scope="module")
def long_url():
    with served(tiny_engine(least=8)) as url:
        yield url


def infill(url, **fields) -> dict:
    status, body = post(f"{url}/infill", fields)
    assert status == 200, body
    return body


def test_a_session_of_llama_vim_is_answered(url):
    assert infill(url, **WARMING) == {}
    answer = infill(url, **KEYSTROKE)
    assert set(answer) == set(KEYSTROKE["response_fields"])
    assert answer["timings/predicted_n"] <= 8 and answer["timings/prompt_n"] > 0
    assert answer["truncated"] is False and answer["tokens_cached"] == 0
    # the suggestion that is shown is accepted, and asked about again one line further
    typed = {**KEYSTROKE, "input_prefix": "the old man\nthe lazy" + answer["content"] + "\n", "prompt": ""}
    assert isinstance(infill(url, **typed)["content"], str)


# what llama.vscode sends (src/llama-server.ts of ggml-org/llama.vscode): it names no fields, so the answer is whole
TYPED = {
    "input_prefix": "the old man\n",
    "input_suffix": "\nand the sea\n",
    "input_extra": [{"text": "a quick brown fox\n", "time": 1764362096, "filename": "fox.txt"}],
    "prompt": "the lazy",
    "n_predict": 8,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "n_indent": 4,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 2500,
}
PREPARING = {
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": TYPED["input_extra"],
    "prompt": "",
    "n_predict": 0,
    "samplers": [],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1,
}


def test_a_session_of_llama_vscode_is_answered(url):
    assert infill(url, **PREPARING)["content"] == ""
    answer = infill(url, **TYPED)
    assert isinstance(answer["content"], str) and answer["truncated"] is False and answer["tokens_cached"] == 0
    read = ("prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms", "predicted_per_second")
    assert all(answer["timings"][name] >= 0 for name in read) and answer["timings"]["predicted_n"] <= 8
    # the same by its other way, OpenAI's, for which it knows no model
    asked = {"model": "", "prompt": "the lazy", "max_tokens": 8, "temperature": 0.1, "top_p": 0.99, "stream": False}
    status, body = post(f"{url}/v1/completions", asked)
    assert status == 200 and body["usage"]["completion_tokens"] <= 8


def test_health_and_props_say_what_editors_ask(url):
    import json
    import urllib.request

    def get(path):
        return json.load(urllib.request.urlopen(url + path))

    assert get("/health") == get("/v1/health") == {"status": "ok"}
    props = get("/props")
    assert props["default_generation_settings"]["n_ctx"] == 256
    assert props["model_alias"] == "tiny" and props["modalities"] == {"vision": False, "audio": False}


def test_streamed_text_is_the_text(long_url):
    for way in ({"order": "reading"}, {"order": "free"}, {"input_suffix": ""}):
        asked = {**PLAIN, **way, "n_predict": 12}
        whole = infill(long_url, **asked, return_tokens=True)
        chunks = [data for _, data in events(f"{long_url}/infill", {**asked, "stream": True})]
        assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
        # in free order nothing is final before the end
        assert (sum(chunk["content"] != "" for chunk in chunks) > 1) == (way != {"order": "free"})
        assert [token for chunk in chunks for token in chunk["tokens"]] == whole["tokens"]
        assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1]["stop_type"] == whole["stop_type"]


def test_a_seed_repeats_and_minus_one_does_not(url):
    assert infill(url, **PLAIN)["content"] == infill(url, **PLAIN)["content"]
    assert len({infill(url, **{**PLAIN, "seed": -1})["content"] for _ in range(4)}) > 1


def test_samplers_act_in_the_order_of_their_list(url):
    greedy = infill(url, **{**PLAIN, "temperature": 0})["content"]
    # of one token nothing is left to choose but the place
    one = {infill(url, **{**PLAIN, "input_suffix": "", "top_k": 1, "seed": seed})["content"] for seed in range(3)}
    assert len(one) == 1
    # a sampler that is not listed is not used
    free = {
        infill(url, **{**PLAIN, "input_suffix": "", "top_k": 1, "samplers": [], "seed": s})["content"]
        for s in range(3)
    }
    assert len(free) > 1
    assert greedy == infill(url, **{**PLAIN, "temperature": 0, "seed": 9})["content"]


def test_the_prompt_begins_the_middle(url):
    split = infill(url, **{**PLAIN, "input_prefix": "the old", "prompt": " man"})
    assert split["content"] == infill(url, **PLAIN)["content"]


def test_extra_context_is_read(url):
    fields = {**PLAIN, "temperature": 0}
    extra = infill(url, **fields, input_extra=[{"text": "over the lazy dog", "filename": "a"}])
    assert extra["tokens_evaluated"] > infill(url, **fields)["tokens_evaluated"]
    assert extra["content"] != infill(url, **fields)["content"]


def test_a_long_context_keeps_what_is_near_the_cursor(url):
    long = infill(url, **{**PLAIN, "temperature": 0, "input_prefix": "sea dog " * 300 + "the old man"})
    assert long["truncated"] is True and long["tokens_evaluated"] <= 256 - 6
    other = infill(url, **{**PLAIN, "temperature": 0, "input_prefix": "fox " + "sea dog " * 300 + "the old man"})
    assert other["content"] == long["content"]


def test_time_for_the_prompt_bounds_the_context():
    engine = tiny_engine()
    engine.prompt_rate = 1000.0
    with served(engine) as url:
        quick = infill(url, **{**PLAIN, "input_prefix": "sea dog " * 60, "t_max_prompt_ms": 80})
        slow = infill(url, **{**PLAIN, "input_prefix": "sea dog " * 60, "t_max_prompt_ms": 5000})
    assert quick["tokens_evaluated"] == 80 and quick["truncated"]
    assert slow["tokens_evaluated"] > 80 and not slow["truncated"]


def test_lines_indented_too_little_are_cut():
    text = "x = 1\n    y = 2\n\nz = 3"
    assert text[: cut_place(text, (), 4)[0]] == "x = 1\n    y = 2\n"
    assert cut_place(text, (), 0) == (None, "")
    assert cut_place(text, ("y",), 4) == (text.index("y"), "y")


@pytest.mark.parametrize(
    "cuts", [Cuts(), Cuts(indent=1), Cuts(indent=2), Cuts((" b", "a\n"), 2), Cuts(("\n ",))], ids=str
)
def test_what_is_shown_while_a_text_grows_is_the_beginning_of_what_it_ends_as(cuts):
    for letters in itertools.product(" \nab", repeat=6):
        text, shown = "".join(letters), ""
        for length in range(1, 7):
            grown = text[:length]
            place, _ = cut_place(grown, cuts.stops, cuts.indent)
            if place is not None:
                grown = grown[:place]
                break
            shown = grown[: length - held_back(grown, cuts)]
            # no more is held back than may be cut, so what is over has been shown
            assert cuts != Cuts() or shown == grown
        assert grown.startswith(shown)


def test_control_without_indents_held_back_a_line_that_is_cut_would_have_been_shown():
    assert held_back("x\n ", Cuts()) == 0 and held_back("x\n ", Cuts(indent=2)) == 2
    assert cut_place("x\n y", (), 2) == (1, "")


def test_probabilities_and_tokens_come_when_asked(url):
    answer = infill(url, **PLAIN, n_probs=3, return_tokens=True)
    assert [one["id"] for one in answer["completion_probabilities"]] == answer["tokens"]
    assert all(len(one["top_logprobs"]) == 3 for one in answer["completion_probabilities"])
    assert infill(url, **PLAIN)["tokens"] == []


def test_min_tokens_bars_an_empty_middle(url):
    seeds = range(6)
    assert {infill(url, **{**PLAIN, "seed": seed, "min_tokens": 6})["tokens_predicted"] for seed in seeds} == {6}
    # control
    assert min(infill(url, **{**PLAIN, "seed": seed})["tokens_predicted"] for seed in seeds) < 6


REFUSED = {
    "grammar": {"grammar": "root ::= x"},
    "mirostat": {"mirostat": 2},
    "penalty": {"frequency_penalty": 0.1},
    "adapter": {"lora": [{"id": 0, "scale": 1.0}]},
    "unknown": {"image_data": []},
    "sampler": {"samplers": ["greedy"]},
    "order": {"order": "any"},
    "least above most": {"min_tokens": 7},
    "window of penalties": {"repeat_last_n": 64},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(url, change):
    status, body = post(f"{url}/infill", {**PLAIN, **change})
    assert status == 400
    assert body["error"]["param"] == next(iter(change))


def test_a_drt_continues_and_refuses_a_suffix():
    with served(tiny_engine("drt")) as url:
        assert infill(url, **{**PLAIN, "input_suffix": ""})["tokens_predicted"] > 0
        status, body = post(f"{url}/infill", PLAIN)
    assert status == 400 and "needs an InsNeXt" in body["error"]["message"]
