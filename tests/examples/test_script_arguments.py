"""What the run_*.py scripts are given is checked before any work; what they measure is what it says."""

import importlib
import json

import numpy as np
import pytest
import yaml
from transformers import TrainingArguments

from modeling_insnext import DrtConfig, InsNextConfig
from tests.support.script_models import word_tokenizer


INSNEXT = "--model_name_or_path {home}/insnext"
DRT = "--model_name_or_path {home}/drt"
DATA = "--train_file {home}/rows.jsonl --do_train"
CLASSIFY = f"run_classification {INSNEXT} {DATA}"
FINETUNE = f"run_finetuning {INSNEXT} {DATA}"
SCORE = f"run_scoring {INSNEXT} --data_file {{home}}/rows.jsonl"

BAD = {
    "no model": (f"run_pretraining {DATA}", "exactly one of model_name_or_path, config_name, model_type"),
    "two models": (f"run_pretraining {INSNEXT} --model_type drt {DATA}", "exactly one of"),
    "model type": (f"run_pretraining --model_type gpt {DATA}", "model_type must be one of .*'gpt'"),
    "no tokenizer": (f"run_pretraining --model_type drt {DATA}", "a new model needs tokenizer_name"),
    "preset": (f"run_pretraining {INSNEXT} --preset base {DATA}", "preset needs model_type"),
    "unknown preset": (
        f"run_pretraining --model_type drt --preset big --tokenizer_name {{home}}/drt {DATA}",
        "preset must be one of .*'big'",
    ),
    "overrides": (
        'run_pretraining --model_type drt --tokenizer_name {home}/drt --config_overrides {{"hiden_size":8}} ' + DATA,
        "config_overrides must name fields of DrtConfig.*hiden_size",
    ),
    "overrides of a checkpoint": (
        f"run_pretraining {INSNEXT} --config_overrides {{{{}}}} {DATA}",
        "config_overrides are for new models",
    ),
    "no JSON": (
        f"run_pretraining --model_type drt --tokenizer_name x --config_overrides [1] {DATA}",
        "config_overrides must be a JSON object",
    ),
    "dtype": (f"run_pretraining {INSNEXT} --dtype float8 {DATA}", "dtype must be one of .*'float8'"),
    "no data": (f"run_pretraining {INSNEXT} --do_train", "there must be data"),
    "both data": (f"run_pretraining {INSNEXT} {DATA} --dataset_name glue", "dataset_name or files, not both"),
    "format": (f"run_pretraining {INSNEXT} --train_file a.parquet --do_train", "train_file must end with one of"),
    "no file": (f"run_pretraining {INSNEXT} --train_file a.jsonl --do_train", "train_file must be a file"),
    "nothing to do": (f"run_pretraining {INSNEXT} --train_file {{home}}/rows.jsonl", "there must be something to do"),
    "no validation": (f"run_pretraining {INSNEXT} {DATA} --do_eval", "do_eval needs validation_file"),
    "rows": (f"run_pretraining {INSNEXT} {DATA} --max_train_samples 0", "max_train_samples must be at least 1, got 0"),
    "no stage": (f"run_pretraining {INSNEXT} {DATA}", "model type insnext needs stage"),
    "stage": (f"run_pretraining {INSNEXT} {DATA} --stage words", "stage must be one of .*'words'"),
    "stage of DRT": (f"run_pretraining {DRT} {DATA} --stage sentences", "stage is for model type insnext"),
    "order of DRT": (f"run_pretraining {DRT} {DATA} --order uniform", "order shape insertion sequences"),
    "order": (f"run_pretraining {INSNEXT} {DATA} --stage sentences --order random", "order .*'random'"),
    "contexts": (
        f'run_pretraining {INSNEXT} {DATA} --stage sentences --contexts {{{{"word":1}}}}',
        "a key of contexts must be one of",
    ),
    "block": (
        f"run_pretraining {INSNEXT} {DATA} --stage sentences --block_size 5000",
        "block_size must be at most max_position_embeddings=64, got 5000",
    ),
    "head rate of DRT": (
        f"run_pretraining {DRT} {DATA} --head_learning_rate 1",
        "head_learning_rate shape insertion sequences, which DRT does not write",
    ),
    "head rate": (
        f"run_pretraining {INSNEXT} {DATA} --stage sentences --head_learning_rate 0",
        "head_learning_rate must be finite and above 0, got 0",
    ),
    "alignment alone": (
        f"run_pretraining {INSNEXT} {DATA} --stage sentences --alignment_weight 1",
        "alignment_weight needs an adapter",
    ),
    "sampling of a schedule": (
        f"run_finetuning {INSNEXT} {DATA} --task infilling --left_to_right_share 0.5 0.1 "
        "--train_sampling_strategy group_by_length",
        "train_sampling_strategy must be random where left_to_right_share changes, got group_by_length",
    ),
    "epochs of a schedule": (
        f"run_pretraining {INSNEXT} {DATA} --stage sentences --left_to_right_share 0.5 0.1 --save_strategy epoch",
        "save_strategy must be no or steps where left_to_right_share changes, got epoch",
    ),
    "shares": (
        f"run_pretraining {INSNEXT} {DATA} --stage sentences --left_to_right_share 0.5 1.5",
        "left_to_right_share must be one or two shares",
    ),
    "column": (f"run_pretraining {DRT} {DATA} --text_column body", "must have the columns .*body"),
    "task": (f"{FINETUNE} --task summary", "task must be one of .*'summary'"),
    "task of DRT": (f"run_finetuning {DRT} {DATA} --task infilling", "task infilling needs model type insnext"),
    "column of a task": (f"{FINETUNE} --task infilling --prompt_column a", "prompt_column is not for task infilling"),
    "adapter": (f"{FINETUNE} --task infilling --adapter qlora", "adapter must be one of .*'qlora'"),
    "rank alone": (f"{FINETUNE} --task infilling --lora_r 4", "lora_r need adapter lora or dora"),
    "rank": (f"{FINETUNE} --task infilling --adapter lora --lora_r 0", "lora_r must be at least 1, got 0"),
    "keywords": (
        f"{FINETUNE} --task keywords --test_file {{home}}/rows.jsonl --do_predict",
        "do_predict with task keywords needs keywords_column",
    ),
    "three texts": (
        f"run_classification {INSNEXT} {DATA} --text_columns a b c",
        "text_columns must be one column or two",
    ),
    "one class": (
        f"run_classification {INSNEXT} {DATA} --text_columns text --label_column same",
        "at least two classes",
    ),
    "no class": (f"run_classification {INSNEXT} {DATA} --text_columns text --label_column real", "integers or names"),
    "DRT chooses": (f"run_multiple_choice {DRT} {DATA}", "drt has no multiple-choice head.*run_scoring"),
    "gold": (f"run_multiple_choice {INSNEXT} {DATA} --choices_column few", "gold must be in 0..1, got 2 in row 0"),
    "choices in a string": (
        f"run_multiple_choice {INSNEXT} {DATA} --choices_column text",
        "text must be a list of texts, got 'a' in row 0",
    ),
    "gold between two": (
        f"run_multiple_choice {INSNEXT} {DATA} --gold_column real",
        "real must be an integer, got 0.5 in row 0",
    ),
    "no choices": (f"run_multiple_choice {INSNEXT} {DATA} --choices_column none", "got None for 'none' in row 1"),
    "no text": (f"run_pretraining {DRT} {DATA} --text_column none", "got None for 'none' in row 1"),
    "no sentence": (
        f"run_classification {INSNEXT} {DATA} --text_columns none --label_column gold",
        "got None for 'none' in row 1",
    ),
    "no label": (
        f"run_classification {INSNEXT} {DATA} --text_columns text --label_column none",
        "got None for 'none' in row 1",
    ),
    "numbers as texts": (f"run_pretraining {DRT} {DATA} --text_column gold", "must have texts in 'gold', got int64"),
    "no arguments": ("run_pretraining {home}/none.yaml", "a file of arguments must be there, got .*none.yaml"),
    "no checkpoint": (
        f"run_pretraining {DRT} {DATA} --resume_from_checkpoint true",
        "resume_from_checkpoint true needs a checkpoint in output_dir",
    ),
    "no blank": (f"run_multiple_choice {INSNEXT} {DATA} --blank @", "blank '@' must stand once in the question"),
    "stride": (f"{SCORE} --max_length 8 --stride 8", "stride must be in 1..7, got 8"),
    "length": (f"{SCORE} --max_length 65", "max_length must be in 2..64, got 65"),
    "orders": (
        f"run_scoring {DRT} --data_file {{home}}/rows.jsonl --num_orders 2",
        "num_orders needs model type insnext, got 'drt'",
    ),
    "blank": (f"{SCORE} --task perplexity --blank _", "blank is for multiple_choice"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with configurations, a tokenizer and rows; there is no model in it, so nothing can begin."""
    folder = tmp_path_factory.mktemp("arguments")
    for name, config in (
        ("insnext", InsNextConfig(vocab_size=320, max_position_embeddings=64)),
        ("drt", DrtConfig(vocab_size=320)),
    ):
        config.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    row = {
        "text": "a",
        "query": "the",
        "choices": ["a", "b", "c"],
        "few": ["a", "b"],
        "gold": 2,
        "same": 1,
        "real": 0.5,
    }
    rows = [{**row, "none": "a"}, {**row, "none": None}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_before_a_model_is_loaded(case, home, tmp_path):
    line, message = BAD[case]
    script, *given = line.format(home=home).split(" ")
    module = importlib.import_module(script)
    where = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--cache_dir", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match=message):
        module.main([*given, *where])


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_file_of_arguments_means_what_flags_mean(suffix, home, tmp_path):
    arguments = importlib.import_module("common.arguments")
    given = {
        "model_type": "insnext",
        "tokenizer_name": "x",
        "config_overrides": {"hidden_size": 8},
        "train_file": str(home / "rows.jsonl"),
        "order": {"uniform": 1.0},
        "context_step_weight": None,
        "lora_target_modules": ["q_proj", "v_proj"],
        "adapter": "lora",
        "output_dir": str(tmp_path),
        "max_steps": 5,
        "use_cpu": True,
    }
    text = json.dumps(given) if suffix == ".json" else yaml.safe_dump(given)
    # YAML reads 3e-3 as a string
    text = text[:-1] + ', "learning_rate": 3e-3}' if suffix == ".json" else f"{text}learning_rate: 3e-3\n"
    path = tmp_path / f"arguments{suffix}"
    path.write_text(text)
    names = ("ModelArguments", "DataArguments", "InsertionArguments", "AdapterArguments")
    classes = [*(getattr(arguments, name) for name in names), TrainingArguments]
    model, data, insertion, adapter, training = arguments.parse(*classes, args=[str(path), "--max_steps", "2"])
    assert json.loads(model.config_overrides) == {"hidden_size": 8} and insertion.order_spec == {"uniform": 1.0}
    assert insertion.context_step_weight is None and adapter.lora_target_modules == ["q_proj", "v_proj"]
    assert (training.learning_rate, training.max_steps, training.use_cpu) == (3e-3, 2, True)
    path.write_text("[]")
    with pytest.raises(ValueError, match="a file of arguments must hold an object, got list"):
        arguments.parse(*classes, args=[str(path)])


SCRIPTS = ("run_pretraining", "run_finetuning", "run_classification", "run_multiple_choice", "run_scoring")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_script_s_own_arguments_first_and_alone(script, capsys):
    module, shown = importlib.import_module(script), {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as ended:
            module.main([flag])
        assert ended.value.code == 0
        shown[flag] = capsys.readouterr().out
    text = shown["--help"]
    own = {"run_pretraining": "--stage", "run_finetuning": "--task", "run_classification": "--text_columns"}
    first = own.get(script, "--query_column" if script == "run_multiple_choice" else "--data_file")
    assert module.__doc__.split("\n")[0] in text and "\\\n" in text
    assert text.index(f"{first} ") < text.index("--model_name_or_path MODEL")
    assert "--warmup_steps" not in text and len(text) < 12_000
    # control: all of them
    assert ("--warmup_steps" in shown["--help_all"]) == (script != "run_scoring")


def test_a_bare_no_in_yaml_is_the_word(home, tmp_path):
    arguments, path = importlib.import_module("common.arguments"), tmp_path / "arguments.yaml"
    path.write_text(f"output_dir: {tmp_path}\nsave_strategy: no\neval_strategy: no\nuse_cpu: true\ndo_train: yes\n")
    (training,) = arguments.parse(TrainingArguments, args=[str(path)])
    assert (training.save_strategy, training.eval_strategy) == ("no", "no")
    assert training.use_cpu is True and training.do_train is True
    # control: plain YAML 1.1 reads false, which no strategy is
    assert yaml.safe_load(path.read_text())["save_strategy"] is False


def test_a_text_that_spells_a_special_token_means_its_letters():
    tokenizer, text = word_tokenizer(), "the <pad> cat </s> sees"
    assert {0, 2} <= set(tokenizer(text)["input_ids"])
    pretraining, classification, choice = map(
        importlib.import_module, ("run_pretraining", "run_classification", "run_multiple_choice")
    )
    made = pretraining.insertion_texts(tokenizer, "text", "documents", 64)({"text": [text]})["input_ids"]
    made += [ids[:-1] for ids in pretraining.joined_rows(tokenizer, "text", 8)({"text": [text]})["input_ids"]]
    made += classification.encode(classification.ClassificationArguments(["a"]), tokenizer, {"a": [text]})
    row = {"query": [text], "choices": [[text, text]], "gold": [0]}
    examples = choice.examples(choice.MultipleChoiceArguments(), tokenizer, 2)(row, [0])
    assert examples["length"] == [max(map(len, examples["choice_ids"][0]))]
    made += examples["choice_ids"][0]
    assert len(made) > 4 and not any({0, 2} & set(ids) for ids in made)
    pair = classification.ClassificationArguments(["a", "b"])
    (ids,) = classification.encode(pair, tokenizer, {"a": [text], "b": [text]})
    assert ids.count(2) == 1 and 0 not in ids


def test_matthews_is_the_correlation_of_two_classes_and_knows_more():
    matthews = importlib.import_module("run_classification").matthews
    dice = np.random.default_rng(0)
    truths = dice.integers(2, size=200)
    guesses = np.where(dice.random(200) < 0.7, truths, 1 - truths)
    assert abs(matthews(guesses, truths) - np.corrcoef(guesses, truths)[0, 1]) < 1e-12
    assert matthews(truths, truths) == 1 and matthews(1 - truths, truths) == pytest.approx(-1)
    assert matthews(np.zeros(200, dtype=int), truths) == 0
    three = dice.integers(3, size=300)
    assert matthews(three, three) == pytest.approx(1) and abs(matthews(dice.permutation(three), three)) < 0.2


def test_a_pair_keeps_both_texts_where_it_is_cut():
    module, tokenizer = importlib.import_module("run_classification"), word_tokenizer()
    args = module.ClassificationArguments(text_columns=["a", "b"], max_length=9)
    long, short = "the old man sees the big dog and the cat", "a cat"
    for first, second in ((long, short), (short, long), (long, long), (short, short)):
        (ids,) = module.encode(args, tokenizer, {"a": [first], "b": [second]})
        left, right = (tokenizer(text)["input_ids"][1 - front :] for text, front in ((first, 1), (second, 0)))
        cut = ids.index(tokenizer.eos_token_id)
        assert len(ids) == min(9, len(left) + 1 + len(right))
        assert ids[:cut] == left[:cut] and ids[cut + 1 :] == right[: len(ids) - cut - 1]
        assert cut > 2 and len(ids) - cut - 1 >= 2


def test_windows_score_every_token_once(tmp_path):
    data = tmp_path / "a.txt"
    data.touch()
    module, tokenizer = importlib.import_module("run_scoring"), word_tokenizer()
    texts = ["the old man " * n for n in (1, 5, 9)]
    for length, stride in ((8, 3), (5, 4), (64, 1)):
        args = module.ScoringArguments(data_file=str(data), max_length=length, stride=stride)
        items = list(module.windows(args, tokenizer, {"text": texts}))
        for row, text in enumerate(texts):
            mine = [item for item in items if item.facts["row"] == row]
            scored = [token for item in mine for token, given in zip(item.ids, item.given, strict=True) if not given]
            assert scored == tokenizer(text)["input_ids"][1:]
            assert all(len(item.ids) <= length and item.ids[0] == tokenizer.bos_token_id for item in mine)
            assert sum(item.facts["bytes"] for item in mine) == len(text)
