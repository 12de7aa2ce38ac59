"""Pipelines, as anyone types them: the right shape of the answer, and no warnings."""

import logging
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import pipeline
from transformers.pipelines import PipelineException
from transformers.utils import logging as transformers_logging

from modeling_insnext import (
    InsNextForInsertionLM,
    InsNextForSequenceClassification,
    InsNextForTokenClassification,
    InsNextModel,
)
from tests.support.equality import same_bits
from tests.support.insnext import shipped_model
from tests.support.tokenizers import tiny_tokenizer


PROMPTS = ["the old man and", "sea"]
# there pipelines of any model, a Llama's too, put options of their own beside what is asked for, and warn of them
OLD = Version(transformers.__version__) < Version("5.23")


@pytest.fixture(autouse=True)
def silence():
    """Let no pipeline warn, neither by `warnings` nor in the log of transformers."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield records
    logger.removeHandler(handler)
    assert OLD or [text for text in records if "tokenizer parallelism" not in text] == []


@pytest.fixture(scope="module")
def writer():
    return pipeline("text-generation", model=shipped_model(InsNextForInsertionLM), tokenizer=tiny_tokenizer())


def texts(answer):
    return [item["generated_text"] for item in answer]


def test_a_warning_would_be_noticed(silence):
    transformers_logging.get_logger("transformers.generation").warning("look out")
    assert silence == ["look out"]
    silence.clear()


@pytest.mark.parametrize("left_to_right", [False, True])
def test_a_prompt_is_continued(writer, left_to_right):
    (text,) = texts(writer("the old", max_new_tokens=5, do_sample=False, left_to_right=left_to_right))
    assert text.startswith("the old") and len(text) > len("the old")
    direct = writer.model.generate(
        **writer.tokenizer("the old", return_tensors="pt"), max_new_tokens=5, left_to_right=left_to_right
    )
    assert text == writer.tokenizer.decode(direct[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("options", [{}, {"max_length": 12}, {"min_new_tokens": 3, "max_new_tokens": 6}], ids=str)
def test_lengths(writer, options):
    if OLD and "max_length" in options:
        pytest.skip("a pipeline's own max_new_tokens goes before max_length there")
    torch.manual_seed(0)
    (answer,) = writer("the old", return_tensors=True, **options)
    length = len(answer["generated_token_ids"])
    given = len(writer.tokenizer("the old").input_ids)
    assert given + options.get("min_new_tokens", 0) <= length <= options.get("max_length", 64)
    if "max_new_tokens" in options:
        assert length <= given + options["max_new_tokens"]


@pytest.mark.parametrize("left_to_right", [False, True])
def test_a_batch_writes_what_its_rows_would(writer, left_to_right):
    options = {"max_new_tokens": 5, "do_sample": False, "left_to_right": left_to_right}
    batch = [texts(answer) for answer in writer(PROMPTS, batch_size=2, **options)]
    assert batch == [texts(writer(prompt, **options)) for prompt in PROMPTS]
    assert all(text.startswith(prompt) for (text,), prompt in zip(batch, PROMPTS, strict=True))


@pytest.mark.parametrize(("side", "left_to_right"), [("left", False), ("left", True), ("right", False)])
def test_the_new_text_begins_where_padded_prompts_end(writer, side, left_to_right):
    prompts = writer.tokenizer(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
    width = prompts.input_ids.shape[1]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2}
    texts = writer.model.generate(**prompts, left_to_right=left_to_right, **options)
    kept = (texts[:, :width] == prompts.input_ids.repeat_interleave(2, 0)).all()
    assert kept == (side == "left")
    if not left_to_right:
        out = writer.model.generate(**prompts, **options, return_dict_in_generate=True)
        assert same_bits(out.sequences, texts)
        assert ((out.insertion_steps == -2) == (texts == 0)).all()
        assert (out.insertion_steps == -1).sum() == 2 * prompts.attention_mask.sum()
    if side == "left":
        assert texts.shape == (4, width + 5)
        assert (texts[:, width:] > 2).all()


@pytest.mark.parametrize("left_to_right", [False, True])
def test_several_texts_for_each_prompt(writer, left_to_right):
    torch.manual_seed(0)
    options = {"max_new_tokens": 8, "min_new_tokens": 4, "do_sample": True, "left_to_right": left_to_right}
    answers = [texts(answer) for answer in writer(PROMPTS, batch_size=2, num_return_sequences=4, **options)]
    assert [len(answer) for answer in answers] == [4, 4]
    assert all(text.startswith(prompt) for answer, prompt in zip(answers, PROMPTS, strict=True) for text in answer)
    assert all(len(set(answer)) > 1 for answer in answers)


def test_beams(writer):
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    assert len(set(texts(writer("the old", **options)))) == 2


def test_only_the_new_text(writer):
    options = {"max_new_tokens": 5, "do_sample": False}
    (whole,), (new,) = (texts(writer("the old", return_full_text=full, **options)) for full in (True, False))
    assert whole == "the old" + new


def test_a_seed_makes_it_repeatable(writer):
    once, again, other = (texts(writer("the old", max_new_tokens=8, do_sample=True, seed=s)) for s in (1, 1, 2))
    assert once == again != other


def test_misspelt_options_are_refused(writer):
    with pytest.raises(ValueError, match="did you mean 'max_new_tokens'"):
        writer("the old", max_new_token=3)


def test_text_classification():
    model = shipped_model(InsNextForSequenceClassification, id2label={0: "no", 1: "yes"})
    classify = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer())
    batch = classify(PROMPTS, batch_size=2)
    alone = [classify(prompt)[0] for prompt in PROMPTS]
    assert [answer["label"] for answer in batch] == [answer["label"] for answer in alone]
    assert all(abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(batch, alone, strict=True))
    assert {answer["label"] for answer in batch} <= {"no", "yes"}


def test_token_classification():
    model = shipped_model(InsNextForTokenClassification, id2label={0: "O", 1: "B-A", 2: "I-A"})
    label = pipeline("token-classification", model=model, tokenizer=tiny_tokenizer(), ignore_labels=[])
    tokens = label("the old man")
    assert "".join("the old man"[token["start"] : token["end"]] for token in tokens if token["end"]).split() == [
        "the",
        "old",
        "man",
    ]
    assert {token["entity"] for token in tokens} <= {"O", "B-A", "I-A"}


def test_feature_extraction():
    read = pipeline("feature-extraction", model=shipped_model(InsNextModel), tokenizer=tiny_tokenizer())
    features = torch.tensor(read("the old man"))
    assert features.shape == (1, len(tiny_tokenizer()("the old man").input_ids), 32)


def test_feature_extraction_from_a_language_model_reports_nothing(tmp_path, silence):
    shipped_model(InsNextForInsertionLM, tie_word_embeddings=False).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert torch.tensor(pipeline("feature-extraction", model=str(tmp_path))("the old man")).shape[0] == 1
    assert silence == []
    # control: a tensor that no class knows is reported
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "other.weight": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = InsNextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"other.weight"}
    assert len(silence) == 1 and "other.weight" in silence[0]
    silence.clear()


def test_batches_without_end_are_refused_before_any_work(writer):
    with pytest.raises(ValueError, match="continuous batching .generate_batch. keeps keys in pages.* use generate"):
        writer.model.generate_batch([[1, 5, 6], [1, 7]], max_new_tokens=3)


def test_what_a_pipeline_lacks_is_named(writer):
    with pytest.raises(ValueError, match="tokenizer.chat_template is not set"):
        writer([{"role": "user", "content": "hello"}], max_new_tokens=3)
    with pytest.raises(PipelineException, match="mask_token"):
        pipeline("fill-mask", model=writer.model, tokenizer=writer.tokenizer)("the old")
