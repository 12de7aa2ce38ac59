"""`python -m conversion.from_...`: folders in, folders out, refusals on the last line and nothing written."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from conversion import convert, from_gpt2, from_llama, from_modernbert, from_roberta
from conversion.checkpoint import check_folder, read_tensors
from conversion.folders import OF_THE_SOURCE
from tests.support import forked
from tests.support.equality import same_bits, within_rounding
from tests.support.sources import encoder, random_ids, source_model


ROOT = Path(__file__).parents[2]
SMALL = ["--chunk_size", "5", "--num_retrieved_chunks", "2", "--num_encoder_layers", "1"]


fork = partial(forked.run, modules=forked.READING)


def run(module, *arguments, start=fork):
    command = [sys.executable, "-m", f"conversion.{module}", *map(str, arguments)]
    return start(command, cwd=ROOT, env=dict(os.environ))


def call(module, *arguments):
    """Run a command line in this process; return the status."""
    try:
        convert.main(module.FAMILY, module.__name__, module.__doc__, [*map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


GENERATION = {"eos_token_id": [2, 40], "pad_token_id": 0, "do_sample": True, "temperature": 0.6, "top_p": 0.9}


def stands_by_itself(folder):
    """Whether the tokenizer of a folder needs no code and says nothing of where it came from."""
    said = json.loads((folder / "tokenizer_config.json").read_text())
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True) and not set(said) & set(OF_THE_SOURCE)


@pytest.fixture
def llama(tmp_path):
    source_model("llama").save_pretrained(tmp_path / "src")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, 50)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "src")
    change(tmp_path / "src" / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "absent.Tokenizer"]})
    GenerationConfig(**GENERATION, cache_implementation="static").save_pretrained(tmp_path / "src")
    return tmp_path / "src"


def test_llama_to_drt_and_back_from_the_shell(llama, tmp_path):
    start = partial(subprocess.run, capture_output=True, text=True)
    done = run("from_llama", llama, tmp_path / "drt", "--to", "drt", "--retrieval_groups", "1,1", *SMALL, start=start)
    assert done.returncode == 0, done.stderr
    assert "39 tensors converted" in done.stdout and "new: model.layers.3.cross_attn.o_proj.weight" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "drt")
    assert (model.config.retrieval_groups, model.config.chunk_size, model.config.num_lower_layers) == ([1, 1], 5, 2)
    assert {"modeling_drt.py", "positions.py", "tokenizer.json"} <= {p.name for p in (tmp_path / "drt").iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "drt")
    assert tokenizer("w7").input_ids == AutoTokenizer.from_pretrained(llama)("w7").input_ids == [7]
    assert stands_by_itself(tmp_path / "drt")
    done = run("from_llama", tmp_path / "drt", tmp_path / "back", "--to", "llama")
    assert done.returncode == 0, done.stderr
    assert "left out: model.encoder.norm.weight" in done.stdout
    before, after = read_tensors(llama), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys() and same_bits(after, before)
    back, source = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "back", llama))
    assert within_rounding(back(random_ids(1, 9)).logits, source(random_ids(1, 9)).logits)
    for found in (model.generation_config, back.generation_config):
        assert {name: getattr(found, name) for name in GENERATION} == GENERATION
        assert found.cache_implementation is None


def test_help_says_what_becomes_of_what():
    done = run("from_gpt2", "--help")
    assert done.returncode == 0
    for text in ("python -m conversion.from_gpt2", "the same function", "--to {drt,insnext,gpt2}", "--sliding_window"):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 119


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (from_llama, lambda: source_model("qwen3")),
        (from_gpt2, lambda: source_model("gpt2")),
        (from_roberta, lambda: encoder("roberta")),
        (from_modernbert, lambda: encoder("modernbert")),
    ],
    ids=["llama", "gpt2", "roberta", "modernbert"],
)
def test_every_family_becomes_insnext(module, source, tmp_path, capsys):
    source().save_pretrained(tmp_path / "src")
    assert call(module, tmp_path / "src", tmp_path / "dst", "--to", "insnext", "--bos_token_id", "1") == 0
    assert "new: slot_head.edge" in capsys.readouterr().out
    assert check_folder(tmp_path / "dst").bos_token_id == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert model.generate(random_ids(1, 4), max_new_tokens=2).shape[0] == 1


def test_gpt2_goes_to_drt_and_back(tmp_path):
    source_model("gpt2").save_pretrained(tmp_path / "src")
    assert call(from_gpt2, tmp_path / "src", tmp_path / "drt", "--to", "drt", *SMALL) == 0
    assert call(from_gpt2, tmp_path / "drt", tmp_path / "back", "--to", "gpt2") == 0
    before, after = read_tensors(tmp_path / "src"), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys() and same_bits(after, before)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (from_gpt2, ["--to", "drt"], r"must be of the family GPT-2 ('gpt2',), got model_type='llama'"),
        (from_gpt2, ["--to", "gpt2"], "only drt goes back to GPT-2, got model_type='llama'"),
        (from_llama, ["--to", "bert"], "invalid choice: 'bert'"),
        (from_llama, ["--to", "drt"], "sliding_window must be larger than a chunk"),
        (from_llama, ["--to", "drt", *SMALL, "--landmark_source", "last"], "landmark_source must be one of"),
        (from_llama, ["--to", "insnext", "--chunk_size", "5"], "chunk_size need --to drt, got --to insnext"),
        (from_llama, ["--to", "insnext", "--bos_token_id", "99"], "bos_token_id must be in [0, 50), got 99"),
        (from_llama, ["--to", "drt", *SMALL, "--eos_token_id", "-1"], "--eos_token_id replaces it"),
        (
            from_llama,
            ["--to", "llama", "--eos_token_id", "3"],
            "eos_token_id need --to drt or insnext, got",
        ),
        (from_llama, ["--to", "drt", *SMALL, "--landmark_source", "token"], "must be mean or cls, got token"),
        (
            from_llama,
            ["--to", "drt", *SMALL, "--retrieval_groups", "3,2"],
            "the source's 4 layers, got [3, 2]",
        ),
        (from_llama, ["--to", "drt", *SMALL, "--retrieval_groups", "x"], "must be numbers between commas, got 'x'"),
        (from_llama, ["--to", "drt", *SMALL, "--seed", str(2**70)], f"seed must be in [0, 2**63), got {2**70}"),
    ],
)
def test_a_refusal_names_the_rule_and_writes_nothing(module, options, message, llama, tmp_path, capsys):
    assert call(module, llama, tmp_path / "dst", *options) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear"}}, 'KeyError: "Missing required keys'),
        ({"num_attention_heads": 0, "head_dim": None}, "ZeroDivisionError"),
        ({"num_attention_heads": "4"}, "'num_attention_heads' expected int, got str"),
        ({"hidden_size": 30}, "The hidden size (30) is not a multiple"),
    ],
)
def test_a_configuration_that_transformers_refuses_is_refused(fields, message, llama, tmp_path, capsys):
    change(llama / "config.json", **fields)
    assert call(from_llama, llama, tmp_path / "dst", "--to", "drt", *SMALL) == 2
    refusal = capsys.readouterr().err
    assert "config.json must be a configuration of Transformers, got " in refusal and message in refusal
    assert not (tmp_path / "dst").exists()


def test_special_tokens_that_are_given_replace_those_of_both_files(llama, tmp_path, capsys):
    for name, place in (("config.json", "the configuration"), ("generation_config.json", "generation_config.json")):
        change(llama / name, pad_token_id=-1)
        assert call(from_llama, llama, tmp_path / "dst", "--to", "drt", *SMALL) == 2
        message = f"pad_token_id must be in [0, 50), got -1 in {place}: --pad_token_id replaces it"
        assert message in capsys.readouterr().err
        change(llama / name, pad_token_id=0)
    assert call(from_llama, llama, tmp_path / "dst", "--to", "drt", *SMALL, "--pad_token_id", "3") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 3


def test_insnext_has_options_of_generation_of_its_own(llama, tmp_path):
    assert call(from_llama, llama, tmp_path / "dst", "--to", "insnext") == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dst").generation_config
    assert found.eos_token_id == 2 and not found.do_sample and stands_by_itself(tmp_path / "dst")


def test_a_damaged_source_is_refused_before_anything_is_written(llama, tmp_path, capsys):
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert call(from_llama, llama, tmp_path / "dst", "--to", "drt", *SMALL) == 2
    assert "must be a whole safetensors file" in capsys.readouterr().err
    assert call(from_llama, tmp_path / "nowhere", tmp_path / "dst", "--to", "drt") == 2
    assert "must be a folder with a config.json" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()
