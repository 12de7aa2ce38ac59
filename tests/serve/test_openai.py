"""`/v1/completions` as the unchanged `openai` package meets it."""

import math

import openai
import pytest

from tests.support.serving import post, served, tiny_engine


@pytest.fixture(scope="module")
def url():
    with served(tiny_engine()) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def long_client():
    with served(tiny_engine(least=8)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def drt_client():
    with served(tiny_engine("drt")) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


ASKED = {"model": "tiny", "prompt": "the old man", "max_tokens": 6, "temperature": 0.7, "seed": 3}


def texts(completion) -> list[str]:
    return [choice.text for choice in completion.choices]


def streamed(client, **fields) -> tuple[dict[int, str], dict[int, str], object]:
    """Return the texts and reasons by choice, and the usage."""
    text, reasons, usage = {}, {}, None
    for chunk in client.completions.create(stream=True, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text[choice.index] = text.get(choice.index, "") + choice.text
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    return text, reasons, usage


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.models.retrieve("gpt-4")


# what is streamed is written from left to right, with a suffix too; what is not, only if it is asked for
IN_ORDER = {"suffix": " and the sea", "extra_body": {"order": "reading"}}
both_ways = pytest.mark.parametrize("way", [{}, IN_ORDER], ids=["continued", "inserted"])


@both_ways
def test_streamed_text_is_the_text(client, way):
    fields = {**ASKED, **way, "n": 2}
    whole = client.completions.create(**fields)
    assert len(set(texts(whole))) == 2
    text, reasons, usage = streamed(client, **fields, stream_options={"include_usage": True})
    assert [text[0], text[1]] == texts(whole)
    assert [reasons[0], reasons[1]] == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    # control: another seed writes something else
    assert texts(client.completions.create(**{**fields, "seed": 4})) != texts(whole)


def test_a_suffix_is_streamed_in_reading_order_unless_the_free_one_is_asked_for(long_client):
    fields = {**ASKED, "suffix": " and the sea", "max_tokens": 12}

    def chunks(**order):
        return [one.choices[0].text for one in long_client.completions.create(**fields, stream=True, **order)]

    free, reading = {"extra_body": {"order": "free"}}, {"extra_body": {"order": "reading"}}
    in_order = chunks()
    assert in_order == chunks(**reading) and sum(map(bool, in_order)) > 1
    whole = long_client.completions.create(**fields)
    assert whole.choices == long_client.completions.create(**fields, **free).choices
    # nothing of it is final before the end
    assert [text for text in chunks(**free) if text] == texts(whole)
    assert "".join(in_order) == texts(long_client.completions.create(**fields, **reading))[0] != texts(whole)[0]


def test_a_streamed_suffix_is_met_with_one_space(client):
    spaced = {**ASKED, "prompt": "the old man ", "suffix": "and the sea"}
    text = streamed(client, **spaced)[0][0]
    assert text == texts(client.completions.create(**spaced, extra_body={"order": "reading"}))[0]
    assert not text.startswith(" ") and text.endswith(" ") and not text.endswith("  ")


def test_who_wants_to_chat_is_told_where_text_is_completed(client):
    with pytest.raises(openai.NotFoundError, match="use /v1/completions"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "the old man"}])


def test_usage_counts_given_and_written_tokens(client):
    engine = tiny_engine()
    usage = client.completions.create(**ASKED, suffix=" and the sea", n=2).usage
    given = sum(len(engine.tokenizer(part)["input_ids"]) - 1 for part in ("the old man", " and the sea"))
    assert usage.prompt_tokens == given
    assert 0 < usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    # every prompt of a list counts
    both = client.completions.create(**{**ASKED, "prompt": ["the old man", "the old man"]}).usage
    assert both.prompt_tokens == 2 * client.completions.create(**ASKED).usage.prompt_tokens


def test_the_suffix_is_seen(client):
    one = client.completions.create(**{**ASKED, "temperature": 0}, suffix=" and the sea")
    other = client.completions.create(**{**ASKED, "temperature": 0}, suffix=" jumps over the lazy dog")
    assert texts(one) != texts(other)


def test_a_drt_continues_and_refuses_a_suffix(drt_client):
    whole = drt_client.completions.create(**ASKED, n=2)
    text, _, _ = streamed(drt_client, **ASKED, n=2)
    assert [text[0], text[1]] == texts(whole)
    with pytest.raises(openai.BadRequestError, match="a suffix needs an InsNeXt"):
        drt_client.completions.create(**ASKED, suffix=" sea")


@both_ways
def test_a_text_ends_before_its_first_stop_string(long_client, way):
    fields = {**ASKED, **way, "max_tokens": 12}
    text = texts(long_client.completions.create(**fields))[0]
    stop = text[len(text) // 2 :][:2]
    cut = long_client.completions.create(**fields, stop=["never there", stop])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert streamed(long_client, **fields, stop=stop)[0][0] == text[: text.index(stop)]
    # the writing ends there
    assert cut.usage.completion_tokens < long_client.completions.create(**fields).usage.completion_tokens
    assert stop in text


def test_a_text_that_grew_in_any_place_is_cut_before_its_first_stop_string(long_client):
    fields = {**ASKED, "suffix": " and the sea", "max_tokens": 12}
    whole = long_client.completions.create(**fields)
    stop = texts(whole)[0][len(texts(whole)[0]) // 2 :][:2]
    cut = long_client.completions.create(**fields, stop=stop)
    assert texts(cut)[0] == texts(whole)[0].split(stop)[0] and cut.usage == whole.usage


@pytest.mark.parametrize("suffix", [None, " and the sea"], ids=["continued", "inserted"])
def test_logprobs_are_those_of_a_distribution(client, suffix):
    table = client.completions.create(**{**ASKED, "temperature": 0}, suffix=suffix, logprobs=5).choices[0].logprobs
    assert len(table.tokens) == len(table.token_logprobs) == len(table.top_logprobs) == len(table.text_offset) > 0
    for log_p, top in zip(table.token_logprobs, table.top_logprobs, strict=True):
        # greedy takes the best; several ids may have one text, as � for parts of characters
        assert math.isclose(log_p, max(top.values()))
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6
    chunks = client.completions.create(**{**ASKED, "temperature": 0}, suffix=suffix, logprobs=5, stream=True)
    tables = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs is not None]
    assert max(len(table.tokens) for table in tables) == 1
    whole = client.completions.create(
        **{**ASKED, "temperature": 0}, suffix=suffix, logprobs=5, extra_body={"order": "reading"} if suffix else {}
    )
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for table in tables for value in getattr(table, name)]
        assert joined == getattr(whole.choices[0].logprobs, name)
    # control: at temperature 2 it is not always the best one that is taken
    hot = client.completions.create(**{**ASKED, "temperature": 2}, suffix=suffix, logprobs=1).choices[0].logprobs
    assert any(log_p < max(top.values()) for log_p, top in zip(hot.token_logprobs, hot.top_logprobs, strict=True))


def test_echo_puts_the_prompt_in_front(client):
    plain, echoed = client.completions.create(**ASKED), client.completions.create(**ASKED, echo=True)
    assert texts(echoed)[0] == "the old man" + texts(plain)[0]
    assert streamed(client, **ASKED, echo=True)[0][0] == texts(echoed)[0]


@pytest.mark.parametrize("suffix", [None, " and the sea"], ids=["continued", "inserted"])
def test_a_token_of_bias_minus_100_is_never_written(client, suffix):
    fields = {**ASKED, "temperature": 0, "suffix": suffix, "logprobs": 0}
    first = client.completions.create(**fields).choices[0]
    engine = tiny_engine()
    banned = {str(i): -100 for i, piece in enumerate(engine.pieces) if piece == first.logprobs.tokens[0]}
    assert (
        first.logprobs.tokens[0]
        not in client.completions.create(**fields, logit_bias=banned).choices[0].logprobs.tokens
    )


@both_ways
def test_no_text_has_less_than_min_tokens(client, way):
    fields = {**ASKED, **way, "n": 8, "max_tokens": 9}
    fields["extra_body"] = {**way.get("extra_body", {}), "min_tokens": 9}
    assert client.completions.create(**fields).usage.completion_tokens == 8 * 9
    # control
    assert client.completions.create(**{**ASKED, **way, "n": 8, "max_tokens": 9}).usage.completion_tokens < 8 * 9


REFUSED = {
    "another model": ({"model": "gpt-4"}, openai.NotFoundError, "does not exist here"),
    "unknown field": ({"extra_body": {"top_q": 1}}, openai.BadRequestError, "unknown field 'top_q'"),
    "penalty": ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty"),
    "best_of": ({"best_of": 3}, openai.BadRequestError, "best_of must be n"),
    "too many tokens": ({"max_tokens": 10**6}, openai.BadRequestError, "at most 512"),
    "too many texts": ({"n": 17}, openai.BadRequestError, "at most 16 texts"),
    "no tokens": ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    "temperature": ({"temperature": 2.5}, openai.BadRequestError, "temperature"),
    "a number in quotes": ({"extra_body": {"n": "2"}}, openai.BadRequestError, "valid integer"),
    "token ids": ({"prompt": [3, 4]}, openai.BadRequestError, "prompt"),
    "bias": ({"logit_bias": {"300": 1}}, openai.BadRequestError, "got '300'"),
    "echo with logprobs": ({"echo": True, "logprobs": 1}, openai.BadRequestError, "echo with logprobs"),
    "least above most": ({"extra_body": {"min_tokens": 7}}, openai.BadRequestError, "min_tokens must not exceed"),
    "order without a suffix": ({"extra_body": {"order": "free"}}, openai.BadRequestError, "order needs a suffix"),
    "order": ({"extra_body": {"order": "any"}}, openai.BadRequestError, "order"),
    "long prompt": ({"prompt": "sea " * 300}, openai.BadRequestError, "at most 250 tokens"),
}


@pytest.mark.parametrize("change, error, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_cannot_be_honoured_is_refused_by_name(client, change, error, message, stream):
    with pytest.raises(error, match=message) as caught:
        client.completions.create(**{**ASKED, **change}, stream=stream)
    assert caught.value.type == "invalid_request_error"


def test_errors_name_the_field(url):
    status, body = post(f"{url}/v1/completions", {**ASKED, "stop": [""]})
    assert status == 400
    assert body["error"]["param"] == "stop" and body["error"]["type"] == "invalid_request_error"


def test_spaces_at_the_gap_are_given_once(client):
    """Prompt, text and suffix put together are text: a word begins with a space, which the prompt may have already."""
    spaced = client.completions.create(**{**ASKED, "prompt": "the old man ", "suffix": "and the sea"})
    assert not texts(spaced)[0].startswith(" ") and texts(spaced)[0].endswith(" ")
