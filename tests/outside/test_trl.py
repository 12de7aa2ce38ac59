"""Trainers of TRL: what reads `forward` trains the model's own loss, what goes past it raises before a step."""

import functools
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextConfig, InsNextForInsertionLM
from tests.support.tokenizers import tiny_tokenizer


pytestmark = pytest.mark.outside

TOKENIZER = tiny_tokenizer(50)
TEXTS = ["the old man and the sea", "a quick brown fox", "the lazy dog", "jumps over"]
SHAPE = {
    "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
OPTIONS = {"use_cpu": True, "report_to": [], "max_steps": 1, "save_strategy": "no", "logging_steps": 1, "bf16": False}


PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def left_to_right_trainer():
    """Return the class that the page on training shows."""
    namespace = {}
    exec(re.search(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1], namespace)
    return namespace["LeftToRightSFTTrainer"]


def insnext():
    torch.manual_seed(0)
    return InsNextForInsertionLM(InsNextConfig(**SHAPE, num_hidden_layers=2))


def drt():
    torch.manual_seed(0)
    groups = {"num_lower_layers": 1, "retrieval_groups": [1], "chunk_size": 4, "sliding_window": 16}
    return DrtForCausalLM(DrtConfig(**SHAPE, **groups, num_retrieved_chunks=2))


def sft(trainer_class, model, folder, **options):
    rows = Dataset.from_dict({"text": TEXTS})
    arguments = SFTConfig(str(folder), per_device_train_batch_size=len(TEXTS), max_length=64, **OPTIONS, **options)
    return trainer_class(model, arguments, train_dataset=rows, processing_class=TOKENIZER)


def first_loss(trainer):
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def forward_loss(model, trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        return float(model(**batch, use_cache=False).loss)


def test_sft_of_insnext_raises_and_names_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="trl >= 1.7.*train on the loss of forward"):
        sft(SFTTrainer, insnext(), tmp_path).train()


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=str)
def test_sft_of_insnext_through_forward_is_the_loss_of_forward(tmp_path, options):
    model = insnext()
    trainer = sft(left_to_right_trainer(), model, tmp_path, **options)
    assert first_loss(trainer) == pytest.approx(forward_loss(insnext(), trainer), rel=1e-4)


def test_sft_of_drt_is_the_loss_of_forward(tmp_path):
    model = drt()
    trainer = sft(SFTTrainer, model, tmp_path)
    assert first_loss(trainer) == pytest.approx(forward_loss(drt().train(), trainer), rel=1e-4)


def test_packed_rows_of_drt_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a row must be one text, got packed ones.*packing=False"):
        sft(SFTTrainer, drt(), tmp_path, packing=True).train()


def dpo(make_model, folder):
    rows = Dataset.from_dict({"prompt": ["the old"], "chosen": [" man"], "rejected": [" dog"]})
    arguments = DPOConfig(str(folder), per_device_train_batch_size=1, **OPTIONS)
    return DPOTrainer(make_model(), make_model(), args=arguments, train_dataset=rows, processing_class=TOKENIZER)


def kto(make_model, folder):
    rows = {"prompt": ["the old", "a"], "completion": [" man", " brown fox"], "label": [True, False]}
    arguments = KTOConfig(str(folder), per_device_train_batch_size=2, **OPTIONS)
    rows = Dataset.from_dict(rows)
    return KTOTrainer(make_model(), make_model(), args=arguments, train_dataset=rows, processing_class=TOKENIZER)


def online(config_class, trainer_class, make_model, folder, **generation):
    """Return a trainer that writes its own completions; it loads the reference model from the folder of the first."""
    arguments = config_class(
        str(folder), per_device_train_batch_size=4, num_generations=2, max_completion_length=5, beta=0.1,
        generation_kwargs=generation, **OPTIONS,
    )  # fmt: skip
    make_model().save_pretrained(folder / "model")
    model = type(make_model()).from_pretrained(folder / "model")
    rows = Dataset.from_dict({"prompt": ["the old man", "a"]})
    return trainer_class(model, longer_is_better, args=arguments, train_dataset=rows, processing_class=TOKENIZER)


def longer_is_better(completions, **columns):
    return [float(len(completion)) for completion in completions]


def grpo(make_model, folder, **generation):
    return online(GRPOConfig, GRPOTrainer, make_model, folder, **generation)


def rloo(make_model, folder, **generation):
    return online(RLOOConfig, RLOOTrainer, make_model, folder, **generation)


def watched(trainer):
    """Return a list that takes in each call past the head: labels, what the trainer got, what the logits say."""
    model, calls = trainer.model, []
    fused = model.forward

    # generate reads the names of the arguments
    @functools.wraps(fused)
    def forward(*args, labels=None, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return fused(*args, labels=labels, **kwargs)
        out = fused(*args, labels=labels, fused_lm_head=True, **kwargs)
        with torch.no_grad():
            logits = fused(*args, **{**kwargs, "use_cache": False}).logits[:, :-1]
        expected = logits.log_softmax(-1).gather(2, labels[:, 1:, None].clamp_min(0))[..., 0]
        calls.append((labels[:, 1:], out.log_probs.detach(), expected))
        return out

    model.forward = forward
    return calls


@pytest.mark.parametrize("trainer", [dpo, kto, grpo, rloo])
def test_preferences_and_rewards_of_insnext_raise_and_name_what_to_do(trainer, tmp_path):
    with pytest.raises(ValueError, match="trl >= 1.7.*train on the loss of forward"):
        trainer(insnext, tmp_path).train()


@pytest.mark.parametrize("trainer, options", [(dpo, {}), (kto, {}), (grpo, {"use_cache": False}),
                                              (rloo, {"use_cache": False})])  # fmt: skip
def test_preferences_and_rewards_of_drt_take_the_log_probabilities_of_forward(trainer, options, tmp_path):
    trainer = trainer(drt, tmp_path, **options)
    calls = watched(trainer)
    trainer.train()
    assert calls and trainer.state.log_history[0]["grad_norm"] > 0
    for labels, log_probs, expected in calls:
        assert bool((labels >= 0).any())
        torch.testing.assert_close(log_probs[labels >= 0], expected[labels >= 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainer", [grpo, rloo])
def test_completions_that_drt_writes_in_training_need_no_cache(trainer, tmp_path):
    with pytest.raises(ValueError, match="a cache cannot be used in training.*use_cache=False"):
        trainer(drt, tmp_path).train()


def test_dpo_of_drt_reports_the_log_probability_that_forward_gives(tmp_path):
    trainer = dpo(drt, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    ids, mask = batch["input_ids"][:1], batch["attention_mask"][:1]
    with torch.no_grad():
        log_p = drt()(ids, attention_mask=mask).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    expected = float(log_p[batch["completion_mask"][0, 1:].bool()].sum())
    assert trainer.state.log_history[0]["logps/chosen"] == pytest.approx(expected, rel=1e-4)
