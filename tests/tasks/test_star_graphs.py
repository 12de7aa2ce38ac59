import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import star_graphs
import torch
from transformers import TrainingArguments

from modeling_insnext.tasks.star_graphs import (
    BAR,
    BOS,
    COMMA,
    NUM_SPECIAL,
    SPECS,
    StarGraph,
    StarGraphSpec,
    draw_graph,
    graph_text,
    star_texts,
)


SIZE = 150
TINY = StarGraphSpec(degree=2, min_length=4, max_length=4, min_plan=2, num_names=7)


def graphs_of(name, split="test", size=SIZE):
    return [draw_graph(name, split, index) for index in range(size)]


def all_paths(edges, node, goal):
    if node == goal:
        return [[goal]]
    return [[node, *rest] for u, v in edges.tolist() if u == node for rest in all_paths(edges, v, goal)]


def is_valid(graph, spec):
    """Whether a graph keeps every rule of its specification and has one answer."""
    edges, path, fork = graph
    leaving, entering = Counter(edges[:, 0].tolist()), Counter(edges[:, 1].tolist())
    centre = path[fork - 1]
    ends = [node for node in entering if not leaving[node]]
    arms = [arm for end in ends for arm in all_paths(edges, centre, end)]
    return (
        all_paths(edges, path[0], path[-1]) == [path.tolist()]
        and len(set(map(tuple, edges.tolist()))) == len(edges) == len(leaving | entering) - 1
        and set((leaving | entering).keys()) <= set(range(spec.num_names))
        and leaving[centre] == spec.degree
        and all(leaving[node] == 1 for node in leaving if node != centre)
        and all(entering[node] == 1 for node in entering if node != centre)
        and len(arms) == spec.degree
        and min(map(len, arms)) - 1 >= spec.min_plan
        and spec.min_length <= len(path) <= spec.max_length
    )


@pytest.mark.parametrize("name", SPECS)
def test_graphs_keep_the_rules_and_have_one_answer(name):
    assert all(is_valid(graph, SPECS[name]) for graph in graphs_of(name))


def test_control_a_broken_graph_is_noticed():
    edges, path, fork = draw_graph("easy", "test", 0)
    shortcut = np.append(edges, [[path[0], path[-1]]], axis=0)
    assert is_valid(StarGraph(edges, path, fork), SPECS["easy"])
    assert not is_valid(StarGraph(shortcut, path, fork), SPECS["easy"])
    assert not is_valid(StarGraph(edges[:-1], path, fork), SPECS["easy"])
    assert not is_valid(StarGraph(edges, path[::-1], fork), SPECS["easy"])
    assert not is_valid(StarGraph(edges, path, fork), dataclasses.replace(SPECS["easy"], num_names=13, degree=2))


@pytest.mark.parametrize("name", SPECS)
def test_lengths_and_centres_are_uniform(name):
    spec, graphs = SPECS[name], graphs_of(name, size=600)
    lengths = Counter(len(graph.path) for graph in graphs)
    expected = 600 / (spec.max_length - spec.min_length + 1)
    assert set(lengths) == set(range(spec.min_length, spec.max_length + 1))
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in lengths.values())
    longest = [graph.fork - 1 for graph in graphs if len(graph.path) == spec.max_length]
    assert set(longest) == set(range(spec.max_length - spec.min_plan))


def test_easy_starts_at_the_centre_and_medium_need_not():
    assert {graph.fork for graph in graphs_of("easy")} == {1}
    assert len({graph.fork for graph in graphs_of("medium")}) > 1


def test_where_an_edge_stands_says_nothing_about_the_answer():
    places = [
        np.flatnonzero((graph.edges == graph.path[:2]).all(1))[0] for graph in graphs_of("easy", "train", size=600)
    ]
    counts = np.bincount(places, minlength=12)
    assert np.abs(counts - 50).max() < 36


def test_a_graph_is_a_function_of_specification_split_index_and_seed():
    def flat(*args):
        return [array.tolist() for array in draw_graph(*args)[:2]]

    reference = flat("medium", "test", 7, 0)
    assert flat("medium", "test", 7, 0) == reference
    others = [("easy", "test", 7, 0), ("medium", "train", 7, 0), ("medium", "test", 8, 0), ("medium", "test", 7, 1)]
    assert all(flat(*other) != reference for other in others)


def test_splits_share_no_graph():
    def questions(split, size=1500):
        graphs = graphs_of("medium", split, size)
        return {(frozenset(map(tuple, g.edges.tolist())), g.path[0], g.path[-1]) for g in graphs}

    train, val, test = questions("train"), questions("val", 100), questions("test")
    assert len(train) == len(test) == 1500 and len(val) == 100
    assert not train & val and not train & test and not val & test
    assert train & questions("train", 10)


def test_text_holds_edges_question_and_answer():
    graph = StarGraph(np.array([[4, 0], [8, 4], [0, 3], [4, 9], [9, 2]]), np.array([8, 4, 9, 2]), 2)
    text = graph_text(graph)
    names = {BOS: "<s>", COMMA: ",", BAR: "|"}
    words = [names.get(token, str(token - NUM_SPECIAL)) for token in text["input_ids"].tolist()]
    assert " ".join(words) == "<s> 4 0 , 8 4 , 0 3 , 4 9 , 9 2 , | 8 4 9 2"
    assert [words[i] for i in np.flatnonzero(~text["given"])] == ["4", "9"]
    assert words[text["fork"]] == "9"


@pytest.mark.parametrize("name", SPECS)
def test_texts_fit_the_sizes_of_their_specification(name):
    spec = SPECS[name]
    lengths = [len(text["input_ids"]) for text in star_texts(name, "val")]
    ids = np.concatenate([text["input_ids"] for text in star_texts(name, "val")])
    assert ids.max() == spec.vocab_size - 1
    assert max(lengths) <= spec.max_tokens
    assert (max(lengths) == spec.max_tokens) == (name == "easy" or spec.max_tokens in lengths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"degree": 1}, "degree must be at least 2, got 1"),
        ({"min_plan": 1}, "min_plan must be at least 2.*got 1"),
        ({"min_length": 7}, "min_length must be at most max_length, 6, got 7"),
        ({"min_plan": 3}, "min_plan must be below min_length, 3, got 3"),
        ({"num_names": 15}, r"num_names must be at least 16.*got 15"),
    ],
)
def test_bad_specifications(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPECS["medium"], **changes)


def test_bad_requests():
    with pytest.raises(TypeError, match="degree must be an integer, got 3.0"):
        dataclasses.replace(SPECS["easy"], degree=3.0)
    with pytest.raises(ValueError, match="graphs must be one of easy, medium, hard.*got 'harder'"):
        draw_graph("harder", "test", 0)
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'dev'"):
        draw_graph("easy", "dev", 0)
    with pytest.raises(ValueError, match="index must be at least 0, got -1"):
        draw_graph("easy", "test", -1)
    with pytest.raises(ValueError, match=r"size must be in 1..100, the size of val, got 101"):
        star_texts("easy", "val", 101)


def test_judge_tells_the_ways_to_fail():
    graph = StarGraph(np.array([[7, 4], [4, 9], [9, 2], [4, 0], [0, 3]]), np.array([7, 4, 9, 2]), 2)

    def holds(*path):
        return {name for name, value in star_graphs.judge(graph, np.array(path)).items() if value}

    assert holds(7, 4, 9, 2) == {"exact", "fork", "length", "edges"}
    assert holds(7, 4, 0, 2) == {"wrong_arm", "length"}
    assert holds(7, 4, 9, 9, 2) == {"fork"}
    assert holds(7, 9, 2) == set()


def test_partly_written_texts_supervise_one_decision():
    batch = star_graphs.make_collator("left_to_right")(star_texts("medium", "val", 20))
    given, written = batch["horizon"][:, 0] + 1, (batch["labels"] != -100).sum(1)
    row = int(written.argmax())
    one = {name: values[row : row + 1] for name, values in batch.items()}
    insertion = star_graphs.partly_written(one, given[row : row + 1] + 1, stops=False)
    assert (insertion["labels"] != -100).nonzero().tolist() == [[0, int(given[row]) + 1]]
    assert not insertion["stop_targets"].any()
    stop = star_graphs.partly_written(one, given[row : row + 1] + written[row], stops=True)
    assert (stop["labels"] == -100).all() and int(stop["stop_targets"].sum()) == 1


def test_a_tiny_model_learns_tiny_graphs_and_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(SPECS, "tiny", TINY)
    torch.manual_seed(0)
    args = star_graphs.StarArguments(
        graphs="tiny", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        train_size=200, test_size=40,
    )  # fmt: skip
    training = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=16, learning_rate=1e-2, use_cpu=True,
        logging_steps=20, eval_strategy="steps", eval_steps=40, remove_unused_columns=False, prediction_loss_only=True,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = star_graphs.train(args, training)
    row = star_graphs.evaluate(model, "tiny", args, training)
    logged = row["training"]["history"]
    assert row["training"]["steps"] == 40 and logged[1]["position_loss"] < logged[0]["position_loss"]
    assert set(row["modes"]) == set(star_graphs.MODES)
    assert all(np.isfinite(list(losses.values())).all() for losses in row["next_insertion"].values())
    assert 0 <= row["modes"]["cached"]["exact"] <= row["modes"]["cached"]["length"] <= 1

    questions = graphs_of("tiny", size=4)
    paths, cost = star_graphs.write_paths(model, questions, 2, min_new_tokens=2)
    assert cost.tolist() == [2] * 4 and all(len(path) == 4 for path in paths)
    assert all((path[[0, -1]] == graph.path[[0, -1]]).all() for path, graph in zip(paths, questions, strict=True))
    _, cost = star_graphs.write_paths(model, questions, 2, min_new_tokens=2, **star_graphs.MODES["reencoded"])
    assert (cost > 2 + 20).all()

    path = tmp_path / "results" / "star_graphs.json"
    for chance in (0.5, 0.25):
        star_graphs.save_results({**row, "chance_at_fork": chance}, path)
    assert [saved["chance_at_fork"] for saved in json.loads(path.read_text())] == [0.25]
    assert "| tiny | uniform | cached |" in path.with_suffix(".md").read_text()
    assert sorted(file.name for file in path.parent.iterdir()) == ["star_graphs.json", "star_graphs.md"]
