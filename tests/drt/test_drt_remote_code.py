"""A saved folder in a process that has never seen the package: same classes, same numbers, same texts."""

import inspect
import json
from pathlib import Path

import pytest
import torch

import modeling_insnext
from modeling_insnext import ChunkMemoryCache, DrtForSequenceClassification
from modeling_insnext.drt import AUTO_CLASSES
from modeling_insnext.drt.modeling_drt import AUTO_MAP
from tests.support.clean_process import run_clean
from tests.support.drt import drt_tokenizer, random_ids, shipped_model


CODE = Path(modeling_insnext.__file__).parent / "drt"
IDS = random_ids(2, 33)


def observe(model, cache_class, ids, folder):
    """Return what is read off a model, here and, by its source, in the clean process."""
    calls = {
        "greedy": {},
        "sample": {"do_sample": True, "top_k": 10},
        "beams": {"num_beams": 3},
        "segments": {"prefill_chunk_size": 7, "lower_only_prefill": True},
        "offloaded": {"cache_implementation": "offloaded"},
    }
    texts = {}
    for name, call in calls.items():
        torch.manual_seed(0)
        call = {"do_sample": False, **call}
        texts[name] = model.generate(ids, **call, max_new_tokens=14, eos_token_id=None).tolist()
    past = cache_class(model.config, location="disk", folder=folder / "chunks")
    with torch.no_grad():
        model(ids[:, :17], past_key_values=past)
        past.save(folder / "book", model)
        past = cache_class.load(folder / "book", model)
        rest = model(ids[:, 17:], past_key_values=past).logits.tolist()
        return {**texts, "logits": model(ids).logits.tolist(), "rest": rest}


IN_THE_CLEAN_PROCESS = """
import json
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoTokenizer, pipeline

folder, ids, auto_names = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2])), json.loads(sys.argv[3])
found = {}
try:
    transformers.AutoModelForCausalLM.from_pretrained(folder / "lm", trust_remote_code=False)
except Exception as error:
    found["refusal"] = f"{type(error).__name__}: {error}"

config = AutoConfig.from_pretrained(folder / "lm", trust_remote_code=True)
found["config"] = [type(config).__name__, type(config).__module__.split(".")[0]]
found["classes"] = {}
for name in auto_names:
    model = getattr(transformers, name).from_pretrained(folder / "lm", trust_remote_code=True)
    found["classes"][name] = type(model).__name__
    assert type(getattr(transformers, name).from_config(config, trust_remote_code=True)) is not None

for generation in ("first", "again"):
    name = "lm" if generation == "first" else "again"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True)
    found[generation] = observe(model, type(model(ids, use_cache=True).past_key_values), ids, folder)
    model.save_pretrained(folder / "again")
tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
tokenizer.save_pretrained(folder / "again")
found["pipeline"] = pipeline("text-generation", str(folder / "again"), trust_remote_code=True)(
    "the old", max_new_tokens=5, do_sample=False
)
head = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "head", trust_remote_code=True)
found["head"] = head(ids).logits.tolist()
head.save_pretrained(folder / "head_again")
transformers.AutoModel.from_pretrained(folder / "lm", trust_remote_code=True).save_pretrained(folder / "decoder")
model.set_attn_implementation("eager")
found["attention"] = model.config._attn_implementation
try:
    model.set_attn_implementation("insnext_triton")
    model(ids)
except ImportError as error:
    found["kernels"] = str(error)
found["imported"] = sorted(name for name in sys.modules if name.split(".")[0] == "modeling_insnext")
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder, the models saved in it, and what a clean process found there."""
    folder = tmp_path_factory.mktemp("remote")
    model = shipped_model()
    model.save_pretrained(folder / "lm")
    drt_tokenizer().save_pretrained(folder / "lm")
    head = shipped_model(DrtForSequenceClassification, num_labels=3)
    head.save_pretrained(folder / "head")
    arguments = (str(folder), json.dumps(IDS.tolist()), json.dumps([auto.__name__ for auto in AUTO_CLASSES]))
    done = run_clean("import torch\n" + inspect.getsource(observe) + IN_THE_CLEAN_PROCESS, folder, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, model, head, json.loads(done.stdout.split("FOUND")[1])


def code_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def test_the_package_is_out_of_reach_there(saved, tmp_path):
    assert saved[-1]["imported"] == []
    assert "modeling_insnext is hidden" in run_clean("import modeling_insnext", tmp_path).stderr
    assert "insnext_triton" in saved[-1]["kernels"]


@pytest.mark.parametrize("name", ["lm", "head", "again", "head_again", "decoder"])
def test_the_folder_holds_the_code_and_names_every_auto_class(saved, name):
    folder, needed = saved[0] / name, code_files(CODE)
    del needed["__init__.py"]
    assert code_files(folder) == needed
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == AUTO_MAP
    classes = {auto.__name__: f"modeling_drt.{model.__name__}" for auto, model in AUTO_CLASSES.items()}
    assert AUTO_MAP == {"AutoConfig": "configuration_drt.DrtConfig", **classes}


def test_without_trust_the_error_says_so(saved):
    assert saved[-1]["refusal"].startswith("ValueError")
    assert "trust_remote_code=True" in saved[-1]["refusal"]


def test_every_auto_class_loads_its_class(saved):
    assert saved[-1]["config"] == ["DrtConfig", "transformers_modules"]
    assert saved[-1]["classes"] == {auto.__name__: model.__name__ for auto, model in AUTO_CLASSES.items()}


@pytest.mark.parametrize("generation", ["first", "again"])
def test_the_clean_process_writes_the_same_texts_and_logits(saved, generation, tmp_path):
    _, model, _, found = saved
    ours = observe(model, ChunkMemoryCache, IDS, tmp_path)
    for name, value in ours.items():
        assert found[generation][name] == value, name
    # control: other weights write other texts
    other = observe(shipped_model(seed=1), ChunkMemoryCache, IDS, tmp_path)
    assert all(other[name] != value for name, value in ours.items())


def test_a_pipeline_writes_there(saved):
    assert saved[-1]["pipeline"][0]["generated_text"].startswith("the old")


def test_a_head_says_the_same_there(saved):
    with torch.no_grad():
        assert saved[-1]["head"] == saved[2](IDS).logits.tolist()


def test_attention_can_be_switched_there(saved):
    assert saved[-1]["attention"] == "eager"


def test_a_folder_with_a_file_missing_does_not_load(saved, tmp_path):
    for path in (saved[0] / "lm").iterdir():
        if path.name != "layout.py":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    code = (
        "import transformers\n"
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, local_files_only=True)"
    )
    done = run_clean(code, tmp_path, str(tmp_path))
    assert done.returncode != 0 and "layout.py" in done.stderr
