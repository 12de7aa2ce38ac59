"""Adapters: they train, they generate, and merging and reloading change nothing."""

import peft
import pytest
import torch

from modeling_insnext import DrtForCausalLM, DrtForSequenceClassification
from tests.support.drt import random_ids, shipped_model, tiny_model, whole
from tests.support.equality import same_bits, within_rounding


IDS = random_ids(2, 33)
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def adapted(target_modules=("q_proj", "v_proj"), **options):
    """Return a float64 model with adapters that do something."""
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **options)
    model = peft.get_peft_model(tiny_model(), config).double()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_adapters_reach_window_chunks_and_encoder():
    names = {name.split(".lora_A")[0] for name, _ in adapted().named_parameters() if "lora_A" in name}
    ends = {".".join(name.split(".")[-4:]) for name in names}
    assert {"layers.0.self_attn.q_proj", "layers.2.cross_attn.q_proj", "encoder.layers.0.q_proj"} <= ends
    assert any(name.endswith("encoder.v_proj") for name in names)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_a_merged_model_is_the_adapted_one(targets, tmp_path):
    model = adapted(targets)
    expected, written = whole(model, IDS), model.generate(input_ids=IDS, **GREEDY)
    assert (expected - whole(tiny_model(), IDS)).abs().max() > 0.1
    with torch.no_grad():
        past = model(IDS[:, :14], use_cache=True).past_key_values
        rest = model(IDS[:, 14:], past_key_values=past).logits
    assert (rest - expected[:, 14:]).abs().max() < 1e-9
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert within_rounding(whole(loaded, IDS), expected)
    assert same_bits(loaded.generate(input_ids=IDS, **GREEDY), written)
    merged = model.merge_and_unload()
    assert type(merged) is DrtForCausalLM
    assert (whole(merged, IDS) - expected).abs().max() < 1e-9
    assert same_bits(merged.generate(IDS, **GREEDY), written)
    merged.save_pretrained(tmp_path / "merged")
    again = DrtForCausalLM.from_pretrained(tmp_path / "merged")
    assert (whole(again, IDS) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_adapters_alone_are_trained(reentrant):
    model = adapted(modules_to_save=["query_norms.0", "query_norms.1"]).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if reentrant is not None:
        model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.base_model.enable_input_require_grads()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not same_bits(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained
    assert all("lora_" in name or ".modules_to_save." in name for name in changed)
    assert any("encoder" in name for name in changed) and any("query_norms" in name for name in changed)


def test_a_classifier_takes_adapters():
    model = shipped_model(DrtForSequenceClassification)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    adapted_model = peft.get_peft_model(model, config)
    adapted_model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, p in adapted_model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("score" in name for name in trained) and any("lora_B" in name for name in trained)


@pytest.mark.parametrize("rows", [1, 2])
def test_prefix_tuning_is_refused_and_prompt_tuning_is_read_like_text(rows):
    ids = random_ids(rows, 6)
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    prefixed = peft.get_peft_model(shipped_model(), peft.PrefixTuningConfig(**options))
    with pytest.raises(ValueError, match="must be a ChunkMemoryCache, got DynamicCache .as prefix tuning sends"):
        prefixed(input_ids=ids)
    with pytest.raises(ValueError, match="PREFIX_TUNING of PEFT is a cache of its own kind"):
        prefixed.generate(input_ids=ids, max_new_tokens=2)
    prompted = peft.get_peft_model(shipped_model(), peft.PromptTuningConfig(**options)).eval()
    out = prompted.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:]
    text = ids
    for step in range(4):
        logits = prompted(input_ids=text).logits[:, -1].clone()
        logits[:, 2] = -torch.inf
        assert out[:, step].tolist() == logits.argmax(1).tolist()
        text = torch.cat([text, out[:, step, None]], 1)


@pytest.mark.parametrize("landmark_source", ["token", "mean", "cls"])
def test_a_row_of_several_chunks_takes_its_own_adapter_and_so_do_its_beams(landmark_source):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(landmark_source=landmark_source), config).double()
    model.add_adapter("second", config)
    model = model.double().eval()
    beams = {**GREEDY, "num_beams": 3, "pad_token_id": 0}
    names = ["second", "default"]
    with torch.no_grad():
        mixed = model(IDS, adapter_names=names).logits
        written = model.generate(input_ids=IDS, adapter_names=names, **beams)
        for row, name in enumerate(names):
            model.set_adapter(name)
            alone = model(IDS[row : row + 1]).logits[0]
            assert (mixed[row] - alone).abs().max() < 1e-9
            # the other row had another adapter
            assert (model(IDS[1 - row : 2 - row]).logits[0] - mixed[1 - row]).abs().max() > 0.1
            assert same_bits(model.generate(input_ids=IDS[row : row + 1], **beams)[0], written[row])
