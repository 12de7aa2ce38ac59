"""`attn_implementation="insnext_triton"`: the model of `eager`, on a GPU or in Triton's interpreter."""

import pytest
import torch

from modeling_insnext import ChunkMemoryCache, DrtForCausalLM
from modeling_insnext.drt import attention_triton
from tests.support.drt import random_ids, read, tiny_model
from tests.support.equality import assert_set_as_accurate, relative_error, same_bits


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_lower_layers": 1,
    "chunk_size": 6,
    "sliding_window": 12,
}
SHAPES = {
    "x2": {},
    "mean, stream, dropped": {"landmark_source": "mean", "residual": "stream", "landmark_slot": "dropped"},
    "everything": {"sliding_window": None, "retrieval_groups": [1]},
    "keys per layer": {"retrieval_groups": [2, 1], "cross_attention_layers": 1, "keys_per_layer": True},
    "rope": {"position_encoding": "rope", "retrieval_groups": [1], "landmark_source": "mean"},
}


def model_of(attn, dtype=torch.float32, **changes):
    model = tiny_model(**{**SMALL, **changes}).to(DEVICE, dtype)
    model.set_attn_implementation(attn)
    return model


def trained(attn, dtype, ids, **changes):
    """Return logits and the gradient of every parameter; evaluation mode, since training draws noise."""
    model = model_of(attn, dtype, **changes)
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    return {"logits": out.logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("shape", SHAPES)
def test_training_equals_eager(shape):
    ids = random_ids(1, 27).to(DEVICE)
    exact = trained("eager", torch.float64, ids, **SHAPES[shape])
    twin = trained("eager", torch.float32, ids, **SHAPES[shape])
    ours = trained("insnext_triton", torch.float32, ids, **SHAPES[shape])
    assert_set_as_accurate(ours, twin, exact)
    # control: the measure sees logits that stand at other tokens
    assert relative_error(twin["logits"].flip(1), exact["logits"]) > 0.1


@pytest.mark.parametrize("location", ["device", pytest.param("host", marks=pytest.mark.slow)])
def test_decoding_equals_eager(location):
    ids, mask = random_ids(2, 26).to(DEVICE), torch.ones(2, 26, dtype=torch.long, device=DEVICE)
    mask[1, :7] = 0
    one_group = {"retrieval_groups": [1]}
    exact = model_of("eager", torch.float64, **one_group)(ids, mask, use_cache=False).logits
    twin = model_of("eager", **one_group)(ids, mask, use_cache=False).logits
    budget = 2 * relative_error(twin, exact) + torch.finfo(torch.float32).eps
    model = model_of("insnext_triton", **one_group)
    # a long segment, then one column at a time over the end of a chunk
    with torch.no_grad():
        past = ChunkMemoryCache(model.config, location)
        logits = [read(model, ids[:, :23], past, 23, mask[:, :23]), read(model, ids[:, 23:], past, 1, mask)]
        assert relative_error(torch.cat(logits, 1), exact) <= budget
    assert relative_error(model_of("eager", **one_group)(ids, use_cache=False).logits, exact) > 100 * budget


def test_it_is_chosen_at_load_and_generates_the_same(tmp_path):
    model_of("eager").save_pretrained(tmp_path)
    ids = random_ids(1, 15).to(DEVICE)
    texts = [
        DrtForCausalLM.from_pretrained(tmp_path, attn_implementation=attn).to(DEVICE).generate(ids, max_new_tokens=4)
        for attn in ("eager", "insnext_triton")
    ]
    assert same_bits(*texts)


def test_what_it_cannot_do_is_said(monkeypatch):
    ids = random_ids(1, 12).to(DEVICE)
    with pytest.raises(ValueError, match="needs float32, float16 or bfloat16, got torch.float64"):
        model_of("insnext_triton", torch.float64)(ids)
    with pytest.raises(ValueError, match="has no dropout, got attention_dropout=0.5"):
        model_of("insnext_triton", attention_dropout=0.5).train()(ids)
    with pytest.raises(
        ValueError, match='retrieval_by="token" needs eager, sdpa or flex_attention, got insnext_triton'
    ):
        model_of("insnext_triton", retrieval_by="token")(ids)
    wide = model_of("insnext_triton", hidden_size=512)
    with pytest.raises(ValueError, match="head dim of at most 128, got 256"):
        wide(ids)
    monkeypatch.setattr(attention_triton, "insertion_attention", None)
    with pytest.raises(ImportError, match="needs the package insnext_kernels"):
        model_of("insnext_triton")(ids)
