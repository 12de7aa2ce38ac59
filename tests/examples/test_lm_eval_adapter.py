"""The LM Evaluation Harness says what the models say themselves: likelihoods, rolling likelihoods, continuations."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextConfig, InsNextForInsertionLM


pytest.importorskip("lm_eval", reason="needs the LM Evaluation Harness: pip install lm-eval")
lm_eval_adapter = pytest.importorskip("lm_eval_adapter")

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "checkpoints" / "insnext-mini"
DrtLM, InsNextLM = lm_eval_adapter.DrtLM, lm_eval_adapter.InsNextLM
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.3}
DRT = {"num_lower_layers": 1, "retrieval_groups": [1], "num_encoder_layers": 1, "chunk_size": 4, "sliding_window": 8}
PAIRS = [
    ("The old man", " looked at the sea."),
    ("A dog", " ran"),
    ("", "Once upon a time"),
    ("The boy threw the ball ", "to his friend in the park."),
]
TEXT = "The old man looked at the sea and the boy threw the ball to his dog in the park near the river."
DATA = {
    "choice": [{"query": "A dog", "choices": [" ran away.", " of the"], "gold": 0}] * 3,
    "perplexity": [{"text": TEXT}, {"text": "A dog."}],
    "completion": [{"prompt": "The old man", "answer": " went home"}, {"prompt": "A dog", "answer": " ran"}],
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module", params=["insnext", "drt"])
def case(request, tokenizer, tmp_path_factory):
    """A folder, the model in it, and its class in the harness."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "insnext":
        shape = {"num_hidden_layers": 2, "max_position_embeddings": 40}
        model = InsNextForInsertionLM(InsNextConfig(vocab_size=len(tokenizer), **SHAPE, **shape)).eval()
    else:
        model = DrtForCausalLM(DrtConfig(vocab_size=len(tokenizer), **SHAPE, **DRT)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, {"insnext": InsNextLM, "drt": DrtLM}[request.param]


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


@torch.no_grad()
def expected(model, tokenizer, context: str, written: str) -> float:
    """Return log p(written | context) by one forward pass over one text, and `score` where there is one."""
    given = (
        [tokenizer.bos_token_id, *tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"]]
        if context
        else [tokenizer.bos_token_id]
    )
    ids = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer(context + written, add_special_tokens=False)["input_ids"]]]
    )
    log_p = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[len(given) - 1 :]
    if hasattr(model, "score"):
        mask = torch.arange(ids.shape[1])[None] < len(given)
        assert float(log_p.sum()) == pytest.approx(float(model.score(ids, context_mask=mask, stop=False)), rel=1e-5)
    return float(log_p.sum())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_the_model_whatever_the_batch(case, tokenizer, batch_size):
    folder, model, lm_class = case
    lm = lm_class(pretrained=str(folder), batch_size=batch_size)
    found = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    truth = [expected(model, tokenizer, *pair) for pair in PAIRS]
    assert [score for score, _ in found] == pytest.approx(truth, rel=1e-4)
    # control: other continuations have other likelihoods
    (other,) = lm.loglikelihood(requests(("The old man", " looked at the dog.")), disable_tqdm=True)
    assert other[0] != pytest.approx(truth[0], rel=1e-3)


def test_what_greedy_decoding_writes_is_called_greedy(case, tokenizer):
    folder, model, lm_class = case
    lm = lm_class(pretrained=str(folder))
    ids = lm.tok_encode("The old man")
    options = {"left_to_right": True} if lm_class is InsNextLM else {}
    out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False, **options)[0].tolist()
    rows = [(None, ids, out[len(ids) :]), (None, ids, [*out[len(ids) : -1], (out[-1] + 1) % len(tokenizer)])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(rows, disable_tqdm=True)] == [True, False]


def test_rolling_likelihood_is_that_of_the_whole_text(case, tokenizer):
    folder, model, lm_class = case
    # DRT by segments, which must not change anything
    lm = lm_class(pretrained=str(folder), **({"segment_length": 7} if lm_class is DrtLM else {}))
    found = lm.loglikelihood_rolling(requests((TEXT,), ("A dog.",), ("",)), disable_tqdm=True)
    assert found == pytest.approx(
        [expected(model, tokenizer, "", TEXT), expected(model, tokenizer, "", "A dog."), 0], rel=1e-4
    )


def test_texts_beyond_the_longest_are_cut_on_the_left_behind_bos(tokenizer, case):
    folder, model, lm_class = case
    if lm_class is DrtLM:
        assert lm_class(pretrained=str(folder)).max_length is None
        return
    lm = lm_class(pretrained=str(folder))
    context, written = lm.tok_encode(TEXT * 3), [5, 6, 7]
    fitted = lm._fit(context, 2)
    assert len(fitted) == 38 and fitted == [context[0], *context[-37:]]
    (found,) = lm._loglikelihood_tokens([(None, context, written)], disable_tqdm=True)
    assert found == lm._score([(fitted, written)])[0]
    long = lm.tok_encode(TEXT * 3, add_special_tokens=False)
    windows = [([lm.prefix_token_id], long[i : i + 40]) for i in range(0, len(long), 40)]
    (rolling,) = lm.loglikelihood_rolling(requests((TEXT * 3,)), disable_tqdm=True)
    assert rolling == pytest.approx(sum(lm._score([window])[0][0] for window in windows))
    with pytest.raises(ValueError, match="must fit into max_position_embeddings=40"):
        lm._loglikelihood_tokens([(None, [1], [5] * 41)], disable_tqdm=True)


def test_continuations_are_those_of_the_model_cut_before_the_first_end(case, tokenizer):
    folder, model, lm_class = case
    prompts = ["The old man", "A dog", "Once upon a time there"]
    options = {"left_to_right": True} if lm_class is InsNextLM else {}
    whole = []
    for prompt in prompts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **options)
        whole.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    lm = lm_class(pretrained=str(folder), batch_size=2)
    free = lm.generate_until(requests(*((p, {"until": [], "max_gen_toks": 6}) for p in prompts)), disable_tqdm=True)
    assert free == whole
    ends = [text[len(text) // 2 : len(text) // 2 + 2] for text in whole]
    asked = requests(*((p, {"until": [end], "max_gen_toks": 6}) for p, end in zip(prompts, ends, strict=True)))
    assert lm.generate_until(asked, disable_tqdm=True) == [t[: t.find(e)] for t, e in zip(whole, ends, strict=True)]


@pytest.mark.parametrize("options", [{"batch_size": "auto"}, {"max_batch_size": 8}])
def test_a_batch_size_that_must_be_searched_for_is_refused(case, options):
    with pytest.raises(ValueError, match="batch_size must be a number"):
        case[2](pretrained=str(case[0]), **options)


def test_the_command_line_knows_both_models_and_the_local_tasks(case, tmp_path):
    folder, _, lm_class = case
    (tmp_path / "data" / "lm_eval").mkdir(parents=True)
    for name, rows in DATA.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / "lm_eval" / f"{name}.jsonl").write_text(text)
    name = "insnext" if lm_class is InsNextLM else "drt"
    tasks = ",".join(f"local_{name}" for name in DATA)
    command = f"--model {name} --model_args pretrained={folder} --tasks {tasks} --output_path out".split()
    command += ["--include_path", str(ROOT / "examples" / "scripts" / "lm_eval_tasks")]
    script = str(ROOT / "examples" / "scripts" / "lm_eval_adapter.py")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, script, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    lm = lm_class(pretrained=str(folder))
    total = sum(lm.loglikelihood_rolling(requests((TEXT,), ("A dog.",)), disable_tqdm=True))
    bits = -total / torch.log(torch.tensor(2.0)).item() / len((TEXT + "A dog.").encode())
    assert results["local_perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    pair = lm.loglikelihood(requests(("A dog", " ran away."), ("A dog", " of the")), disable_tqdm=True)
    assert results["local_choice"]["acc,none"] == float(pair[0][0] > pair[1][0])
    assert results["local_completion"]["exact_match,none"] in (0, 0.5, 1)
