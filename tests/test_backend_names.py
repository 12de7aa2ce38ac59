"""`attn_implementation="insnext_triton"`: one name, which each architecture serves itself, whoever registered it last,
and which no other model may use."""

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextConfig, InsNextForInsertionLM
from modeling_insnext.drt import attention_triton as drt_triton
from modeling_insnext.insnext import attention as insnext_attention


NAME = "insnext_triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.arange(3, 15, device=DEVICE)[None]
SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
MODELS = {
    "drt": lambda: DrtForCausalLM(
        DrtConfig(**SIZES, num_lower_layers=1, retrieval_groups=[1], chunk_size=3, sliding_window=6)
    ),
    "insnext": lambda: InsNextForInsertionLM(InsNextConfig(**SIZES, num_hidden_layers=1)),
}


def somebody_elses(*args, **kwargs):
    raise AssertionError("what Transformers holds was called")


@pytest.mark.parametrize(
    "last", [drt_triton.refuse_other_models, insnext_attention.refuse_other_models, somebody_elses]
)
@pytest.mark.parametrize("architecture", MODELS)
def test_each_architecture_has_its_own_whoever_registered_last(architecture, last, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, last)
    torch.manual_seed(0)
    model, logits = MODELS[architecture]().to(DEVICE).eval(), {}
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(IDS).logits.nan_to_num(0, neginf=0)
    assert (logits["eager"] - logits[NAME]).abs().max() < 1e-4
    # control: the measure sees other tokens
    assert (logits["eager"] - logits[NAME].flip(1)).abs().max() > 1e-2


def test_another_model_is_told_so():
    config = LlamaConfig(**SIZES, num_hidden_layers=1, attn_implementation=NAME)
    with pytest.raises(ValueError, match="for the models that define it, got a LlamaAttention; use eager"):
        LlamaForCausalLM(config).to(DEVICE)(IDS)
