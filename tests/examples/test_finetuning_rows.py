"""What run_finetuning.py makes of its rows: examples, an evaluation loss per token, predictions of any batch size."""

import json
import logging

import pytest
import run_finetuning
import torch
from common import finetuning
from common.training import write_lines
from datasets import Dataset, DatasetDict
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from modeling_insnext import InsNextConfig
from modeling_insnext.trainers import TokenMeanTrainer
from tests.support.equality import same_bits
from tests.support.script_models import MAKERS, SHAPES, word_tokenizer


ROWS = {
    "prompt": ["the dog", "a cat sees", "the " * 30],
    "completion": ["runs", "the old man and the sea and the house", "sleeps"],
}


def completion_rows(insnext: bool) -> dict:
    args = run_finetuning.FinetuningArguments(task="completion", max_length=20)
    return finetuning.completion_examples(args, word_tokenizer(), insnext)(ROWS)


@pytest.mark.parametrize("name", MAKERS)
def test_a_completion_is_the_same_in_a_batch_and_alone(name):
    model, tokenizer = MAKERS[name](vocab_size=320), word_tokenizer()
    prompts, options = ["the dog", "a cat sees the big red house and"], {"max_new_tokens": 5, "do_sample": False}
    alone = [run_finetuning.completions(model, tokenizer, [prompt], options)[0] for prompt in prompts]
    assert run_finetuning.completions(model, tokenizer, prompts, options) == alone
    assert any(alone) and not any("the dog" in text for text in alone)


@pytest.mark.parametrize("insnext", [True, False])
def test_rows_without_a_token_to_learn_are_left_out_and_counted(insnext, caplog):
    made = completion_rows(insnext)
    assert [len(values) for values in made.values()] == [2] * len(made)
    args = run_finetuning.FinetuningArguments(task="completion", max_length=20)
    with caplog.at_level(logging.INFO):
        splits = DatasetDict(validation=Dataset.from_dict(ROWS))
        run_finetuning.report_losses({"eval_dataset": Dataset.from_dict(made)}, splits, args)
    assert "1 of 3 rows are left out: max_length=20" in caplog.text


def test_the_evaluation_loss_is_per_token_whatever_the_batches(tmp_path):
    model, tokenizer, rows = MAKERS["drt"](vocab_size=320), word_tokenizer(), Dataset.from_dict(completion_rows(False))
    nats = count = 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        tokens = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nats += tokens * float(model(torch.tensor([row["input_ids"]]), labels=labels).loss)
        count += tokens
    for size in (1, 2):
        training = TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=size, use_cpu=True, report_to=[], disable_tqdm=True
        )
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer = TokenMeanTrainer(model, training, data_collator=collator, eval_dataset=rows)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(nats / count, rel=1e-5)


def test_a_text_that_spells_a_special_token_means_its_letters():
    tokenizer, args = word_tokenizer(), run_finetuning.FinetuningArguments(task="infilling")
    (ids,) = finetuning.insertion_examples(args, tokenizer)({"text": ["the <pad> and </s>"]})["input_ids"]
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)
    assert tokenizer.decode(ids[1:]).strip() == "the <pad> and </s>"


BAD_TESTS = {
    "no words": ("keywords", {"words": [["dog"], []]}, "row 1 of the test data: .*keyword"),
    "words of a csv": ("keywords", {"words": ["dog park"]}, "words must be a list of words .*'dog park' in row 0"),
    "blank word": ("keywords", {"words": [["dog", " "]]}, r"words must be a list of words .*in row 0 of the test"),
    "no mark": ("infilling", {"text": ["a ___", "a cat"]}, "row 1 of the test data: .*___"),
    "texts": ("infilling", {"text": [["a ___"]]}, "text must be a text, .*in row 0 of the test data"),
    "gap": ("infilling", {"text": ["a ___{50,60} b"]}, "row 0 of the test data: .*50"),
    "long": ("completion", {"prompt": ["the", "the " * 200]}, "row 1 of the test data: .*128"),
    "None": ("completion", {"prompt": ["the", None]}, "prompt must be a text, got None in row 1 of the test data"),
}


@pytest.mark.parametrize("case", BAD_TESTS)
def test_a_row_that_cannot_be_predicted_is_named_before_anything_is_trained(case):
    task, rows, message = BAD_TESTS[case]
    args = run_finetuning.FinetuningArguments(task=task, keywords_column="words" if task == "keywords" else None)
    config = InsNextConfig(**SHAPES["insnext"], vocab_size=320)
    with pytest.raises(ValueError, match=message):
        run_finetuning.check_tests(args, word_tokenizer(), config, Dataset.from_dict(rows))


@pytest.mark.parametrize("texts", [["a", None], [["a"], []], [["a"], ["b", None]], [1, 2]])
def test_training_texts_are_checked(texts):
    args = run_finetuning.FinetuningArguments(task="infilling")
    with pytest.raises(
        ValueError, match="text must be a text or a list of texts, got .* in row [01] of the train data"
    ):
        run_finetuning.check_rows(args, Dataset.from_dict({"text": texts}), "train", ["text"])
    run_finetuning.check_rows(args, Dataset.from_dict({"text": ["", "a"]}), "train", ["text"])


@pytest.mark.parametrize("task", ["keywords", "infilling", "completion"])
@pytest.mark.parametrize("name", ["insnext", "drt"])
def test_options_that_generate_refuses_are_refused_before_any_training(task, name):
    if name == "drt" and task != "completion":
        return
    model, tokenizer = MAKERS[name](vocab_size=320), word_tokenizer()
    values = {"keywords": ["dog"], "infilling": "a ___ cat", "completion": "the dog"}
    columns = {"keywords_column": "words"} if task == "keywords" else {}

    def check(generation):
        args = run_finetuning.FinetuningArguments(task=task, generation=generation, **columns)
        tests = Dataset.from_dict({args.test_columns[0]: [values[task]]})
        run_finetuning.check_generation(args, model, tokenizer, tests)

    before = torch.random.get_rng_state()
    check('{"max_new_tokens": 5, "do_sample": true}')
    assert same_bits(torch.random.get_rng_state(), before)
    for wrong in (
        '{"max_new_tokens": 5, "tempersture": 2}',
        '{"max_new_tokens": 5, "do_sample": true, "temperature": -1}',
    ):
        with pytest.raises(
            ValueError, match="generation must hold options of generate, got .*(tempersture|temperature)"
        ):
            check(wrong)


def test_lines_hold_no_nan(tmp_path):
    write_lines(tmp_path / "a", [{"a": [float("nan"), 1.5], "b": {"c": float("inf")}, "d": torch.float32}])
    assert json.loads((tmp_path / "a").read_text()) == {"a": [None, 1.5], "b": {"c": None}, "d": "torch.float32"}


def test_the_tokens_of_keywords_are_given_and_what_is_missing_is_counted():
    tokenizer = word_tokenizer()
    args = run_finetuning.FinetuningArguments(task="keywords", keywords_column="words")
    texts, words = [["The old man sees a cat", "a dog"]], [["Old Man", "cat"]]
    made = finetuning.insertion_examples(args, tokenizer)({"text": texts, "words": words})
    given = [
        tokenizer.decode([token for token, given in zip(*pair, strict=True) if given])
        for pair in zip(made["input_ids"], made["given"], strict=True)
    ]
    assert [text.split() for text in given] == [["old", "man", "cat"], []]
    assert made["found"] == [2, 0] and made["asked"] == [2, 2]
