"""PEFT knows both model types: adapters without named targets, here and on a remote-code checkpoint alone."""

from pathlib import Path

import peft
import pytest
import torch
import transformers

from modeling_insnext import DrtConfig, InsNextConfig
from tests.support.clean_process import run_clean
from tests.support.equality import same_bits, within_rounding


SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
CONFIGS = {
    "insnext": lambda: InsNextConfig(**SIZES, num_hidden_layers=2, initializer_range=0.3),
    "drt": lambda: DrtConfig(
        **SIZES,
        num_lower_layers=1,
        retrieval_groups=[1],
        chunk_size=5,
        num_retrieved_chunks=2,
        sliding_window=9,
        initializer_range=0.3,
    ),
}
IDS = torch.randint(3, 50, (2, 23), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 6, "do_sample": False}

REMOTE = """
import json, sys
import torch, transformers
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(base).__module__.startswith("transformers_modules")
    import peft
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    assert sorted(model.peft_config["default"].target_modules) == ["q_proj", "v_proj"]
    model.save_pretrained(folder + "-adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder + "-adapter", trust_remote_code=True).eval()
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        first, again = model(ids).logits, loaded(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, plain)
    written = model.generate(input_ids=ids, **options)
    assert torch.equal(written, loaded.generate(input_ids=ids, **options))
    merged = loaded.merge_and_unload()
    with torch.no_grad():
        difference = (merged(ids).logits - first).nan_to_num(nan=0.0).abs().max()
    assert difference < 1e-4, difference
    print("same", base.config.model_type)
"""


def model_of(model_type, auto_class="AutoModelForCausalLM", **fields):
    torch.manual_seed(0)
    config = CONFIGS[model_type]()
    config.update(fields)
    return getattr(transformers, auto_class).from_config(config).eval()


def difference(first, second):
    return (first - second).nan_to_num(nan=0.0).abs().max()


def printed(code: str, folder: Path, *arguments: str, **options) -> str:
    done = run_clean(code, folder, *arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_without_named_targets_merge_save_and_load(model_type, options, tmp_path):
    base = model_of(model_type)
    with torch.no_grad():
        plain = base(IDS).logits
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = peft.get_peft_model(base, config).eval()
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    with torch.no_grad():
        exact = model(IDS).logits
    assert difference(exact, plain) > 1e-2
    written = model.generate(input_ids=IDS, **GREEDY)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert within_rounding(loaded(IDS).logits, exact)
    assert same_bits(loaded.generate(input_ids=IDS, **GREEDY), written)
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert difference(merged(IDS).logits, exact) < 1e-3
    assert same_bits(merged.generate(input_ids=IDS, **GREEDY), written)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_classifier_and_its_head_come_back_through_the_auto_class(model_type, tmp_path):
    model_of(model_type, "AutoModelForSequenceClassification", num_labels=3).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    torch.nn.init.normal_(model.get_base_model().score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert within_rounding(loaded(IDS).logits, model(IDS).logits)
        assert difference(base(IDS).logits, loaded(IDS).logits) < 1e-6


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("method", ["IA3Config", "LoHaConfig", "VeraConfig", "LNTuningConfig"])
def test_other_methods_know_their_targets_too(model_type, method):
    model = peft.get_peft_model(model_of(model_type), getattr(peft, method)(task_type="CAUSAL_LM"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


def test_what_a_user_entered_stays():
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    before = table.get("insnext")
    table["insnext"] = ["o_proj"]
    try:
        model = peft.get_peft_model(model_of("insnext"), peft.LoraConfig())
        assert model.peft_config["default"].target_modules == {"o_proj"}
    finally:
        table["insnext"] = before or table["llama"]


def test_control_a_model_type_that_nobody_entered_is_refused():
    model = model_of("insnext")
    model.config.to_dict = lambda: {"model_type": "insnext-unknown"}
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(model, peft.LoraConfig())


def test_importing_the_package_imports_no_peft_and_needs_none(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); sys.modules['peft'] = None\n"
        "from modeling_insnext import InsNextConfig; InsNextConfig().to_dict(); print('peft.utils' in sys.modules)"
    )
    assert printed(code, tmp_path, hidden=()).strip() == "False"


def test_adapters_on_a_remote_code_checkpoint_in_a_clean_process(tmp_path):
    for model_type in CONFIGS:
        model_of(model_type).save_pretrained(tmp_path / model_type)
    folders = [str(tmp_path / model_type) for model_type in CONFIGS]
    assert printed(REMOTE, tmp_path, str(IDS.tolist()), *folders).split() == ["same", "insnext", "same", "drt"]
