"""What run_scoring.py makes of its rows, and that it goes on only with the files that its scores are of."""

import json
import os

import pytest
import run_scoring
from common.arguments import ModelArguments

from tests.support.script_models import word_tokenizer


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    return str(path)


def choice_items(data, row, **options) -> list:
    args = run_scoring.ScoringArguments(data_file=data, task="multiple_choice", max_length=64, **options)
    return list(run_scoring.answers(args, word_tokenizer(), {name: [value] for name, value in row.items()}))


@pytest.mark.parametrize("num_orders", [None, 2])
def test_the_space_in_front_of_a_blank_belongs_to_the_answer(data, num_orders):
    tokenizer, row = word_tokenizer(), {"query": "the _ sees a cat", "choices": ["dog", "man"], "gold": 0}
    items = choice_items(data, row, blank="_", num_orders=num_orders)
    for item, answer in zip(items, (" dog", " man"), strict=True):
        assert item.ids == tokenizer(f"the{answer} sees a cat")["input_ids"]
        scored = tokenizer.decode([token for token, given in zip(item.ids, item.given, strict=True) if not given])
        # bytes are those of what was scored
        assert scored == (answer if num_orders else answer + " sees a cat")
        assert item.facts["bytes"] == len(scored)


def test_a_blank_at_the_beginning_has_no_space(data):
    args = run_scoring.ScoringArguments(data_file=data, task="multiple_choice", blank="_")
    assert args.text_of("_ runs", "dog") == ("", "dog", " runs")
    assert args.text_of("un_able", "do") == ("un", "do", "able")


BAD_ROWS = {
    "gold": ({"gold": "A"}, "gold must be an integer, got 'A' in row 0"),
    "real": ({"gold": 0.7}, "gold must be an integer, got 0.7 in row 0"),
    "csv": ({"choices": "['dog', 'man']"}, "choices must be a list of texts, .*in row 0"),
    "no token": ({"choices": ["", "dog"], "query": "_ runs"}, "at least one token to score, got '' in row 0"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_an_odd_row_is_named(case, data):
    change, message = BAD_ROWS[case]
    row = {"query": "the _", "choices": ["dog", "man"], "gold": 0, **change}
    with pytest.raises(ValueError, match=message):
        choice_items(data, row, blank="_", num_orders=2 if case == "no token" else None)


def test_a_special_token_in_a_text_is_scored_as_its_letters(data):
    tokenizer = word_tokenizer()
    args = run_scoring.ScoringArguments(data_file=data, max_length=64, stride=32)
    (item,) = run_scoring.windows(args, tokenizer, {"text": ["the <pad> </s>"]})
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(item.ids)


@pytest.mark.parametrize(("texts", "message"), [(["", ""], "at least one token to score, got none in 2 rows")])
def test_nothing_to_score_is_refused_before_a_model_is_loaded(texts, message, tmp_path):
    from modeling_insnext import InsNextConfig

    InsNextConfig(vocab_size=320).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = f"--model_name_or_path {tmp_path}/model --data_file {tmp_path}/rows.jsonl --output_dir {tmp_path}/out"
    with pytest.raises(ValueError, match=message):
        run_scoring.main([*given.split(), "--use_cpu", "--cache_dir", str(tmp_path / "cache")])
    assert not (tmp_path / "out").exists()


def test_scores_of_other_weights_or_data_are_not_taken_over(tmp_path, data):
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    args = run_scoring.ScoringArguments(data_file=data)

    def resume():
        command = run_scoring.file_stamps(ModelArguments(model_name_or_path=str(weights.parent)), args, None)
        return run_scoring.resume(tmp_path / "scores.jsonl", command, [])

    assert resume() == 0 and resume() == 0
    for path in (weights, data):
        before = os.stat(path)
        os.utime(path, ns=(0, 0))
        with pytest.raises(ValueError, match="hold this command's scores, got those of other files"):
            resume()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert resume() == 0


def test_a_score_that_is_no_number_is_refused(tmp_path, data, monkeypatch):
    found = [{"row": 7, "tokens": 1, "log_likelihood": -float("inf")}]
    monkeypatch.setattr(run_scoring, "left_to_right", lambda *_: found)
    args = run_scoring.ScoringArguments(data_file=data)
    with pytest.raises(ValueError, match="log-likelihood must be finite, got -inf in row 7"):
        run_scoring.score(args, None, [[None]], tmp_path / "scores.jsonl", 0, 0)
    assert not (tmp_path / "scores.jsonl").read_text()
    report = run_scoring.perplexity_report([{"row": 0, "tokens": 1, "bytes": 1, "log_likelihood": -1e4}])
    assert run_scoring.finite(report)["perplexity"] is None
