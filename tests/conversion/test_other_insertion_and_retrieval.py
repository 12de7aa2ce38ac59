"""State dicts of the public DRT code and of ILM: laid out here by their names, converted, compared in float64."""

import json

import pytest
import torch

from conversion.checkpoint import check_folder
from conversion.convert import convert_folder, convert_tensors
from conversion.from_ilm import FAMILY as ILM
from conversion.from_ilm import IlmConfig
from conversion.from_upstream_drt import FAMILY as UPSTREAM
from conversion.from_upstream_drt import UpstreamConfig
from modeling_insnext import DrtForCausalLM, InsNextForInsertionLM
from tests.support.equality import difference, same_bits
from tests.support.foreign import ILM_CONFIG, UPSTREAM_CONFIG, ilm_tensors, laid_out, our_drt
from tests.support.sources import random_ids


CLOSE = 1e-9


@pytest.mark.parametrize("chunk_size", [63, 64])
def test_the_public_codes_state_dict_is_the_same_model(chunk_size, tmp_path):
    model = our_drt(chunk_size)
    tensors = laid_out(model)
    assert "module.model.upper_layers.1.0.gca.pre_norm.weight" in tensors
    (tmp_path / "src").mkdir()
    torch.save(tensors, tmp_path / "src" / "model0_100.bin")
    (tmp_path / "src" / "config.json").write_text(json.dumps({**UPSTREAM_CONFIG, "enc_chunk_size": chunk_size}))
    converted = convert_folder(UPSTREAM, str(tmp_path / "src"), tmp_path / "dst", "drt")
    assert converted.new == [] and check_folder(tmp_path / "dst").chunk_size == chunk_size
    loaded = DrtForCausalLM.from_pretrained(tmp_path / "dst")
    ids = random_ids(1, 300).clamp_max(44)
    with torch.no_grad():
        expected, actual = model(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits
    assert loaded.dtype == torch.float64
    assert difference(actual[..., :49], expected[..., :49]) < CLOSE
    # control: layers of the groups exchanged
    swap = {
        name: name.replace("upper_layers.0.0", "upper_layers.0.1") for name in tensors if "upper_layers.0.0" in name
    }
    swap |= {theirs: ours for ours, theirs in swap.items()}
    wrong = {swap.get(name, name): tensor for name, tensor in tensors.items()}
    config = UpstreamConfig(**{**UPSTREAM_CONFIG, "enc_chunk_size": chunk_size})
    loaded.load_state_dict(convert_tensors(UPSTREAM, wrong, config, "drt").tensors, strict=False)
    with torch.no_grad():
        assert difference(loaded(ids, use_cache=False).logits[..., :49], expected[..., :49]) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.lmk_q_proj.weight": torch.zeros(16, 16)}, "of the code since 98cda5d .* got model.lmk_q_proj.weight"),
        ({"backbone.norm_f.weight": torch.zeros(16)}, "of the code since 98cda5d .* got backbone.norm_f.weight"),
        (
            {"module.model.upper_layers.2.0.self_attn.q_proj.weight": torch.zeros(16, 16)},
            r"got module.model.upper_layers.2.0",
        ),
        ({"module.model.lower_layers.0.self_attn.m": torch.ones(2)}, "must be ALiBi's slopes"),
        ({"module.model.lower_layers.0.self_attn.m": torch.ones(3)}, "must be ALiBi's slopes"),
        (
            {"module.model.landmark": torch.ones(16).double()},
            "a row of the embedding, got a tensor of its own",
        ),
        ({"module.model.extra.weight": torch.ones(2)}, "1 without: module.model.extra.weight"),
    ],
    ids=["older", "successor", "group", "slopes", "heads", "landmark", "extra"],
)
def test_other_versions_of_the_public_code_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        convert_tensors(UPSTREAM, {**laid_out(our_drt()), **change}, UpstreamConfig(**UPSTREAM_CONFIG), "drt")


def test_other_configurations_of_the_public_code_are_refused(tmp_path):
    for changes, message in (
        ({"enc_chunk_size": 32}, "remainder of 0 or 1 divided by 64, got 32"),
        ({"enable_alibi": False}, "enable_alibi must be True, got False"),
        ({"chunk_id": 50}, r"chunk_id must be a row of the embedding \[0, 50\), got 50"),
        ({"chunk_id": "49"}, r"chunk_id must be a row of the embedding \[0, 50\), got '49'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_tensors(UPSTREAM, laid_out(our_drt()), UpstreamConfig(**{**UPSTREAM_CONFIG, **changes}), "drt")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="must be a configuration of the public DRT code, got none with chunk_id"):
        UPSTREAM.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**UPSTREAM_CONFIG, "decoder_layers": 4}))
    with pytest.raises(ValueError, match="must hold numbers of layers in decoder_layers, got 4"):
        UPSTREAM.read(tmp_path)
    for text, message in (("{", "must hold JSON"), ("[]", "must hold an object of JSON, got list")):
        (tmp_path / "config.json").write_text(text)
        for family in (UPSTREAM, ILM):
            with pytest.raises(ValueError, match=message):
                family.read(tmp_path)


def ilm_states(w: dict, ids: torch.Tensor, act) -> torch.Tensor:
    """States behind the last layer of an ILM without positions, from its formulae."""
    x = w["embed_tokens.weight"][ids]
    for n in range(2):
        part = {name.removeprefix(f"encoder.{n}."): tensor for name, tensor in w.items()}
        normed = torch.nn.functional.layer_norm(x, (16,), part["norm1.weight"], part["norm1.bias"])
        heads = (normed @ part["attn_qkv.weight"].T).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        weights = (heads[0] @ heads[1].mT / 8**0.5).softmax(-1)
        x = x + (weights @ heads[2]).transpose(1, 2).flatten(2) @ part["o_proj.weight"].T
        normed = torch.nn.functional.layer_norm(x, (16,), part["norm2.weight"], part["norm2.bias"])
        inner = act(normed @ part["mlp.0.weight"].T + part["mlp.0.bias"])
        x = x + inner @ part["mlp.2.weight"].T + part["mlp.2.bias"]
    return x


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_layers_of_ilm_are_the_same_without_positions(normed, activation, monkeypatch):
    config = IlmConfig(**ILM_CONFIG, activation=activation, final_layer_without_normalization=not normed)
    tensors, ids = ilm_tensors(normed), random_ids(2, 12)
    converted = convert_tensors(ILM, {f"model.{n}": x for n, x in tensors.items()}, config, "insnext", bos_token_id=4)
    assert ("model.norm.weight" in converted.new) == (not normed)
    model = InsNextForInsertionLM(converted.config).double().eval()
    model.load_state_dict(converted.tensors)
    states = []
    model.model.layers[-1].register_forward_hook(lambda module, given, out: states.append(out))
    act = torch.relu if activation == "relu" else lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    expected = ilm_states(tensors, ids, act)
    with torch.no_grad():
        model.model(ids, is_causal=False)
        assert difference(states.pop(), expected) > 1e-2
        monkeypatch.setattr(model.model, "slopes", [[0.0, 0.0], [0.0, 0.0]])
        model.model(ids, is_causal=False)
    assert difference(states.pop(), expected) < 1e-8
    assert same_bits(model.lm_head.weight, tensors["output_layer.linear.weight"])


def test_a_folder_of_ilm_is_read_and_what_is_none_is_refused(tmp_path):
    (tmp_path / "src").mkdir()
    torch.save(ilm_tensors(False), tmp_path / "src" / "ilm-tiny.pt")
    with pytest.raises(ValueError, match="must hold the arguments of an ILM, got none with d_model, nhead, num_emb"):
        convert_folder(ILM, str(tmp_path / "src"), tmp_path / "dst", "insnext")
    (tmp_path / "src" / "config.json").write_text(json.dumps(ILM_CONFIG))
    converted = convert_folder(ILM, str(tmp_path / "src"), tmp_path / "dst", "insnext", bos_token_id=4, eos_token_id=5)
    assert check_folder(tmp_path / "dst").bos_token_id == converted.config.bos_token_id == 4
    gpt2 = {**ilm_tensors(False), "transformer.h.0.ln_1.weight": torch.ones(16)}
    with pytest.raises(ValueError, match="1 without: transformer.h.0.ln_1.weight"):
        convert_tensors(ILM, gpt2, IlmConfig(**ILM_CONFIG), "insnext")
    with pytest.raises(ValueError, match="activation must be one of .* got 'silu'"):
        convert_tensors(ILM, {}, IlmConfig(**ILM_CONFIG, activation="silu"), "insnext")
