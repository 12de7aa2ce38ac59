"""Every tensor is used or left out by name: what is missing, extra, mis-shaped or not finite is refused, by name."""

import json
import pickle

import pytest
import torch
from helpers_conversion import CHUNKS, source_model
from safetensors.torch import load_file, save_file
from test_layers_in_insnext import encoder
from test_other_insertion_and_retrieval import ILM_CONFIG, UPSTREAM_CONFIG, ilm_tensors, laid_out, our_drt

from conversion import checkpoint
from conversion.checkpoint import check_folder, check_tensors, expected_shapes, read_tensors, write_checkpoint
from conversion.convert import convert_folder, convert_tensors
from conversion.from_gpt2 import FAMILY as GPT2
from conversion.from_ilm import FAMILY as ILM
from conversion.from_ilm import IlmConfig
from conversion.from_llama import FAMILY as LLAMA
from conversion.from_modernbert import FAMILY as MODERNBERT
from conversion.from_roberta import FAMILY as ROBERTA
from conversion.from_upstream_drt import FAMILY as UPSTREAM
from conversion.from_upstream_drt import UpstreamConfig
from conversion.tables import apply_table, numbered
from modeling_insnext import DrtForCausalLM


def case(name):
    """Return a family, tensors and the configuration of a tiny source, and a target."""
    if name == "ilm":
        return ILM, ilm_tensors(False), IlmConfig(**ILM_CONFIG), "insnext"
    if name == "upstream":
        return UPSTREAM, laid_out(our_drt()), UpstreamConfig(**UPSTREAM_CONFIG), "drt"
    if name in ("roberta", "modernbert_biased"):
        source = encoder(name)
        return (ROBERTA if name == "roberta" else MODERNBERT), source.state_dict(), source.config, "insnext"
    source = source_model(name)
    return (GPT2 if name == "gpt2" else LLAMA), source.state_dict(), source.config, "drt"


CASES = [
    "llama",
    "llama_biased",
    "qwen2",
    "qwen3",
    "mistral",
    "gpt2",
    "roberta",
    "modernbert_biased",
    "upstream",
    "ilm",
]
every_family = pytest.mark.parametrize("name", CASES)


def used(family, tensors, config, target) -> dict[str, str]:
    """Return one source tensor for every rule that makes something of it, by rule."""
    table, found = family.table_for(target), {}
    for name in family.prepare(tensors, config):
        pattern = numbered(name)[0]
        if table[pattern] is not None and name not in ("model.landmark", "lm_head.weight"):
            found.setdefault(pattern, name)
    return found


def spelled(name: str, tensors: dict) -> str:
    """Return the full name of a source tensor whose name `prepare` shortened or counted through."""
    name = name.replace("model.layers.0.", "model.lower_layers.0.") if "gca" not in name else name
    name = name.replace("model.layers.1.gca", "model.upper_layers.0.0.gca")
    ends = [full for full in tensors if full == name or full.endswith(f".{name}")]
    if not ends:
        ends = [full for full in tensors if full.endswith(name.replace("lower_", ""))]
    return ends[0]


def small(target):
    return CHUNKS if target == "drt" else {}


@every_family
def test_a_rule_that_is_missing_is_noticed(name):
    family, tensors, config, target = case(name)
    options = {} if family is UPSTREAM else small(target)
    convert_tensors(family, tensors, config, target, **options)
    for rule, example in used(family, tensors, config, target).items():
        table = {pattern: entry for pattern, entry in family.table.items() if pattern != rule}
        with pytest.raises(ValueError, match="every source tensor needs a rule, got") as caught:
            convert_tensors(family._replace(table=table), tensors, config, target, **options)
        assert example in str(caught.value)


@every_family
def test_every_source_tensor_must_be_there_in_its_shape_and_finite(name):
    family, tensors, config, target = case(name)
    options = {} if family is UPSTREAM else small(target)
    for example in used(family, tensors, config, target).values():
        full = spelled(example, tensors)
        tensor = tensors[full]
        broken = tensor.clone()
        broken.view(-1)[-1] = float("nan")
        shorter = tensor[: len(tensor) - 1] if tensor.ndim == 1 else tensor[:, :-1]
        for kind, changed in (
            ("missing", {key: value for key, value in tensors.items() if key != full}),
            ("mis-shaped", {**tensors, full: shorter}),
            ("finite", {**tensors, full: broken}),
        ):
            with pytest.raises(ValueError) as caught:
                convert_tensors(family, changed, config, target, **options)
            message = str(caught.value)
            assert kind in message and (example in message or full in message), (full, kind, message)


@every_family
def test_a_tensor_too_many_is_refused(name):
    family, tensors, config, target = case(name)
    options = {} if family is UPSTREAM else small(target)
    for extra in ("adapter.weight", "model.layers.0.self_attn.sinks", "h.0.attn.adapter"):
        with pytest.raises(ValueError, match="1 without: .*(adapter.weight|sinks|attn.adapter)"):
            convert_tensors(family, {**tensors, extra: torch.ones(2)}, config, target, **options)


def test_a_layer_too_many_and_a_bias_that_is_not_configured_are_refused():
    _, tensors, config, _ = case("llama")
    for extra in ("model.layers.4.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"):
        with pytest.raises(ValueError, match=f"got 1 extra: {extra}"):
            convert_tensors(LLAMA, {**tensors, extra: torch.ones(32)}, config, "drt", **CHUNKS)


def test_what_is_left_out_on_purpose_may_be_there():
    _, tensors, config, _ = case("gpt2")
    old = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    one, other = (convert_tensors(GPT2, some, config, "drt", **CHUNKS) for some in (tensors, {**tensors, **old}))
    assert one.tensors.keys() == other.tensors.keys()


def test_a_tied_head_that_is_another_matrix_is_refused():
    source = source_model("llama_tied")
    tensors = {**source.state_dict(), "lm_head.weight": torch.ones(50, 32, dtype=torch.float64)}
    with pytest.raises(ValueError, match="a tied head must be the embedding"):
        convert_tensors(LLAMA, tensors, source.config, "drt", **CHUNKS)


def test_layers_that_see_unequally_far_and_growing_frequencies_are_refused():
    config = type(source_model("qwen2").config)
    mixed = config(num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(ValueError, match=r"layer_types with \['full_attention', 'sliding_attention'\]"):
        convert_tensors(LLAMA, {}, mixed, "drt")
    growing = config(num_hidden_layers=4, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="rope_type must be one of .* got 'dynamic'"):
        convert_tensors(LLAMA, {}, growing, "drt")
    with pytest.raises(ValueError, match=r"RoBERTa becomes one of \('insnext',\), got 'drt'"):
        convert_tensors(ROBERTA, {}, None, "drt")


# folders


@pytest.fixture
def folder(tmp_path):
    source_model("llama").save_pretrained(tmp_path / "src")
    convert_folder(LLAMA, str(tmp_path / "src"), tmp_path / "dst", "drt", **CHUNKS)
    return tmp_path / "dst"


FAULTS = {
    "missing": (lambda t: t.pop("model.norm.weight"), "1 missing: model.norm.weight"),
    "extra": (lambda t: t.update(other=torch.ones(2)), "1 extra: other"),
    "mis-shaped": (
        lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        r"1 mis-shaped: model.norm.weight \(\[31\], should be \[32\]\)",
    ),
    "not finite": (lambda t: t["model.norm.weight"].fill_(float("inf")), "1 not finite: model.norm.weight"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_folder_is_refused_by_name(kind, folder, tmp_path):
    assert check_folder(folder).model_type == "drt"
    change, message = FAULTS[kind]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        check_folder(folder)
    config = checkpoint.read_config(folder)
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "new", config, tensors)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


def test_all_faults_are_counted_in_one_message():
    found = {"a": torch.ones(2), "b": torch.tensor([float("nan")]), "c": torch.ones(3)}
    with pytest.raises(ValueError, match="1 missing: d; 1 extra: c; 1 mis-shaped: a .*; 1 not finite: b"):
        check_tensors(found, {"a": (3,), "b": (1,), "d": (1,)})
    check_tensors(found | {"b": torch.ones(1)}, {"a": (2,), "b": (1,), "c": (3,)})


def test_a_folder_that_holds_something_stays_as_it_is(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        convert_folder(LLAMA, str(tmp_path / "src"), folder, "drt", **CHUNKS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_write_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(DrtForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        convert_folder(LLAMA, str(tmp_path / "src"), tmp_path / "other", "drt", **CHUNKS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_shards_are_read_and_must_be_what_their_index_promises(tmp_path):
    model = source_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    tensors = read_tensors(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    promised = json.loads(index.read_text())
    for weight_map, message in (
        ({**promised["weight_map"], "lost": next(iter(promised["weight_map"].values()))}, "they differ in lost"),
        ({**promised["weight_map"], "model.norm.weight": "gone.safetensors"}, "got gone.safetensors, which does not"),
        ({**promised["weight_map"], "model.norm.weight": "../x.safetensors"}, "got ../x.safetensors, which does not"),
    ):
        index.write_text(json.dumps({**promised, "weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            read_tensors(tmp_path)


class Trap:
    def __reduce__(self):
        return (print, ("code of a checkpoint ran",))


def test_no_code_of_a_checkpoint_runs(tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.bin")
    assert torch.equal(read_tensors(tmp_path / "good.bin")["a"], torch.ones(2))
    (tmp_path / "bad.bin").write_bytes(pickle.dumps({"a": Trap()}))
    torch.save({"a": Trap()}, tmp_path / "bad2.bin")
    for name in ("bad.bin", "bad2.bin"):
        with pytest.raises(ValueError, match="must hold tensors and nothing that runs"):
            read_tensors(tmp_path / name)
    assert "ran" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="must hold tensors by name"):
        read_tensors(tmp_path / "list.bin")
    save_file({"a": torch.ones(9)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        read_tensors(tmp_path / "cut.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got none"):
        read_tensors(tmp_path / "empty")


def test_no_rule_names_a_tensor_that_no_model_has():
    """Control of the tables themselves: each rule of a decoder's is needed by some model of its family."""
    needed = set()
    for name in CASES[:5]:
        needed |= {numbered(key)[0] for key in expected_shapes(source_model(name).config)}
    idle = {pattern for pattern, entry in LLAMA.table.items() if entry is not None} - needed
    assert idle == set()
    assert set(apply_table({"a.{}.b": "c.{}.d"}, {"a.3.b": torch.ones(1)})) == {"c.3.d"}
