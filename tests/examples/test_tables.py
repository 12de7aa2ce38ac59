"""The studies that make tables by running scripts: on tiny data, interrupted runs are not run again."""

import gzip
import importlib
import json
import os
import subprocess

import classification_table
import commongen_table
import decoding_defaults
import keyword_forms
import pytest
import report

from tests.support.script_models import save_tiny_model


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Folder with the files that both tables read, a dozen rows each."""
    folder = tmp_path_factory.mktemp("data")
    sentences = [{"sentence": f"the {'good' if i % 2 else 'bad'} film {i}", "label": i % 2} for i in range(12)]
    concepts = [{"concepts": ["dog", "park"], "references": ["A dog runs in the park.", "The dog is in a park."]}]
    concepts += [{"concepts": ["boy", "ball"], "references": ["A boy throws a ball."]}]
    files = {
        f"nlu/{name}": sentences for task in classification_table.TASKS.values() for name in (task.train, task.valid)
    }
    files |= {"commongen/train.jsonl.gz": concepts * 6, "commongen/dev.jsonl": concepts}
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt") if name.endswith(".gz") else open(path, "w") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model in place of the checkpoint that the tables are made with."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model("insnext", folder)
    return ["--checkpoint", str(folder)]


def run_here(name: str, args: list[str]) -> None:
    """Run a script in this process: a dozen processes would take minutes to import the same."""
    importlib.import_module(name.removesuffix(".py")).main(args)


def places(folder) -> list[str]:
    """Return the options that say where the table and the trainings go."""
    return ["--output", str(folder / "table"), "--runs", str(folder / "runs")]


def fail(name: str, args: list[str]) -> None:
    pytest.fail(f"{name} was run again")


def test_a_script_is_run_in_a_process_of_its_own_and_its_failure_is_told(tmp_path, monkeypatch, capfd):
    assert (report.SCRIPTS / "run_classification.py").is_file() and (report.SCRIPTS / "run_finetuning.py").is_file()
    (tmp_path / "run_me.py").write_text(
        "import os, sys\nprint(os.getpid(), sys.argv[1:])\nsys.exit(len(sys.argv) - 2)\n"
    )
    monkeypatch.setattr(report, "SCRIPTS", tmp_path)
    report.run_script("run_me.py", ["a b"])
    process, given = capfd.readouterr().out.split(" ", 1)
    assert int(process) != os.getpid() and given == "['a b']\n"
    with pytest.raises(subprocess.CalledProcessError):
        report.run_script("run_me.py", ["a", "b"])


def test_the_table_of_classifiers_is_written_and_goes_on(data_dir, checkpoint, tmp_path, monkeypatch):
    args = [*checkpoint, "--data_dir", str(data_dir), *places(tmp_path)]
    args += ["--max_steps", "2", "--batch_size", "4", "--seeds", "0", "1"]
    monkeypatch.setattr(classification_table, "run_script", run_here)
    report = classification_table.main(args)
    assert {task: set(rows) for task, rows in report["results"].items()} == {
        name: {"whole", "LoRA", "untrained"} for name in classification_table.TASKS
    }
    assert report["majority"]["CoLA"]["accuracy"] == 0.5
    lines = (tmp_path / "table.md").read_text().split("\n")
    assert len([line for line in lines if line.startswith(("| SST-2 |", "| CoLA |"))]) == 8

    monkeypatch.setattr(classification_table, "run_script", fail)
    assert classification_table.main(args)["results"] == report["results"]


def test_the_table_of_commongen_is_written_and_goes_on(data_dir, checkpoint, tmp_path, monkeypatch):
    args = [*checkpoint, "--data_dir", str(data_dir), *places(tmp_path)]
    args += ["--max_steps", "2"]
    monkeypatch.setattr(commongen_table, "run_script", run_here)
    report = commongen_table.main(args)
    rows = {(row["model"], row["order"], row["mode"]): row for row in report["results"]}
    assert len(rows) == 18 and all(row["coverage"] == 1 for row in rows.values())
    assert all(("p_model" in row) == (model == "LoRA") for (model, _, _), row in rows.items())
    assert all(("p_mode" in row) == (mode != "EBR off") for (_, _, mode), row in rows.items())
    anew = rows["LoRA", "one place a step", "re-encoded at every step"]
    assert anew["encoded_per_written"] > rows["LoRA", "one place a step", "EBR off"]["encoded_per_written"]

    monkeypatch.setattr(commongen_table, "run_script", fail)
    assert commongen_table.main(args)["results"] == report["results"]


def test_a_difference_by_chance_is_told_from_one_that_is_none():
    rows = [{"references": ["a dog runs in the park", "the dog is there"]}, {"references": ["a cat sleeps"]}] * 20
    good, bad = ["a dog runs in the park", "a cat sleeps"] * 20, ["dog runs", "cat on a mat"] * 20
    assert commongen_table.p_value(good, bad, rows) < 0.01
    assert commongen_table.p_value(good, good, rows) == 1.0
    mixed = good[:38] + bad[38:]
    assert commongen_table.p_value(mixed, good, rows) > 0.01


def test_the_interval_of_seeds_is_student_s():
    assert classification_table.spread([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"


def test_the_table_of_decodings_has_a_row_a_setting(data_dir, checkpoint, tmp_path, monkeypatch):
    kept = {name: decoding_defaults.SETTINGS[name] for name in (decoding_defaults.PLAIN, "repetition_penalty 1.3")}
    monkeypatch.setattr(decoding_defaults, "SETTINGS", kept)
    report = decoding_defaults.main([*checkpoint, "--data_dir", str(data_dir), "--output", str(tmp_path / "table")])
    assert set(report["results"]) == set(kept)
    assert report["results"][decoding_defaults.PLAIN]["p"] == 1
    lines = (tmp_path / "table.md").read_text().split("\n")
    assert [line.split(" | ")[0] for line in lines[2:4]] == [f"| {name}" for name in kept]


def test_a_text_loops_if_a_pair_of_words_stands_in_it_twice():
    assert decoding_defaults.loops("A dog and a cat. And a bird.") and decoding_defaults.loops("red red red")
    assert not decoding_defaults.loops("A dog and a cat and the bird, red red.") and not decoding_defaults.loops("")


def test_the_table_of_forms_covers_every_concept_in_some_form(data_dir, checkpoint, tmp_path):
    report = keyword_forms.main([*checkpoint, "--data_dir", str(data_dir), "--output", str(tmp_path / "table")])
    rows = {(row["order"], row["keywords"]): row for row in report["results"]}
    assert len(rows) == 4 and all(row["any_form"] == 1 for row in rows.values())
    assert all(
        rows[order, "as given"]["coverage"] == rows[order, "as given"]["p"] == 1 for order in keyword_forms.ORDERS
    )
    assert keyword_forms.with_forms({"concepts": ["look", "t-shirt"]}) == {
        "concepts": [["look", "looks", "looked", "looking"], ["t-shirt"]]
    }
