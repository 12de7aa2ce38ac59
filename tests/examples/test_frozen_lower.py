"""A memory trained on lower states that are kept reads what the model itself reads."""

import json
import pydoc_data.topics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.examples.test_drt_examples import ROOT
from tests.support.drt import MEMORY, random_ids, tiny_model
from tests.support.equality import same_bits
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "checkpoints"))
    import frozen_lower
    import memory_training
    import train_memory

    yield SimpleNamespace(frozen_lower=frozen_lower, memory_training=memory_training, train_memory=train_memory)
    for name in ("frozen_lower", "train_memory", "memory_training"):
        sys.modules.pop(name, None)


def one_group(**changes):
    return tiny_model(**{**MEMORY, "retrieval_groups": [3], "cross_attention_layers": 2, **changes}).requires_grad_(
        False
    )


def banned(rows, chunks, others=True):
    return ~torch.eye(rows, dtype=torch.bool)[..., None].expand(-1, -1, chunks).flatten(1) & others


def read(recipes, model, ids, tail, bans):
    lower = recipes.frozen_lower.lower_states(model.model, ids)
    memory = recipes.frozen_lower.encode(model.model, lower, bans, tail)
    return recipes.frozen_lower.upper_states(model.model, lower, memory)


@pytest.mark.parametrize("groups", [[3], [2, 2]])
def test_rows_read_whole_that_find_their_own_chunks_are_read_as_by_the_model(recipes, groups):
    model, ids, S, C = one_group(retrieval_groups=groups), random_ids(3, 40), 5, 8
    expected = model.model(ids, use_cache=False).last_hidden_state[:, S:]
    # the first chunk stands in front of the tail
    got = read(recipes, model, ids, C - 1, banned(3, C))
    assert (got - expected).abs().max() < 1e-9
    # control: with the chunks of other rows to choose from, something else is read
    assert (read(recipes, model, ids, C - 1, banned(3, C, others=False)) - expected).abs().max() > 1e-3


def test_what_the_question_is_scored_by_is_what_the_first_group_chooses_by(recipes):
    model, C, tail = one_group(), 8, 3
    lower = recipes.frozen_lower.lower_states(model.model, random_ids(3, 40))
    memory = recipes.frozen_lower.encode(model.model, lower, banned(3, C, others=False), tail)
    scores = recipes.frozen_lower.question_scores(model.model, lower, memory)
    chosen, find = [], memory.find

    def spy(*args):
        chosen.append(find(*args))
        return chosen[-1]

    memory.find = spy
    recipes.frozen_lower.upper_states(model.model, lower, memory)
    assert chosen[0][:, tail - 1].tolist() == scores.topk(2).indices.tolist()
    # control: other chunks ask for others
    assert chosen[0][:, tail].tolist() != scores.topk(2).indices.tolist()


def test_a_row_finds_its_own_chunks_before_the_asking_one_and_those_of_others_unless_banned(recipes):
    model, C, tail = one_group(), 4, 2
    bans = torch.zeros(2, 2 * C, dtype=torch.bool)
    bans[0, C + 1] = True
    lower = recipes.frozen_lower.lower_states(model.model, random_ids(2, 20))
    allowed = recipes.frozen_lower.encode(model.model, lower, bans, tail).allowed
    # asking: chunk 0, then the last two, 2 and 3
    assert allowed[0].long().tolist() == [
        [0, 0, 0, 0, 1, 0, 1, 1],
        [1, 1, 0, 0, 1, 0, 1, 1],
        [1, 1, 1, 0, 1, 0, 1, 1],
    ]
    assert allowed[1, 0].long().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


TRAINING = {"chunk_size": 32, "sliding_window": 48, "vocab_size": 300, "initializer_range": 0.1}


def begin(recipes, folder, **changes):
    """Return a tiny model whose memory is trained, its rows, and the arguments, in float32."""
    tokenizer = tiny_tokenizer(300, bos_in_front=False, all_bytes=True, add_prefix_space=False)
    model = one_group(**TRAINING).float()
    recipes.memory_training.freeze_source(model)
    options = ["--model", "-", "--corpus", "-", "--output_dir", str(folder), "--chunks", "20", "--rows", "6"]
    options += "--batch 3 --read 2 --max_steps 4 --evaluate_every 4 --save_every 2 --book_share 0.3".split()
    args = recipes.train_memory.parse(options)
    ids = np.array(tokenizer.encode(" ".join(pydoc_data.topics.topics.values())[:40_000]))
    rows = [recipes.train_memory.Rows(model, tokenizer, ids, args, seed) for seed in (0, 1)]
    return model, rows, args


def test_what_is_new_alone_learns_and_the_lower_layers_read_a_row_once(recipes, monkeypatch, tmp_path):
    model, rows, args = begin(recipes, tmp_path)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    read, lower_states = [], recipes.train_memory.lower_states

    def spy(inner, ids):
        read.append(len(ids))
        return lower_states(inner, ids)

    monkeypatch.setattr(recipes.train_memory, "lower_states", spy)
    recipes.train_memory.train(model, *rows, args)
    new = {n for n in before if ".encoder." in n or ".cross_attn." in n or "query_norms" in n}
    moved = {name for name, weight in model.named_parameters() if not same_bits(weight, before[name])}
    assert moved <= new and {n.split(".")[-2] for n in new - moved} <= {"q_proj", "k_proj"}
    assert set(load_file(tmp_path / "memory.safetensors")) == new
    # six rows of training and twelve held out, though four steps took three each
    assert sum(read) <= 6 + 12


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(recipes, monkeypatch, tmp_path):
    model, rows, args = begin(recipes, tmp_path / "whole")
    recipes.train_memory.train(model, *rows, args)
    model, rows, args = begin(recipes, tmp_path / "parts")
    losses, steps = recipes.train_memory.losses, []

    def stops(model, *rest):
        steps.append(model.training)
        if sum(steps) == 4:
            raise KeyboardInterrupt
        return losses(model, *rest)

    monkeypatch.setattr(recipes.train_memory, "losses", stops)
    with pytest.raises(KeyboardInterrupt):
        recipes.train_memory.train(model, *rows, args)
    monkeypatch.setattr(recipes.train_memory, "losses", losses)
    model, rows, args = begin(recipes, tmp_path / "parts")
    recipes.train_memory.train(model, *rows, args)
    whole, parts = (json.loads((tmp_path / n / "history.json").read_text()) for n in ("whole", "parts"))
    told = [[(row["step"], row.get("needle"), row.get("hint")) for row in history] for history in (whole, parts)]
    assert [step for step, *_ in told[0]] == [0, 1, 2, 3, 4, 4] == [step for step, *_ in told[1]]
    assert told[1] == [pytest.approx(row, abs=1e-3, nan_ok=True) if None not in row else row for row in told[0]]
