"""The LM Evaluation Harness's own `--model hf` reads both models as causal ones, without our adapter."""

from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from tests.support import drt, insnext
from tests.support.tokenizers import tiny_tokenizer


pytestmark = pytest.mark.outside

MAKERS = {"insnext": insnext.shipped_model, "drt": drt.shipped_model}
PAIRS = [("the old man", " and the sea"), ("a quick", " brown fox"), ("a quick", " dog")]


@pytest.fixture(scope="module", params=MAKERS)
def harness(request):
    model = MAKERS[request.param](vocab_size=60)
    return HFLM(pretrained=model, tokenizer=tiny_tokenizer(60), batch_size=2, device="cpu", add_bos_token=False)


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def log_p(harness, ids: list[int], first: int) -> float:
    with torch.no_grad():
        scores = harness.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(scores[place - 1, ids[place]] for place in range(first, len(ids))))


def test_choices_have_the_likelihood_of_forward(harness):
    scored = harness.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, answer), (total, _) in zip(PAIRS, scored, strict=True):
        ids, given = harness.tok_encode(context + answer), harness.tok_encode(context)
        assert total == pytest.approx(log_p(harness, ids, len(given)), abs=1e-4)
    assert scored[1][0] != pytest.approx(scored[2][0], abs=1e-2)


def test_a_rolling_likelihood_is_that_of_forward_behind_the_first_token(harness):
    text = "the old man and the sea"
    (total,) = harness.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    ids = [harness.prefix_token_id, *harness.tok_encode(text)]
    assert total == pytest.approx(log_p(harness, ids, 1), abs=1e-4)


def test_two_prompts_in_a_batch_are_continued_as_each_alone(harness):
    options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = [("the old man", options), ("a quick brown fox jumps over", options)]
    both = harness.generate_until(requests(*prompts), disable_tqdm=True)
    assert both == [harness.generate_until(requests(prompt), disable_tqdm=True)[0] for prompt in prompts]
    assert any(both)
