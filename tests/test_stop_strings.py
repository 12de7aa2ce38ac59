"""`generate(stop_strings=, tokenizer=)`: Transformers hands the tokenizer on to `forward`, which has no use for it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextConfig, InsNextForInsertionLM


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.3}
TOKENIZER = Path(__file__).parents[1] / "examples" / "checkpoints" / "insnext-mini"


@pytest.mark.parametrize("architecture", ["insnext", "drt"])
def test_a_string_stops_the_text(architecture):
    tokenizer, options = AutoTokenizer.from_pretrained(TOKENIZER), {}
    torch.manual_seed(0)
    if architecture == "insnext":
        config = InsNextConfig(vocab_size=len(tokenizer), **SHAPE, num_hidden_layers=1)
        model, options = InsNextForInsertionLM(config).eval(), {"left_to_right": True}
    else:
        shape = {"num_lower_layers": 1, "retrieval_groups": [1], "chunk_size": 4, "sliding_window": 8}
        model = DrtForCausalLM(DrtConfig(vocab_size=len(tokenizer), **SHAPE, **shape)).eval()
    ids = torch.tensor([tokenizer("The old man")["input_ids"]])
    options |= {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    whole = model.generate(input_ids=ids, **options)[0, ids.shape[1] :]
    end = tokenizer.decode(whole[2:3])
    out = model.generate(input_ids=ids, **options, stop_strings=[end], tokenizer=tokenizer)[0, ids.shape[1] :]
    assert len(whole) == 6 and out.tolist() == whole[: len(out)].tolist() and end in tokenizer.decode(out)
    assert len(out) <= 3
    # control: a misspelt option is refused as before
    with pytest.raises((TypeError, ValueError), match="tokeniser"):
        model.generate(input_ids=ids, **options, tokeniser=tokenizer)
