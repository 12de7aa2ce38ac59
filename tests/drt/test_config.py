"""DrtConfig: sizes, presets, baselines, and what it refuses."""

import pytest
import torch
from transformers import AutoConfig

from modeling_insnext import DrtConfig, DrtForCausalLM
from modeling_insnext.drt.configuration_drt import PRESETS
from tests.support.drt import random_ids, tiny_config, tiny_model, whole


# parameters in all, without the chunk encoder, and of the sliding-window and the + 2 layers baseline;
# the paper's 128M, 355M and 775M do not count the encoder
COUNTS = {
    "small-x1": (145_981_440, 131_821_056, 123_557_376, 137_716_224),
    "small-x2": (145_982_208, 131_821_824, 123_557_376, 137_716_224),
    "medium-x1": (380_741_632, 355_573_760, 328_296_448, 353_462_272),
    "medium-x2": (380_742_656, 355_574_784, 328_296_448, 353_462_272),
    "large-x1": (834_462_720, 795_136_000, 732_851_200, 772_175_360),
    "large-x2": (834_464_000, 795_137_280, 732_851_200, 772_175_360),
    "large-x3": (834_465_280, 795_138_560, 732_851_200, 772_175_360),
}
BASELINES = {
    "sliding_window": {"retrieval_groups": [], "num_lower_layers": 4},
    "sliding_window+2": {"retrieval_groups": [], "num_lower_layers": 6},
    "full_attention": {"retrieval_groups": [], "num_lower_layers": 4, "sliding_window": None},
    "random_retriever": {"retriever": "random"},
    "fixed_retriever": {"retriever": "fixed"},
    "cca": {"fusion": "cca"},
    "landmark_attention": {
        "retrieval_groups": [],
        "num_lower_layers": 4,
        "sliding_window": None,
        "self_attention": "landmark",
        "landmark_source": "token",
    },
}


def counted(config: DrtConfig) -> tuple[int, int]:
    """Return all parameters, and those without the chunk encoder but for its keys and values."""
    with torch.device("meta"):
        model = DrtForCausalLM(config)
    sizes = {name.removeprefix("model."): weight.numel() for name, weight in model.named_parameters()}
    kept = ("encoder.k_proj.weight", "encoder.v_proj.weight")
    outside = sum(size for name, size in sizes.items() if not name.startswith("encoder.") or name in kept)
    return sum(sizes.values()), outside


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    config = DrtConfig.preset(name)
    window, deeper = (counted(config.baseline(other))[0] for other in ("sliding_window", "sliding_window+2"))
    assert (*counted(config), window, deeper) == COUNTS[name]
    assert len(config.retrieval_groups) == int(name[-1])
    assert config.num_hidden_layers == {"small": 12, "medium": 22, "large": 34}[name.split("-")[0]]
    assert (config.chunk_size, config.num_retrieved_chunks, config.sliding_window) == (64, 8, 512)


def test_a_preset_takes_changes_and_only_known_names():
    assert DrtConfig.preset("small-x2", chunk_size=32).chunk_size == 32
    assert DrtConfig.preset("small-x2").chunk_size == 64
    with pytest.raises(ValueError, match=r"preset must be one of \['large-x1', .*\], got 'tiny'"):
        DrtConfig.preset("tiny")


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("source", ["token", "cls"])
def test_a_baseline_differs_in_what_it_is_about_alone(name, source):
    config = tiny_config(landmark_source=source)
    baseline = config.baseline(name)
    changed = {k: v for k, v in baseline.to_dict().items() if v != config.to_dict()[k]}
    assert changed == {k: v for k, v in BASELINES[name].items() if v != config.to_dict()[k]}
    torch.manual_seed(0)
    logits = whole(DrtForCausalLM(baseline).eval(), random_ids(1, 30))
    assert logits.isfinite().all()


def test_there_are_no_other_baselines():
    with pytest.raises(ValueError, match="baseline must be one of .* got 'sliding'"):
        tiny_config().baseline("sliding")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, got 0"),
        ({"chunk_size": 4.0}, "chunk_size must be an integer of at least 1, got 4.0"),
        ({"chunk_size": "5"}, "chunk_size must be an integer of at least 1, got '5'"),
        ({"num_retrieved_chunks": 0}, "num_retrieved_chunks must be an integer of at least 1, got 0"),
        ({"num_retrieved_chunks": True}, "num_retrieved_chunks must be an integer of at least 1, got True"),
        ({"num_lower_layers": -1}, "num_lower_layers must be an integer of at least 0, got -1"),
        ({"num_encoder_layers": 0}, "num_encoder_layers must be an integer of at least 1, got 0"),
        ({"vocab_size": None}, "vocab_size must be an integer of at least 1, got None"),
        ({"retrieval_groups": 6}, "retrieval_groups must be a list of numbers of layers, each at least 1, got 6"),
        ({"cross_attention_layers": 0}, "cross_attention_layers must be an integer of at least 1 or None, got 0"),
        ({"cross_attention_layers": True}, "cross_attention_layers must be .* at least 1 or None, got True"),
        ({"retrieval_groups": [3, 0]}, r"each at least 1, got \[3, 0\]"),
        ({"retrieval_groups": [3, True]}, r"each at least 1, got \[3, True\]"),
        ({"retrieval_groups": "33"}, "each at least 1, got '33'"),
        ({"retrieval_groups": None}, "each at least 1, got None"),
        (
            {"num_hidden_layers": 5},
            r"add up to num_hidden_layers=5, got num_lower_layers=2 and retrieval_groups=\[1, 1\]",
        ),
        ({"num_lower_layers": 0, "retrieval_groups": []}, "there must be at least one layer, got num_lower_layers=0"),
        # a landmark in the text takes a position of its own
        ({"chunk_size": 8}, r"sliding_window=9, a chunk of 9 positions \(chunk_size=8, landmark_source='token'\)"),
        ({"chunk_size": 9, "landmark_source": "cls"}, "sliding_window=9, a chunk of 9 positions"),
        ({"sliding_window": 0}, "sliding_window must be an integer of at least 1 or None, got 0"),
        ({"hidden_size": 30}, "hidden_size must be a multiple of num_attention_heads, got 30 and 4"),
        ({"hidden_size": 20}, "the head width must be even .*, got 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be an integer of at least 1, got 0"),
        ({"landmark_source": "last"}, r"landmark_source must be one of \('token', 'cls', 'mean'\), got 'last'"),
        ({"landmark_slot": "zero"}, r"landmark_slot must be one of \('off_by_one', 'dropped'\), got 'zero'"),
        ({"residual": "none"}, "residual must be one of .* got 'none'"),
        ({"retrieval_by": "head"}, r"retrieval_by must be one of \('chunk', 'token'\), got 'head'"),
        ({"retrieval_by": "token", "retriever": "fixed"}, 'retrieval_by="token" needs .* got retriever="fixed"'),
        ({"fusion": "sum"}, "fusion must be one of .* got 'sum'"),
        ({"retriever": "bm25"}, "retriever must be one of .* got 'bm25'"),
        ({"self_attention": "full"}, "self_attention must be one of .* got 'full'"),
        ({"self_attention": "landmark"}, r'self_attention="landmark" needs sliding_window=None.* got 9, \[1, 1\]'),
        ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\), got 1.0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive, got 0.0"),
        ({"encoder_rope_theta": -1}, "encoder_rope_theta must be positive, got -1"),
        ({"pad_token_id": 50}, r"pad_token_id must be in \[0, 50\), got 50"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id must be in \[0, 50\), got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_with_rule_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_the_limits_themselves_are_fine():
    for changes in (
        {"chunk_size": 7},
        {"chunk_size": 8, "landmark_source": "mean"},
        {"sliding_window": 1, "retrieval_groups": []},
        {"num_hidden_layers": 4},
        {"num_lower_layers": 0},
        {"retrieval_groups": (2, 1)},
        {"eos_token_id": [2, 3]},
        {"pad_token_id": None},
    ):
        config = tiny_config(**changes)
        assert whole(DrtForCausalLM(config).eval(), random_ids(1, 20)).isfinite().all()
    assert tiny_config(retrieval_groups=(2, 1)).retrieval_groups == [2, 1]


def test_a_config_survives_files_and_dictionaries(tmp_path):
    config = tiny_config(
        landmark_source="mean", landmark_slot="dropped", residual="stream", sliding_window=None, eos_token_id=[2, 3]
    )
    config.save_pretrained(tmp_path)
    copies = [DrtConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path), AutoConfig.for_model("drt")]
    assert [type(copy) for copy in copies] == [DrtConfig] * 3
    copies[2] = DrtConfig.from_dict(config.to_dict())
    ignored = {"auto_map": None, "_name_or_path": None}
    for copy in copies:
        assert {**copy.to_dict(), **ignored} == {**config.to_dict(), **ignored}
    assert copies[0].num_hidden_layers == config.num_hidden_layers == 4
    assert "num_hidden_layers" not in config.to_dict()


def test_an_unknown_attention_implementation_is_refused_before_any_work():
    from transformers import AttentionInterface

    model = tiny_model()
    with pytest.raises(ValueError, match="nothing_like_it"):
        model.set_attn_implementation("nothing_like_it")
    with pytest.raises(ValueError, match="(?i)flash"):
        DrtForCausalLM._from_config(tiny_config(), attn_implementation="flash_attention_2")
    # one that Transformers knows and DRT does not
    AttentionInterface.register("somebody_elses", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match=r"must be one of \['eager', .*, got 'somebody_elses'"):
        DrtForCausalLM._from_config(tiny_config(), attn_implementation="somebody_elses")
    model.set_attn_implementation("somebody_elses")
    with pytest.raises(ValueError, match="got 'somebody_elses'"):
        whole(model, random_ids(1, 8))


def test_landmark_attention_is_dense_and_says_so():
    config = tiny_config(retrieval_groups=[], sliding_window=None, self_attention="landmark")
    with pytest.raises(ValueError, match=r"one of \['eager', 'sdpa'\] .*self_attention='landmark', got 'flex_att"):
        DrtForCausalLM._from_config(config, attn_implementation="flex_attention")


def test_the_attention_implementation_can_be_switched():
    model, ids = tiny_model(), random_ids(1, 30)
    expected = whole(model, ids)
    for name in ("eager", "flex_attention", "sdpa"):
        model.set_attn_implementation(name)
        assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
            name
        }
        assert (whole(model, ids) - expected).abs().max() < 1e-9


def test_without_a_known_length_there_is_no_attribute_of_that_name(tmp_path):
    """Other libraries take its value for a number, or its absence for no limit; `None` is neither."""
    unknown, known = tiny_config(position_encoding="rope"), tiny_config(max_position_embeddings=20)
    for config in (unknown, known):
        config.save_pretrained(tmp_path)
        loaded = DrtConfig.from_pretrained(tmp_path)
        assert getattr(loaded, "max_position_embeddings", "none") == ("none" if config is unknown else 20)
    # configurations saved before say null
    assert not hasattr(DrtConfig(**{**unknown.to_dict(), "max_position_embeddings": None}), "max_position_embeddings")
    # nothing is cut
    assert whole(DrtForCausalLM(known).eval(), random_ids(1, 30)).shape == (1, 30, 50)


@pytest.mark.parametrize("rope_type", ["yarn", "llama3"])
def test_a_stretched_rotation_says_how_far(rope_type):
    given = {"rope_type": rope_type, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    known = {**given, "original_max_position_embeddings": 16}
    assert tiny_config(position_encoding="rope", rope_parameters=known).max_position_embeddings == 64
    with pytest.raises(ValueError, match="needs .*original_max_position_embeddings"):
        tiny_config(position_encoding="rope", rope_parameters=given)
    for name, value in (("factor", None), ("rope_theta", -1.0)):
        with pytest.raises(ValueError, match=f"needs a positive {name} in rope_parameters, got {value}"):
            tiny_config(position_encoding="rope", rope_parameters={**known, name: value})
