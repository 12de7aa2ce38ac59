"""A Llama becomes an insertion model and is adapted, as the documentation says, from its folder to a merged model."""

import json
import random

import peft
import pytest
import run_pretraining
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conversion.convert import convert_folder
from conversion.from_llama import FAMILY
from modeling_insnext import InsNextForInsertionLM
from tests.support.script_models import row, word_tokenizer


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a Llama, what was converted from it, and rows."""
    folder, tokenizer = tmp_path_factory.mktemp("llama"), word_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2, **special
    )
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    convert_folder(FAMILY, str(folder / "source"), str(folder / "converted"), "insnext")
    dice = random.Random(0)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row(dice)) + "\n" for _ in range(48)))
    return folder


def adapt(home, output_dir, *options):
    args = ["--model_name_or_path", str(home / "converted"), "--stage", "documents", "--block_size", "48"]
    args += ["--train_file", str(home / "rows.jsonl"), "--do_train", "--output_dir", str(output_dir), "--use_cpu"]
    args += ["--cache_dir", str(home / "cache"), "--max_steps", "25", "--logging_steps", "1", "--report_to", "none"]
    args += ["--adapter", "lora", "--lora_target_modules", "all-linear", "--disable_tqdm", "true"]
    run_pretraining.main([*args, "--learning_rate", "3e-3", "--head_learning_rate", "1e-2", *options])
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def nats_left_to_right(model, ids):
    """-log p of tokens that may be written, renormalised over those, without going on or stopping."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    logits[..., [0, 1, 2]] = float("-inf")
    return -logits.log_softmax(-1).gather(2, ids[:, 1:, None]).mean()


def test_a_converted_llama_learns_and_its_base_stays_the_source(home, tmp_path):
    history = adapt(home, tmp_path / "run", "--left_to_right_share", "0.5", "--alignment_weight", "1")
    nats = [entry["position_loss"] + entry["token_loss"] for entry in history if "position_loss" in entry]
    distances = [entry["alignment_loss"] for entry in history if "alignment_loss" in entry]
    assert len(nats) == len(distances) == 25
    assert abs(distances[0]) < 4 * torch.finfo(torch.float32).eps < distances[-1]
    assert sum(nats[-5:]) / 5 < sum(nats[:5]) / 5 - 0.5

    source = AutoModelForCausalLM.from_pretrained(home / "source").eval()
    base = InsNextForInsertionLM.from_pretrained(home / "converted", dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = source.config.bos_token_id
    before, as_source = nats_left_to_right(base, ids), nats_left_to_right(source, ids)
    assert before == pytest.approx(float(as_source), rel=1e-4)
    # the run left the base as it was, and the adapter is not nothing
    model = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    with model.disable_adapter():
        assert nats_left_to_right(model, ids) == pytest.approx(float(before), rel=1e-5)
    adapted = nats_left_to_right(model, ids)
    assert abs(adapted - before) > 1e-3
    assert nats_left_to_right(model.merge_and_unload(), ids) == pytest.approx(float(adapted), rel=1e-4)


def test_the_weight_of_the_distance_keeps_the_states_nearer(home, tmp_path):
    last = {}
    for weight in ("0", "50"):
        options = ("--left_to_right_share", "0.5", "--alignment_weight", weight)
        history = adapt(home, tmp_path / weight, *options)
        last[weight] = sum([entry["alignment_loss"] for entry in history if "alignment_loss" in entry][-5:])
    assert last["50"] < last["0"] / 2


def test_what_chooses_slots_has_a_rate_of_its_own(home, tmp_path):
    adapt(home, tmp_path / "run", "--learning_rate", "1e-9", "--max_steps", "3")
    head = InsNextForInsertionLM.from_pretrained(home / "converted").slot_head.state_dict()
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    after = {name.split("slot_head.")[1]: weight for name, weight in adapter.items() if "slot_head" in name}
    moved = {name for name, weight in after.items() if (weight - head[name]).abs().max() > 1e-4}
    # no gradient reaches the edge through a `right_proj` of zeros
    assert moved == {"query_proj.weight", "key_proj.weight", "stop_key"} and moved < after.keys() - {"edge"}
