"""A saved folder in a process that has never seen the package: same classes, same numbers, same texts."""

import inspect
import json
from pathlib import Path

import pytest
import torch

import modeling_insnext
from modeling_insnext import InsNextForInsertionLM, InsNextForSequenceClassification
from modeling_insnext.insnext import AUTO_CLASSES
from tests.support.clean_process import run_clean
from tests.support.insnext import random_ids, shipped_model
from tests.support.tokenizers import tiny_tokenizer


CODE = Path(modeling_insnext.__file__).parent / "insnext"
IDS = random_ids(2, 6)


def observe(model, tokenizer, ids):
    """Return what is read off a model, here and, by its source, in the clean process."""
    canvas = model.canvas(tokenizer, ["the ___ man ___", "a ___{1,3} dog"])
    words = model.canvas(tokenizer, keywords=[["old man", "sea"]])
    pending = model.canvas(tokenizer, keywords=[["sea", "the sea"], "fox"], ordered=False)
    calls = {
        "greedy": {**canvas},
        "ebr": {**canvas, "ebr": True, "ebr_ratio": 0.5},
        "sample": {**canvas, "do_sample": True, "top_p": 0.9, "seed": [1, 2], "num_return_sequences": 1},
        "parallel": {**canvas, "parallel_slots": 2},
        "keywords": {**words, "do_sample": True, "seed": 3},
        "pending": {**pending, "do_sample": True, "seed": 3},
        "pending_beams": {**pending, "num_beams": 3},
        "beams": {**canvas, "num_beams": 3},
        "left_to_right": {"input_ids": ids, "left_to_right": True, "do_sample": False},
        "left_to_right_beams": {"input_ids": ids, "left_to_right": True, "num_beams": 2},
    }
    texts = {name: model.generate(**call, max_new_tokens=6).tolist() for name, call in calls.items()}
    document = model.open(tokenizer, "the old man")
    document.replace(4, 7, "sea")
    document.write(7, max_new_tokens=3)
    texts["document"] = [document.text, document.ids, document.encoded_tokens]
    with torch.no_grad():
        return {**texts, "logits": model(ids).logits.tolist(), "ebr_default": model.generation_config.ebr}


IN_THE_CLEAN_PROCESS = """
import json
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, pipeline
import transformers

folder, ids, auto_names = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2])), json.loads(sys.argv[3])
found = {}
try:
    transformers.AutoModelForCausalLM.from_pretrained(folder / "lm", trust_remote_code=False)
except Exception as error:
    found["refusal"] = f"{type(error).__name__}: {error}"

config = AutoConfig.from_pretrained(folder / "lm", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
found["config"] = [type(config).__name__, type(config).__module__.split(".")[0]]
found["classes"] = {}
for name in auto_names:
    model = getattr(transformers, name).from_pretrained(folder / "lm", trust_remote_code=True)
    found["classes"][name] = type(model).__name__
    made = getattr(transformers, name).from_config(config, trust_remote_code=True)
    assert type(made).__name__ == type(model).__name__
model = transformers.AutoModelForCausalLM.from_pretrained(folder / "lm", trust_remote_code=True)
found["first"] = observe(model, tokenizer, ids)
model.save_pretrained(folder / "again")
tokenizer.save_pretrained(folder / "again")
again = transformers.AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
found["again"] = observe(again, tokenizer, ids)
found["pipeline"] = pipeline("text-generation", str(folder / "again"), trust_remote_code=True)(
    "the old", max_new_tokens=5, do_sample=False
)
head = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "head", trust_remote_code=True)
found["head"] = head(ids).logits.tolist()
head.save_pretrained(folder / "head_again")
head = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "head_again", trust_remote_code=True)
found["head_again"] = head(ids).logits.tolist()
encoder = transformers.AutoModel.from_pretrained(folder / "lm", trust_remote_code=True)
encoder.save_pretrained(folder / "encoder")
model.set_attn_implementation("eager")
found["attention"] = model.config._attn_implementation
found["imported"] = sorted(name for name in sys.modules if name.split(".")[0] == "modeling_insnext")
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder, the models saved in it, and what a clean process found there."""
    folder = tmp_path_factory.mktemp("remote")
    model, tokenizer = shipped_model(InsNextForInsertionLM), tiny_tokenizer()
    model.generation_config.ebr = True
    model.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    head = shipped_model(InsNextForSequenceClassification, num_labels=3)
    head.save_pretrained(folder / "head")
    names = [auto_class.__name__ for auto_class in AUTO_CLASSES]
    arguments = (str(folder), json.dumps(IDS.tolist()), json.dumps(names))
    done = run_clean("import torch\n" + inspect.getsource(observe) + IN_THE_CLEAN_PROCESS, folder, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND")[1])
    return folder, model, tokenizer, head, found


def code_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def test_the_package_is_out_of_reach_there(saved, tmp_path):
    assert saved[-1]["imported"] == []
    assert "modeling_insnext is hidden" in run_clean("import modeling_insnext", tmp_path).stderr


@pytest.mark.parametrize("name", ["lm", "head", "again", "head_again", "encoder"])
def test_the_folder_holds_the_code_and_names_every_auto_class(saved, name):
    folder = saved[0] / name
    needed = code_files(CODE)
    for left_out in ("__init__.py",):
        del needed[left_out]
    assert code_files(folder) == needed
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    classes = {auto.__name__: f"modeling_insnext.{model.__name__}" for auto, model in AUTO_CLASSES.items()}
    assert auto_map == {"AutoConfig": "configuration_insnext.InsNextConfig", **classes}


def test_without_trust_the_error_says_so(saved):
    assert saved[-1]["refusal"].startswith("ValueError")
    assert "trust_remote_code=True" in saved[-1]["refusal"]


def test_every_auto_class_loads_its_class(saved):
    assert saved[-1]["config"] == ["InsNextConfig", "transformers_modules"]
    assert saved[-1]["classes"] == {auto.__name__: model.__name__ for auto, model in AUTO_CLASSES.items()}


@pytest.mark.parametrize("generation", ["first", "again"])
def test_the_clean_process_writes_the_same_texts_and_logits(saved, generation):
    _, model, tokenizer, _, found = saved
    ours = observe(model, tokenizer, IDS)
    assert ours["ebr_default"] is True
    for name, value in ours.items():
        assert found[generation][name] == value, name
    # control: other weights write other texts
    other = observe(shipped_model(InsNextForInsertionLM, seed=1), tokenizer, IDS)
    assert all(other[name] != ours[name] for name in ("greedy", "sample", "left_to_right", "logits"))


def test_a_pipeline_writes_there(saved):
    assert saved[-1]["pipeline"][0]["generated_text"].startswith("the old")


def test_a_head_says_the_same_there(saved):
    with torch.no_grad():
        ours = saved[3](IDS).logits.tolist()
    assert saved[-1]["head"] == ours == saved[-1]["head_again"]


def test_attention_can_be_switched_there(saved):
    assert saved[-1]["attention"] == "eager"


def test_a_folder_with_a_file_missing_does_not_load(saved, tmp_path):
    source = saved[0] / "lm"
    for path in source.iterdir():
        if path.name != "draft.py":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    code = (
        "import transformers\n"
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, local_files_only=True)"
    )
    done = run_clean(code, tmp_path, str(tmp_path))
    assert done.returncode != 0
    assert "draft.py" in done.stderr
