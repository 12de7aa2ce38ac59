"""What a token is decoded to never depends on its place, so pipelines write what `generate` writes."""

from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextConfig, InsNextForInsertionLM


CHECKPOINTS = Path(__file__).parents[1] / "examples/checkpoints"
MINIS = ("insnext-mini", "drt-mini")
TEXTS = (
    "The old man and the sea.",
    "   three spaces, then  two",
    "tabs\tand\n\n    indentation",
    "un able, able; 3.14 -- don't!",
    "a café, 日本 and 🦊",
)
SHAPE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TINY = {
    "smollm-like insnext": lambda: InsNextForInsertionLM(InsNextConfig(**SHAPE, num_hidden_layers=2)),
    "smollm-like drt": lambda: DrtForCausalLM(DrtConfig(**SHAPE, num_lower_layers=1, retrieval_groups=[1])),
}


@cache
def smollm_like():
    """Byte-level, digits alone, no space in front of a text, one token for beginning and end, none in front."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    names = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[0]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@cache
def tokenizer_of(name):
    return AutoTokenizer.from_pretrained(CHECKPOINTS / name) if name in MINIS else smollm_like()


@cache
def model_of(name):
    if name in MINIS:
        return AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    torch.manual_seed(0)
    return TINY[name]().eval()


def broken_cuts(tokenizer, text):
    """Return where the two halves of a text, decoded apart, are not the text; cuts inside a character are none."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    halves = [(tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])) for cut in range(len(ids) + 1)]
    whole = tokenizer.decode(ids)
    return [cut for cut, pair in enumerate(halves) if "\ufffd" not in "".join(pair) and "".join(pair) != whole]


@pytest.mark.parametrize("name", [*MINIS, "smollm-like"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_parts_of_a_text_are_decoded_as_in_the_whole(name, text):
    tokenizer = tokenizer_of(name)
    assert broken_cuts(tokenizer, text) == []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # the minis put one space before a text that has none
    assert tokenizer.decode(ids) in (text, f" {text}")


def test_a_decoder_that_strips_breaks_the_parts():
    """Control: the shipped decoder as it was."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "insnext-mini")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    assert broken_cuts(tokenizer, TEXTS[0])
    assert tokenizer.decode(tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]) == TEXTS[1][1:]


@pytest.mark.parametrize("options", [{}, {"left_to_right": True}], ids=["insertion", "left to right"])
@pytest.mark.parametrize("prompt", ["The dog", "A boy and", "3.14"])
@pytest.mark.parametrize("name", [*MINIS, *TINY])
def test_a_pipeline_writes_what_generate_writes(name, prompt, options):
    if "drt" in name and options:
        options = {"num_beams": 2}
    model, tokenizer = model_of(name), tokenizer_of(name)
    options = {"max_new_tokens": 6, "min_new_tokens": 4, "do_sample": False, **options}
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**ids, **options)[0]
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (full,), (new,) = writer(prompt, **options), writer(prompt, return_full_text=False, **options)
    whole = tokenizer.decode(out, skip_special_tokens=True)
    assert full["generated_text"] == (whole.removeprefix(" ") if name in MINIS else whole)
    assert new["generated_text"] == tokenizer.decode(out[ids.input_ids.shape[1] :], skip_special_tokens=True) != ""
