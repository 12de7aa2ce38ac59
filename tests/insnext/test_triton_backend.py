"""`attn_implementation="insnext_triton"`: the model of `eager`, natively on a GPU, in the interpreter without."""

from pathlib import Path

import pytest
import torch

import insnext_kernels
import modeling_insnext.insnext.attention_triton as attention_triton
from modeling_insnext import InsNextForInsertionLM, InsNextModel
from tests.support.built_text import build_row, random_ids, random_text
from tests.support.clean_process import run_clean
from tests.support.equality import assert_set_as_accurate, relative_error, same_bits
from tests.support.insnext import BOS, tiny_model


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = {
    "context": lambda: [build_row([[[0, 1, 2], [1], [4], [2]]])],
    "blocks": lambda: [build_row([[[0, 1, 1], [2], [1, 3], [2, 2, 2], [1]]])],
    "packed and padded": lambda: [
        build_row([[[0, 1], [1]], [[0], [1], [1], [1, 2]], [[0]]], pads=2),
        build_row([[[0], [1], [1], [2]]], pads=7),
    ],
}


def batch(case):
    rows = CASES[case]()
    generator = torch.Generator().manual_seed(7)
    ids = torch.cat([random_ids(row, generator) for row in rows])
    positions, start, horizon = (torch.cat(parts) for parts in zip(*(row.tensors() for row in rows), strict=True))
    inputs = {"input_ids": ids, "positions": positions, "start": start, "horizon": horizon}
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def model_of(attn, dtype=torch.float32, model_class=InsNextForInsertionLM, num_attention_heads=2, **overrides):
    return tiny_model(model_class, dtype, attn=attn, num_attention_heads=num_attention_heads, **overrides).to(DEVICE)


def trained(attn, dtype, inputs, checkpointing=False, **overrides):
    """Return hidden states and the gradient of every parameter."""
    model = model_of(attn, dtype, **overrides)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    with torch.no_grad():
        hidden = model.model(**inputs, is_causal=True).last_hidden_state
    return {"hidden": hidden, **{name: p.grad for name, p in model.named_parameters()}}


# where a second layer shows nothing more
ONE_LAYER = {"num_hidden_layers": 1}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("case", "heads"), [*((case, {}) for case in CASES), pytest.param("packed and padded", GROUPED, id="grouped")]
)
def test_states_and_every_gradient_are_as_accurate_as_those_of_eager(case, heads):
    inputs = batch(case)
    exact = trained("eager", torch.float64, inputs, **heads)
    twin = trained("eager", torch.float32, inputs, **heads)
    assert_set_as_accurate(trained("insnext_triton", torch.float32, inputs, **heads), twin, exact)


def test_gradient_checkpointing_changes_nothing():
    inputs = batch("context")
    plain = trained("insnext_triton", torch.float32, inputs)
    again = trained("insnext_triton", torch.float32, inputs, checkpointing=True)
    assert same_bits(plain, again)


def test_longer_texts_than_a_tile_with_a_context():
    ids, positions = (x.to(DEVICE) for x in random_text(90, 20, torch.Generator().manual_seed(1)))
    inputs = {"input_ids": ids, "positions": positions, "context_length": 20}
    room = {"max_position_embeddings": 96, "num_hidden_layers": 1}
    exact, twin = (trained("eager", dtype, inputs, **room) for dtype in (torch.float64, torch.float32))
    assert_set_as_accurate(trained("insnext_triton", torch.float32, inputs, **room), twin, exact)


@pytest.mark.parametrize("rule", ["horizon", "positions", "start"])
def test_a_broken_rule_is_far_outside_the_budget(rule):
    inputs = batch("context" if rule == "horizon" else "packed and padded")

    def encode(**inputs):
        with torch.no_grad():
            return model_of("insnext_triton", model_class=InsNextModel, **ONE_LAYER)(**inputs).last_hidden_state

    right = encode(**inputs)
    if rule == "horizon":
        inputs["horizon"] = (inputs["horizon"] + 1).clamp_max(inputs["horizon"].shape[1] - 1)
    elif rule == "positions":
        inputs["positions"] = -inputs["positions"]
    else:
        inputs["start"] = torch.zeros_like(inputs["start"])
        inputs["positions"] = torch.arange(inputs["positions"].shape[1], device=DEVICE).expand_as(inputs["positions"])
    assert relative_error(encode(**inputs), right) > 1e-2


GENERATION = {
    "plain": {},
    "ebr": {"ebr": True, "ebr_ratio": 0.5},
    "ebr at every step": {"ebr": True, "ebr_ratio": 0},
    "ebr window": {"ebr": True, "ebr_ratio": 0.5, "ebr_window": 4},
    "static cache": {"cache_implementation": "static"},
    "static cache with ebr": {"cache_implementation": "static", "ebr": True, "ebr_ratio": 0.5},
    "parallel slots": {"parallel_slots": 2},
    "beams": {"num_beams": 2},
    "left to right": {"left_to_right": True, "do_sample": False},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_writes_the_texts_of_eager(options):
    ids = torch.tensor([[BOS, 5, 6, 7], [BOS, 8, 9, 10]], device=DEVICE)
    texts = {}
    for attn in ("eager", "insnext_triton"):
        model = model_of(attn, **ONE_LAYER)
        texts[attn] = model.generate(ids, max_new_tokens=4, min_new_tokens=4, **options)
    assert same_bits(texts["eager"], texts["insnext_triton"])
    # control: other weights write another text
    other = model_of("eager", seed=1, **ONE_LAYER)
    assert not same_bits(other.generate(ids, max_new_tokens=4, min_new_tokens=4, **options), texts["eager"])


def test_a_ragged_batch_writes_what_eager_writes():
    ids = torch.tensor([[BOS, 5, 6, 7], [BOS, 8, 0, 0]], device=DEVICE)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=DEVICE)
    options = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "ebr": True}
    texts = [model_of(attn, **ONE_LAYER).generate(ids, **options) for attn in ("eager", "insnext_triton")]
    assert same_bits(*texts)


def test_the_table_is_made_once_a_forward_pass(monkeypatch):
    calls = []
    make = attention_triton.offset_table
    monkeypatch.setattr(
        attention_triton, "offset_table", lambda *args, **kwargs: calls.append(1) or make(*args, **kwargs)
    )
    with torch.no_grad():
        model_of("insnext_triton", num_hidden_layers=3)(**batch("context"))
    assert len(calls) == 1


def test_it_compiles_as_one_graph():
    inputs = batch("context")
    model = model_of("insnext_triton", model_class=InsNextModel)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(**inputs).last_hidden_state, expected) < 1e-5


def test_it_can_be_chosen_at_load_and_switched_to(tmp_path, monkeypatch):
    calls = []
    attend = attention_triton.insertion_attention
    monkeypatch.setattr(
        attention_triton, "insertion_attention", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs)
    )
    model_of("eager").save_pretrained(tmp_path)
    ids = torch.tensor([[BOS, 5, 6]], device=DEVICE)
    model = InsNextForInsertionLM.from_pretrained(tmp_path, attn_implementation="insnext_triton").to(DEVICE).eval()
    with torch.no_grad():
        model(ids)
        assert len(calls) == 2
        model.set_attn_implementation("eager")
        model(ids)
        assert len(calls) == 2
        model.set_attn_implementation("insnext_triton")
        model(ids)
    assert len(calls) == 4


IDS = torch.tensor([[BOS, 5, 6]], device=DEVICE)


def test_float64_is_refused():
    with pytest.raises(ValueError, match='"insnext_triton" needs float32, float16 or bfloat16, got torch.float64'):
        model_of("insnext_triton", torch.float64)(IDS)


def test_a_wide_head_is_refused():
    model = model_of("insnext_triton", hidden_size=144, num_attention_heads=1)
    with pytest.raises(ValueError, match="head dim of at most 128, got 144"):
        model(IDS)


def test_dropout_is_refused_in_training_only():
    model = model_of("insnext_triton", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="insnext_triton has no dropout, got attention_dropout=0.1"):
        model(IDS)
    with torch.no_grad():
        assert model.eval()(IDS).logits.isfinite().any()


def test_sinusoidal_positions_are_refused():
    model = model_of("insnext_triton", position_encoding="sinusoidal")
    with pytest.raises(ValueError, match="sinusoidal.*eager or sdpa, got 'insnext_triton'"):
        model(IDS)


def test_attention_weights_are_refused():
    with pytest.raises(ValueError, match="no attention weights to return, got output_attentions=True"):
        model_of("insnext_triton")(IDS, output_attentions=True)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match='impl="triton" needs a GPU, or TRITON_INTERPRET=1.*cpu'):
        model_of("insnext_triton").cpu()(IDS.cpu())


def test_without_the_kernels_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(attention_triton, "insertion_attention", None)
    with pytest.raises(
        ImportError, match='"insnext_triton" needs the package insnext_kernels, which is not installed'
    ):
        model_of("insnext_triton")(IDS)


CLEAN = """
import sys

import torch
from transformers import AutoModelForCausalLM

ids = torch.tensor([[1, 5, 6]])
eager, triton = (
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation=name)
    for name in ("eager", "insnext_triton")
)
with torch.no_grad():
    print("EAGER", eager(ids).logits.isfinite().any().item())
    try:
        difference = (triton(ids).logits.exp() - eager(ids).logits.exp()).abs().max().item()
        print("TRITON", difference < 1e-4)
    except ImportError as error:
        print("TRITON", error)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="runs in the interpreter, on a CPU")
@pytest.mark.parametrize("installed", [False, True])
def test_a_saved_folder_loads_with_and_without_the_kernels(tmp_path, installed):
    model_of("eager").save_pretrained(tmp_path / "model")
    hidden = ("modeling_insnext",) if installed else ("modeling_insnext", "insnext_kernels")
    kernels = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(insnext_kernels.__file__).parents[1])}
    done = run_clean(CLEAN, tmp_path, str(tmp_path / "model"), hidden=hidden, **kernels)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "EAGER True" in done.stdout
    assert ("TRITON True" if installed else "TRITON attn_implementation=") in done.stdout
    assert ("needs the package insnext_kernels, which is not installed" in done.stdout) == (not installed)
