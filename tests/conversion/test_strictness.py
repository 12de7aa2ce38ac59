"""Every tensor is used or left out by name: what is missing, extra, mis-shaped or not finite is refused, by name."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import checkpoint, convert
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
from conversion.tables import apply_table, numbered, origins
from modeling_insnext import DrtForCausalLM
from tests.support.equality import same_bits
from tests.support.foreign import (
    ILM_CONFIG,
    UPSTREAM_CONFIG,
    ilm_tensors,
    laid_out,
    our_drt,
)
from tests.support.sources import CHUNKS, encoder, source_model


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


def used(family, tensors, config, target) -> dict[str, tuple[str, str]]:
    """Return, for every rule that makes something, one tensor that it is for, by its names in table and source."""
    table, found = family.table_for(target), {}
    for full in tensors:
        name = family.rename(full, config)
        pattern = numbered(name)[0]
        if table[pattern] is not None and name != "lm_head.weight":
            found.setdefault(pattern, (name, full))
    return found


def small(target):
    return CHUNKS if target == "drt" else {}


@every_family
def test_a_rule_that_is_missing_is_noticed(name):
    family, tensors, config, target = case(name)
    options = {} if family is UPSTREAM else small(target)
    convert_tensors(family, tensors, config, target, **options)
    for rule, (_, full) in used(family, tensors, config, target).items():
        table = {pattern: entry for pattern, entry in family.table.items() if pattern != rule}
        with pytest.raises(ValueError, match="every source tensor needs a rule, got") as caught:
            convert_tensors(family._replace(table=table), tensors, config, target, **options)
        assert full in str(caught.value)


@every_family
def test_every_source_tensor_must_be_there_in_its_shape_and_finite(name):
    family, tensors, config, target = case(name)
    options = {} if family is UPSTREAM else small(target)
    for name_in_table, full in used(family, tensors, config, target).values():
        tensor = tensors[full]
        broken = tensor.clone()
        broken.view(-1)[-1] = float("nan")
        shorter = tensor[: len(tensor) - 1] if tensor.ndim == 1 else tensor[:, :-1]
        for kind, changed in (
            ("missing", {key: value for key, value in tensors.items() if key != full}),
            ("mis-shaped", {**tensors, full: shorter}),
            ("finite", {**tensors, full: broken}),
            ("dense", {**tensors, full: tensor.long()}),
            ("one dtype", {**tensors, full: tensor.bfloat16()}),
        ):
            with pytest.raises(ValueError) as caught:
                convert_tensors(family, changed, config, target, **options)
            message = str(caught.value)
            # what is missing has no name in the source
            assert kind in message and (full in message or kind == "missing" and name_in_table in message), message


@every_family
def test_a_tensor_too_many_is_refused(name):
    family, tensors, config, target = case(name)
    options = {} if family is UPSTREAM else small(target)
    literal = sorted(pattern for pattern in family.table if "{}" in pattern)[0]
    for extra in ("adapter.weight", "model.layers.0.self_attn.sinks", "h.0.attn.adapter", literal):
        with pytest.raises(ValueError) as caught:
            convert_tensors(family, {**tensors, extra: torch.ones(2)}, config, target, **options)
        assert f"1 without: {extra}" in str(caught.value)


SECOND = {
    "llama": ("model.norm.weight", "norm.weight"),
    "gpt2": ("transformer.ln_f.weight", "ln_f.weight"),
    "roberta": ("roberta.embeddings.LayerNorm.bias", "embeddings.LayerNorm.bias"),
    "modernbert_biased": ("model.final_norm.weight", "final_norm.weight"),
    "upstream": ("module.model.norm.weight", "model.norm.weight"),
    "ilm": ("embed_tokens.weight", "model._orig_mod.embed_tokens.weight"),
}


@pytest.mark.parametrize("name", SECOND)
def test_two_tensors_of_one_name_are_refused(name):
    family, tensors, config, target = case(name)
    one, other = SECOND[name]
    options = {} if family is UPSTREAM else small(target)
    with pytest.raises(ValueError, match=f"must become different ones, got {one} and {other}, both "):
        convert_tensors(family, {**tensors, other: tensors[one]}, config, target, **options)


def test_two_rules_for_one_target_are_noticed():
    with pytest.raises(ValueError, match="got a.0.b and c.0.d, both e.0.f"):
        origins({"a.{}.b": "e.{}.f", "c.{}.d": "e.{}.f"}, {"a.0.b": "a.0.b", "c.0.d": "c.0.d"})


STRANGE = {
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "fp8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize(
    ("name", "tensor"),
    [("llama", "model.norm.weight"), ("roberta", "roberta.embeddings.token_type_embeddings.weight")],
)
def test_a_tensor_of_another_kind_is_refused(kind, name, tensor):
    family, tensors, config, target = case(name)
    changed = {**tensors, tensor: STRANGE[kind](tensors[tensor])}
    with pytest.raises(ValueError, match=f"tensors must be dense and of .* got 1 others: .*{tensor.split('.', 1)[1]}"):
        convert_tensors(family, changed, config, target, **small(target))
    with pytest.raises(ValueError, match="1 not dense floating point: a .*torch"):
        check_tensors({"a": changed[tensor]}, {"a": tuple(tensors[tensor].shape)})


def test_a_layer_too_many_and_a_bias_that_is_not_configured_are_refused():
    _, tensors, config, _ = case("llama")
    for extra in ("model.layers.4.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"):
        with pytest.raises(ValueError, match=f"got 1 extra: {extra}"):
            convert_tensors(LLAMA, {**tensors, extra: tensors["model.norm.weight"]}, config, "drt", **CHUNKS)


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
    assert all(same_bits(tensors[name], tensor) for name, tensor in model.state_dict().items())
    promised = json.loads(index.read_text())
    for weight_map, message in (
        ({**promised["weight_map"], "lost": next(iter(promised["weight_map"].values()))}, "they differ in lost"),
        ({**promised["weight_map"], "model.norm.weight": "gone.safetensors"}, "got gone.safetensors, which does not"),
        ({**promised["weight_map"], "model.norm.weight": "../x.safetensors"}, "got ../x.safetensors, which does not"),
        ({"model.norm.weight": 3}, "must map tensors to files in its weight_map, got {'model.norm.weight': 3}"),
        (None, "must map tensors to files in its weight_map, got None"),
    ):
        index.write_text(json.dumps({**promised, "weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            read_tensors(tmp_path)


class Trap:
    def __reduce__(self):
        return (print, ("code of a checkpoint ran",))


def test_no_code_of_a_checkpoint_runs(tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.bin")
    assert same_bits(read_tensors(tmp_path / "good.bin")["a"], torch.ones(2))
    (tmp_path / "bad.bin").write_bytes(pickle.dumps({"a": Trap()}))
    torch.save({"a": Trap()}, tmp_path / "bad2.bin")
    for name in ("bad.bin", "bad2.bin"):
        with pytest.raises(ValueError, match="must be a whole file of tensors and nothing that runs$") as caught:
            read_tensors(tmp_path / name)
        # PyTorch says how to run it all the same
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert "ran" not in capsys.readouterr().out
    for something in ([1, 2], {0: torch.ones(2)}, {"a": None}):
        torch.save(something, tmp_path / "other.bin")
        with pytest.raises(ValueError, match="must hold tensors by name"):
            read_tensors(tmp_path / "other.bin")
    for garbage in (b"", b"hello world", b"\x80\x02]q\x00(K\x01", b"PK\x03\x04aaaa"):
        (tmp_path / "garbage.bin").write_bytes(garbage)
        with pytest.raises(ValueError, match="must be a whole file of tensors"):
            read_tensors(tmp_path / "garbage.bin")
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


@pytest.mark.parametrize("kind", ["link", "dangling"])
def test_a_link_is_followed_to_where_the_folder_will_be(kind, folder, tmp_path):
    if kind == "link":
        (tmp_path / "real").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "real")
    convert_folder(LLAMA, str(tmp_path / "src"), tmp_path / "there", "drt", **CHUNKS)
    assert (tmp_path / "there").is_symlink() and check_folder(tmp_path / "real").model_type == "drt"


def test_places_where_no_folder_can_be_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "read_tensors", None)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for place, message in (
        (".", "must be another folder than the working directory"),
        ("", "must be another folder than the working directory"),
        (tmp_path / "file", "must be a new or an empty folder"),
        (tmp_path / "file" / "new", f"must be inside a folder, got the file {tmp_path}/file"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_folder(LLAMA, str(tmp_path), place, "drt")
    with pytest.raises((ValueError, OSError)):
        convert_folder(LLAMA, str(tmp_path), tmp_path / "loop", "drt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "loop"]
