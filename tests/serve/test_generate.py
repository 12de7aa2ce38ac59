"""`huggingface_hub.InferenceClient.text_generation`, unchanged, against `/` and `/generate`."""

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from tests.support.serving import served, tiny_engine


@pytest.fixture(scope="module", params=["insnext", "drt"])
def client(request):
    with served(tiny_engine(request.param)) as url, pytest.MonkeyPatch.context() as patch:
        # whose environment keeps Hub clients off the network still reaches its own machine
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield InferenceClient(url)


OPTIONS = {"max_new_tokens": 8, "temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 7}


def test_text_is_continued_streamed_or_not(client):
    whole = client.text_generation("the old man", **OPTIONS)
    assert whole == client.text_generation("the old man", **OPTIONS)
    assert "".join(client.text_generation("the old man", stream=True, **OPTIONS)) == whole
    assert client.text_generation("the old man", return_full_text=True, **OPTIONS) == "the old man" + whole
    # control: another seed
    assert client.text_generation("the old man", **{**OPTIONS, "seed": 8}) != whole


def test_details_tell_tokens_and_why_it_ended(client):
    answer = client.text_generation("the old man", details=True, **OPTIONS)
    assert answer.details.generated_tokens == len(answer.details.tokens) > 0
    assert answer.details.finish_reason in ("length", "eos_token")
    assert all(token.logprob < 0 for token in answer.details.tokens)
    last = list(client.text_generation("the old man", details=True, stream=True, **OPTIONS))[-1]
    assert last.generated_text == answer.generated_text
    assert last.details.finish_reason == answer.details.finish_reason


def test_a_stop_string_ends_the_text(client):
    whole = client.text_generation("the old man", **OPTIONS)
    stop = whole[len(whole) // 2 :][:1]
    assert client.text_generation("the old man", stop=[stop], **OPTIONS) == whole[: whole.index(stop)]


def test_without_options_of_sampling_it_is_greedy(client):
    assert len({client.text_generation("the old man", max_new_tokens=4) for _ in range(3)}) == 1
    assert len({client.text_generation("the old man", max_new_tokens=4, do_sample=True) for _ in range(4)}) > 1


@pytest.mark.parametrize("change", [{"watermark": True}, {"best_of": 2}, {"max_new_tokens": 9999}], ids=str)
def test_what_cannot_be_honoured_is_refused(client, change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        client.text_generation("the old man", **{**OPTIONS, **change})
