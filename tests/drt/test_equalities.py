"""However a text is read, its logits are those of one parallel pass: float64, 1e-9, more chunks than are retrieved."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_insnext import ChunkMemoryCache
from modeling_insnext.drt import memory
from modeling_insnext.drt.modeling_drt import DrtModel
from modeling_insnext.drt.retrieval import best_chunks
from modeling_insnext.drt.retriever import Retriever
from tests.support.drt import FORMS, MEMORY, padded, random_ids, read, tiny_model, whole


CLOSE = 1e-9
LENGTH = 36

CONFIGS = {
    "x2": {},
    "x1": {"retrieval_groups": [2]},
    "x3": {"retrieval_groups": [1, 1, 1], "num_lower_layers": 0},
    "stream": {"residual": "stream"},
    "dropped": {"landmark_slot": "dropped"},
    "cls": {"landmark_source": "cls"},
    "mean": {"landmark_source": "mean", "sliding_window": 6},
    "cca": {"fusion": "cca"},
    "random": {"retriever": "random"},
    "fixed": {"retriever": "fixed"},
    "chunks_of_one": {"chunk_size": 1, "sliding_window": 3},
    "chunks_of_eight": {"chunk_size": 8, "sliding_window": 10, "num_retrieved_chunks": 1},
    "no_window": {"sliding_window": None},
    "window_model": {"retrieval_groups": [], "num_lower_layers": 3},
    "full_attention": {"retrieval_groups": [], "sliding_window": None},
    "landmark_attention": {"retrieval_groups": [], "sliding_window": None, "self_attention": "landmark"},
    "memory": MEMORY,
    "by_token": {"retrieval_by": "token"},
    "by_token_memory": {**MEMORY, "retrieval_by": "token"},
    **FORMS,
}
every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)

quick = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def configs(draw):
    """Draw a shape of everything that has one."""
    changes = {
        "chunk_size": draw(st.integers(1, 8)),
        "num_retrieved_chunks": draw(st.integers(1, 4)),
        "landmark_source": draw(st.sampled_from(["token", "token", "cls", "mean"])),
        "landmark_slot": draw(st.sampled_from(["off_by_one", "dropped"])),
        "residual": draw(st.sampled_from(["bypass", "stream"])),
        "fusion": draw(st.sampled_from(["gca", "gca", "cca"])),
        "retriever": draw(st.sampled_from(["learned", "learned", "random", "fixed"])),
        "retrieval_groups": draw(st.sampled_from([[1], [1, 1], [2, 1], [1, 1, 1]])),
        "num_lower_layers": draw(st.integers(0, 2)),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "cross_attention_layers": draw(st.sampled_from([None, 1])),
        "keys_per_layer": draw(st.booleans()),
    }
    if changes["chunk_size"] < 3 and changes["retriever"] == "fixed":
        # chunks of the same few tokens have the same score, and any of them may be chosen
        changes["retriever"] = "random"
    changes |= draw(st.sampled_from([{}, {}, *FORMS.values()]))
    least = changes["chunk_size"] + 2
    window = draw(st.one_of(st.none(), st.integers(least, least + 8)))
    return {**changes, "sliding_window": window}


def worst(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape and not actual.isnan().any()
    return float((actual - expected).abs().max())


def in_segments(model, ids, lengths, past=None, mask=None):
    """Return the logits of a text read in segments of these lengths, again and again."""
    past = ChunkMemoryCache(model.config) if past is None else past
    logits, column = [], 0
    with torch.no_grad():
        for length in itertools.cycle(lengths):
            if column >= ids.shape[1]:
                return torch.cat(logits, 1)
            end = min(column + length, ids.shape[1])
            seen = None if mask is None else mask[:, :end]
            logits.append(model(ids[:, column:end], seen, past_key_values=past).logits)
            column = end


# every shape token by token, and in segments what differs in how a segment is read
SEGMENTED = (
    "x2",
    "stream",
    "cls",
    "mean",
    "chunks_of_eight",
    "no_window",
    "landmark_attention",
    "memory",
    "by_token",
    "gpt2",
)
STEPS = [pytest.param(changes, 1, id=f"{name}-1") for name, changes in CONFIGS.items()]
STEPS += [pytest.param(CONFIGS[name], 7, id=f"{name}-7") for name in SEGMENTED]


@pytest.mark.parametrize(("changes", "step"), STEPS)
def test_decoding_and_segments_of_any_length_are_one_pass(changes, step):
    model, ids = tiny_model(**changes), random_ids(2, LENGTH)
    past = ChunkMemoryCache(model.config)
    assert worst(read(model, ids, past, step), whole(model, ids)) < CLOSE
    if model.config.retrieval_groups:
        assert min(past.memory.counts) == LENGTH // model.config.chunk_size > model.config.num_retrieved_chunks


# FlexAttention refuses landmark attention, see test_config; of the rest it takes what differs in its mask
IMPLEMENTATIONS = [
    ("eager", name) for name in ("x2", "no_window", "landmark_attention", "chunks_of_eight", "rope", "memory", "gpt2")
] + [("flex_attention", name) for name in ("x2", "no_window", "memory", "gpt2")]


@pytest.mark.parametrize(("implementation", "name"), IMPLEMENTATIONS)
def test_every_attention_implementation_is_the_same_function(implementation, name):
    model, ids = tiny_model(**CONFIGS[name]), random_ids(2, LENGTH)
    expected = whole(model, ids)
    model.set_attn_implementation(implementation)
    assert worst(whole(model, ids), expected) < CLOSE
    assert worst(read(model, ids, ChunkMemoryCache(model.config), 17), expected) < CLOSE
    ragged, mask = padded(ids, [LENGTH, 23], "left")
    real = mask[1].bool()
    assert worst(whole(model, ragged, mask)[1, real], whole(model, ids[1:, :23])[0]) < CLOSE


@every_config
def test_a_row_of_a_ragged_batch_is_the_row_alone(changes):
    model, ids, lengths = tiny_model(**changes), random_ids(3, LENGTH), [LENGTH, 5, 27]
    alone = [whole(model, ids[row : row + 1, :length])[0] for row, length in enumerate(lengths)]
    for side in ("left", "right"):
        ragged, mask = padded(ids, lengths, side)
        for logits in (whole(model, ragged, mask), in_segments(model, ragged, [3, 9, 10], mask=mask)):
            for row, expected in enumerate(alone):
                assert worst(logits[row, mask[row].bool()], expected) < CLOSE
        # control: padding on the left, read as text, is seen
        error = worst(whole(model, ragged)[1, mask[1].bool()], alone[1])
        assert error > 1e-3 if side == "left" else error < CLOSE


@pytest.mark.parametrize(
    "name", ["x2", "cls", "cca", "random", "fixed", "chunks_of_one", "memory", "by_token", "qwen", "gpt2"]
)
@pytest.mark.parametrize("location", ["host", "disk"])
def test_where_chunks_lie_changes_nothing(name, location, tmp_path):
    model, ids = tiny_model(**CONFIGS[name]), random_ids(2, LENGTH)
    folder = tmp_path if location == "disk" else None
    past = ChunkMemoryCache(model.config, location, folder)
    assert worst(in_segments(model, ids, [6, 1, 11], past), whole(model, ids)) < CLOSE


LASTS = [pytest.param(changes, 1, id=f"{name}-1") for name, changes in CONFIGS.items()]
LASTS += [pytest.param(CONFIGS[name], 4, id=f"{name}-4") for name in SEGMENTED]


@pytest.mark.parametrize(("changes", "last"), LASTS)
def test_lower_layers_suffice_for_what_no_last_position_sees(changes, last, monkeypatch):
    changes = {**changes, **({"sliding_window": 7} if changes == {} else {})}
    model, ids = tiny_model(**changes), random_ids(2, 90)
    ran = []
    run = DrtModel._run
    monkeypatch.setattr(
        DrtModel,
        "_run",
        lambda self, layers, hidden, *args: (
            ran.append(len(layers) * hidden.shape[1]) or run(self, layers, hidden, *args)
        ),
    )
    past = model.prefill(ids[:, :-last], lower_only=True, segment_length=16)
    cost = sum(ran)
    assert worst(read(model, ids[:, -last:], past, last), whole(model, ids)[:, -last:]) < CLOSE
    ran.clear()
    model.prefill(ids[:, :-last], segment_length=16)
    config = model.config
    saves = config.retrieval_groups and config.sliding_window is not None
    assert cost < 0.8 * sum(ran) if saves else cost == sum(ran)


@quick
@given(configs(), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 99))
def test_any_shape_in_any_segments_is_one_pass(changes, lengths, seed):
    model, ids = tiny_model(seed=seed, **changes), random_ids(2, 35, seed)
    assert worst(in_segments(model, ids, lengths), whole(model, ids)) < CLOSE


@st.composite
def masks(draw, rows=3, columns=30):
    """Draw masks with holes anywhere; every row has a token."""
    bits = draw(st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    for row in bits:
        row[draw(st.integers(0, columns - 1))] = True
    return torch.tensor(bits).long()


@quick
@given(configs(), masks(), st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(0, 99))
def test_holes_in_the_mask_are_as_if_they_were_not_there(changes, mask, lengths, seed):
    model, ids = tiny_model(seed=seed, **changes), random_ids(3, 30, seed)
    together = whole(model, ids, mask)
    stepped = in_segments(model, ids, lengths, mask=mask)
    for row, real in enumerate(mask.bool()):
        alone = whole(model, ids[row : row + 1, real])[0]
        assert worst(together[row, real], alone) < CLOSE
        assert worst(stepped[row, real], alone) < CLOSE


@quick
@given(configs(), st.integers(1, 60), st.lists(st.integers(1, 25), min_size=1, max_size=2), st.integers(0, 99))
def test_any_shape_may_skip_upper_layers(changes, length, segments, seed):
    model, ids = tiny_model(seed=seed, **changes), random_ids(2, length + 1, seed)
    past = model.prefill(ids[:, :-1], lower_only=True, segment_length=segments[0])
    assert worst(read(model, ids[:, -1:], past), whole(model, ids)[:, -1:]) < CLOSE


def test_a_ragged_batch_may_skip_upper_layers():
    model, ids, lengths = tiny_model(sliding_window=7), random_ids(3, 90), [90, 31, 70]
    for side in ("left", "right"):
        ragged, mask = padded(ids, lengths, side)
        past = model.prefill(ragged, mask, lower_only=True, segment_length=16)
        more = random_ids(3, 3, seed=1)
        logits = read(model, more, past, mask=torch.cat([mask, torch.ones_like(more)], 1))
        for row, length in enumerate(lengths):
            text = torch.cat([ids[row, :length], more[row]])[None]
            assert worst(logits[row], whole(model, text)[0, -3:]) < CLOSE


# controls: what the public code does wrong must fail the checks above


def segment_error(model, ids, lengths, patch) -> float:
    expected = whole(model, ids)
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        return worst(in_segments(model, ids, lengths), expected)


def without_the_norm_of_the_query(model):
    def patch(monkeypatch):
        for norm in model.model.query_norms:
            monkeypatch.setattr(norm, "forward", lambda x: x)

    return patch


def with_no_retrieval_in_the_first_chunk(monkeypatch):
    monkeypatch.setattr(ChunkMemoryCache, "retrieved_for_current", lambda self, group: None)


@pytest.mark.parametrize(("residual", "groups"), [("bypass", [2]), ("stream", [1, 1])], ids=["x1", "x2-stream"])
def test_the_defects_of_the_public_code_fail_the_checks(residual, groups):
    model, ids = tiny_model(residual=residual, retrieval_groups=groups), random_ids(2, LENGTH)
    for norm in model.model.query_norms:
        norm.weight.data.uniform_(0.5, 1.5)
    for lengths in ([1], [7]):
        assert segment_error(model, ids, lengths, lambda monkeypatch: None) < CLOSE
        assert segment_error(model, ids, lengths, without_the_norm_of_the_query(model)) > 1e-3
        assert segment_error(model, ids, lengths, with_no_retrieval_in_the_first_chunk) > 1e-3


def test_a_chunk_that_asks_for_itself_fails_the_check_of_decoding():
    """Read in one pass the chunks are there before they ask; token by token the last one is as well."""
    model, ids = tiny_model(), random_ids(1, LENGTH)

    def patch(monkeypatch):
        monkeypatch.setattr(memory, "best_chunks", lambda score, asking, *args: best_chunks(score, asking + 1, *args))

    assert segment_error(model, ids, [1], patch) > 1e-3


def first_changes(model, ids) -> list[int]:
    """Return for every place the first position whose logits change with the token there."""
    T = ids.shape[1]
    changed = ids.expand(T, T).clone()
    changed.diagonal().add_(7).sub_(3).remainder_(47).add_(3)
    differs_TT = (whole(model, changed) - whole(model, ids)).abs().amax(2) > 1e-12
    return differs_TT.long().argmax(1).tolist()


@every_config
def test_no_token_is_seen_before_it_is_there(changes):
    model, ids = tiny_model(**changes), random_ids(1, LENGTH)
    assert first_changes(model, ids) == list(range(LENGTH))


def test_a_chunk_served_by_what_it_found_itself_is_a_leak_that_shows(monkeypatch):
    retrieve = Retriever.retrieve

    def too_early(*args):
        served = retrieve(*args)
        return served._replace(indices_BCK=served.indices_BCK.roll(-1, 1), weights_BCK=served.weights_BCK.roll(-1, 1))

    model, ids = tiny_model(), random_ids(1, LENGTH)
    monkeypatch.setattr(Retriever, "retrieve", too_early)
    assert any(first < place for place, first in enumerate(first_changes(model, ids)))


WINDOWED = {name: changes for name, changes in CONFIGS.items() if changes.get("sliding_window", 9) is not None}


@pytest.mark.parametrize("changes", WINDOWED.values(), ids=WINDOWED)
def test_far_tokens_reach_the_end_only_by_retrieval(changes):
    """More than a window per layer away a token changes what is written, unless nothing is retrieved."""
    model = tiny_model(**{**changes, "num_retrieved_chunks": 3})
    ids, config = random_ids(1, 90), model.config
    other = ids.clone()
    other[:, :12] = random_ids(1, 12, seed=5)
    beyond = 12 + config.sliding_window * config.num_hidden_layers
    changed = worst(whole(model, other)[:, beyond:], whole(model, ids)[:, beyond:])
    assert changed > 1e-6 if config.retrieval_groups else changed < 1e-12
