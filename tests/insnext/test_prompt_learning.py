"""Virtual tokens of PEFT: read from left to right exactly as they stand, refused where text is inserted."""

import peft
import pytest
import torch

from tests.support.equality import difference
from tests.support.insnext import tiny_model


IDS = torch.tensor([[1, 5, 9, 4], [1, 7, 3, 8]])
METHODS = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def prompted(method):
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_model(), METHODS[method]()).double().eval()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_inserted_text_refuses_virtual_tokens(method):
    model = prompted(method)
    with pytest.raises(ValueError, match=f"{method} of PEFT puts virtual tokens in front .* needs left_to_right=True"):
        model.generate(input_ids=IDS, max_new_tokens=2)
    # the model itself, and one with adapters of another kind, write on
    assert model.get_base_model().generate(IDS, max_new_tokens=2).shape[0] == 2
    lora = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert lora.generate(input_ids=IDS, max_new_tokens=2).shape[0] == 2


@pytest.mark.parametrize("method", METHODS)
def test_left_to_right_text_follows_the_virtual_tokens(method):
    model = prompted(method)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "left_to_right": True, "do_sample": False}
    out = model.generate(input_ids=IDS, **options)[:, -5:]
    text = IDS
    for step in range(5):
        logits = model(input_ids=text).logits[:, -1].clone()
        logits[:, 2] = -torch.inf
        assert out[:, step].tolist() == logits.argmax(1).tolist()
        text = torch.cat([text, out[:, step, None]], 1)
    # control: they change what is written
    assert out.tolist() != model.get_base_model().generate(IDS, **options)[:, -5:].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_padding_stands_behind_texts_with_virtual_tokens(method):
    model = prompted(method)
    ids, mask = torch.tensor([[1, 5, 9, 4], [1, 7, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = model(input_ids=ids, attention_mask=mask).logits[1]
    padded = padded[: len(padded) - 2]
    assert difference(padded, model(input_ids=ids[1:, :2]).logits[0]) < 1e-9
    with pytest.raises(ValueError, match="form one run.*behind virtual tokens of PEFT.* padded on the right"):
        model(input_ids=ids.flip(1), attention_mask=mask.flip(1))
