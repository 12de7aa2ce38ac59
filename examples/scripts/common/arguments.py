"""The arguments that the run_*.py scripts of this folder share, checked before any work."""

import json
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from modeling_insnext.data import ContextMixture, get_mixture


MODEL_TYPES = ("insnext", "drt")
ADAPTERS = ("none", "lora", "dora")
DTYPES = ("float32", "bfloat16", "float16")
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    pass


class CoreYaml(yaml.SafeLoader):
    """YAML whose booleans are true and false alone, as in YAML 1.2: a bare `no` is the word that options know."""


CoreYaml.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
CoreYaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


def parse(*classes, args: list[str] | None = None, description: str | None = None) -> tuple:
    """Return one object a class, from the command line; a .json or .yaml file in front gives what flags leave out.

    `--help` shows the description and the arguments of the script, `--help_all` those of `TrainingArguments` too.
    """
    args = sys.argv[1:] if args is None else args
    if {"-h", "--help", "--help_all"} & set(args):
        print_help(classes, description, everything="--help_all" in args)
        raise SystemExit(0)
    if args and args[0].endswith((".json", ".yaml", ".yml")):
        args = [*flags_of(Path(args[0])), *args[1:]]
    return HfArgumentParser(classes).parse_args_into_dataclasses(args)


def print_help(classes, description: str | None, everything: bool) -> None:
    """Print what a script is for and its arguments, a group for each class; those of the script itself come first."""
    ours = sorted((one for one in classes if one is not TrainingArguments), key=lambda one: one.__module__ == __name__)
    epilog = None if everything else "All arguments of transformers.TrainingArguments too; --help_all shows them."
    HfArgumentParser(
        [*ours, *(TrainingArguments for _ in classes[len(ours) :] if everything)],
        usage="%(prog)s [FILE.json | FILE.yaml] [--ARGUMENT VALUE ...]",
        description=description,
        epilog=epilog if len(classes) > len(ours) else None,
        formatter_class=Help,
    ).print_help()


def flags_of(path: Path) -> list[str]:
    """Return the arguments of a file as they would stand on the command line; null is the default.

    Raises:
        ValueError: If there is no such file, or it holds something else than an object.
    """
    if not path.is_file():
        raise ValueError(f"a file of arguments must be there, got {str(path)!r}")
    text = path.read_text(encoding="utf-8")
    given = json.loads(text) if path.suffix == ".json" else yaml.load(text, CoreYaml)
    if not isinstance(given, dict):
        raise ValueError(f"a file of arguments must hold an object, got {type(given).__name__} in {str(path)!r}")
    flags = []
    for name, value in given.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return flags


def json_object(name: str, text: str) -> dict:
    """Return the object that an argument holds as JSON.

    Raises:
        ValueError: If it is no JSON object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {text!r}")
    return value


def data_format(name: str, path: str) -> str:
    """Return how `datasets` calls the format of a file, compressed or not.

    Raises:
        ValueError: If the suffix is of no known format or there is no such file.
    """
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix not in FORMATS:
        raise ValueError(f"{name} must end with one of {sorted(FORMATS)}, .gz behind it or not, got {path!r}")
    if not Path(path).is_file():
        raise ValueError(f"{name} must be a file, got {path!r}")
    return FORMATS[suffix]


def check_choice(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {sorted(choices)}, got {value!r}")


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from, a folder or a Hub id; without it a new model."}
    )
    model_type: str | None = field(default=None, metadata={"help": "insnext or drt: what a new model is."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a new model, folder or Hub id."})
    preset: str | None = field(default=None, metadata={"help": "Published size of a new model of --model_type."})
    config_overrides: str | None = field(default=None, metadata={"help": "Fields of a new model's config, JSON."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the checkpoint's."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data go."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code beside a checkpoint, where no installed class serves it."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or float16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flex_attention, ..."})

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        if self.model_type is not None:
            check_choice("model_type", self.model_type, MODEL_TYPES)
        sources = {name: getattr(self, name) for name in ("model_name_or_path", "config_name", "model_type")}
        if sum(value is not None for value in sources.values()) != 1:
            raise ValueError(f"exactly one of {', '.join(sources)} must be given, got {sources}")
        if self.preset is not None and self.model_type is None:
            raise ValueError(f"preset needs model_type, got preset={self.preset!r}")
        if self.config_overrides is not None:
            if self.model_name_or_path is not None:
                raise ValueError("config_overrides are for new models, got model_name_or_path too")
            json_object("config_overrides", self.config_overrides)
        if self.tokenizer_name is None and self.model_name_or_path is None and self.config_name is None:
            raise ValueError("a new model needs tokenizer_name, got None")


@dataclass
class DataArguments:
    _argument_group_name = "data"

    train_file: str | None = field(default=None, metadata={"help": "json, jsonl, csv or txt, .gz behind it or not."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise, for --do_eval."})
    test_file: str | None = field(default=None, metadata={"help": "Likewise, for --do_predict."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, instead of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Rows of the training data to use."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Rows to evaluate on, or to predict."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise anew what was tokenised before."})

    def __post_init__(self):
        if self.dataset_name is not None and self.files:
            raise ValueError(f"give dataset_name or files, not both, got {self.dataset_name!r} and {self.files}")
        if self.dataset_name is None and not self.files:
            raise ValueError("there must be data: give train_file, validation_file, test_file or dataset_name")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError(f"dataset_config_name needs dataset_name, got {self.dataset_config_name!r}")
        for split, path in self.files.items():
            data_format(f"{split}_file", path)
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def files(self) -> dict[str, str]:
        splits = ("train", "validation", "test")
        return {split: path for split in splits if (path := getattr(self, f"{split}_file")) is not None}

    def check_splits(self, training) -> None:
        """Raise a `ValueError` if a step is asked for whose file is missing, or if there is nothing to do."""
        if not (training.do_train or training.do_eval or training.do_predict):
            raise ValueError("there must be something to do: --do_train, --do_eval or --do_predict")
        for step, split in (("do_train", "train"), ("do_eval", "validation"), ("do_predict", "test")):
            if getattr(training, step) and self.dataset_name is None and split not in self.files:
                raise ValueError(f"{step} needs {split}_file or dataset_name, got neither")


@dataclass
class AdapterArguments:
    _argument_group_name = "adapter"

    adapter: str = field(default="none", metadata={"help": "none (train everything), lora or dora."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "A saved adapter to go on with."})
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale times rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt, or all-linear; by default those that PEFT has for the type."}
    )

    def __post_init__(self):
        check_choice("adapter", self.adapter, ADAPTERS)
        if self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1, got {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.adapter != "none" and self.adapter_name_or_path is not None:
            raise ValueError(f"adapter makes a new one, got {self.adapter!r} and {self.adapter_name_or_path!r}")
        changed = [name for name, f in type(self).__dataclass_fields__.items() if getattr(self, name) != f.default]
        changed = [name for name in changed if name.startswith("lora_")]
        if self.adapter == "none" and changed:
            raise ValueError(f"{', '.join(changed)} need adapter lora or dora, got none")


@dataclass
class ChoiceArguments:
    _argument_group_name = "choices"

    query_column: str = field(default="query", metadata={"help": "Questions."})
    choices_column: str = field(default="choices", metadata={"help": "Lists of answers."})
    gold_column: str = field(default="gold", metadata={"help": "Index of the right answer."})
    blank: str | None = field(default=None, metadata={"help": "Mark in the question that the answer replaces."})

    def __post_init__(self):
        if self.blank is not None and not self.blank.strip():
            raise ValueError(f"blank must be a mark that is not blank, got {self.blank!r}")

    @property
    def columns(self) -> list[str]:
        return [self.query_column, self.choices_column, self.gold_column]

    def check_row(self, query: str, choices: list[str], gold: int | str, number: int) -> None:
        """Raise a `ValueError` that names the row by its number if it cannot be asked."""
        row = f"row {number}, {query!r}"
        if not isinstance(query, str):
            raise ValueError(f"{self.query_column} must be a text, got {type(query).__name__} in {row}")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"{self.choices_column} must be a list of texts, got {choices!r} in {row}")
        if len(choices) < 2:
            raise ValueError(f"there must be at least two choices, got {choices} in {row}")
        whole = gold.isdecimal() if isinstance(gold, str) else isinstance(gold, int) and not isinstance(gold, bool)
        if not whole:
            raise ValueError(f"{self.gold_column} must be an integer, got {gold!r} in {row}")
        if not 0 <= int(gold) < len(choices):
            raise ValueError(f"{self.gold_column} must be in 0..{len(choices) - 1}, got {gold} in {row}")
        if self.blank is not None and query.count(self.blank) != 1:
            raise ValueError(f"blank {self.blank!r} must stand once in the question, got {row}")

    def text_of(self, query: str, choice: str) -> tuple[str, str, str]:
        """Return what stands before the answer, the answer, and what stands behind it."""
        if self.blank is None:
            return query.rstrip(), f" {choice}", ""
        before, after = query.split(self.blank)
        # a space belongs to the word behind it, as in most vocabularies
        front = before.rstrip()
        return front, before[len(front) :] + choice, after


# of the slot head; what says the token in a slot begins as the source of a converted model has it
CHOOSES_SLOTS = ("query_proj", "key_proj", "stop_key", "edge")


@dataclass
class InsertionArguments:
    """How texts become insertion sequences; InsNeXt only. `None` is the script's default."""

    _argument_group_name = "insertion sequences, InsNeXt only"

    order: str | None = field(default=None, metadata={"help": "Name of an insertion order, or a JSON mixture."})
    contexts: str | None = field(default=None, metadata={"help": "Shares of ContextMixture, JSON."})
    left_to_right_share: list[float] | None = field(
        default=None,
        metadata={"help": "Share of texts plainly left to right; two: at the beginning and at the end of training."},
    )
    context_step_weight: float | None = field(default=None, metadata={"help": "Weight of the step after a context."})
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Of what chooses slots, in the place of --learning_rate; the slot head is then trained whole "
            "under a new adapter, too."
        },
    )

    def __post_init__(self):
        get_mixture(self.order_spec)
        if self.contexts is not None:
            shares, known = json_object("contexts", self.contexts), ContextMixture.__dataclass_fields__
            for name in shares:
                check_choice("a key of contexts", name, known)
            ContextMixture(**shares)
        shares = self.left_to_right_share
        if shares is not None and not (len(shares) in (1, 2) and all(0 <= share <= 1 for share in shares)):
            raise ValueError(f"left_to_right_share must be one or two shares in [0, 1], got {shares}")
        weight = self.context_step_weight
        if weight is not None and not 0 <= weight < float("inf"):
            raise ValueError(f"context_step_weight must be finite and at least 0, got {weight}")
        rate = self.head_learning_rate
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"head_learning_rate must be finite and above 0, got {rate}")

    @property
    def learning_rates(self) -> dict[str, float]:
        """Rates of parts of the model that have one of their own."""
        return {} if self.head_learning_rate is None else dict.fromkeys(CHOOSES_SLOTS, self.head_learning_rate)

    @property
    def order_spec(self) -> str | dict:
        if self.order is None:
            return {"gap_left_to_right": 0.75, "left_to_right": 0.1, "uniform": 0.15}
        return json_object("order", self.order) if self.order.startswith("{") else self.order

    @property
    def shares(self) -> tuple[float, float]:
        """Share of texts left to right at the beginning and at the end."""
        given = self.left_to_right_share or [0.0]
        return given[0], given[-1]

    def check_schedule(self, training) -> None:
        """Raise a `ValueError` if a share that changes meets what needs data with a length."""
        if len(set(self.shares)) == 1:
            return
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(training, name) == "epoch":
                raise ValueError(f"{name} must be no or steps where left_to_right_share changes, got epoch")
        if training.train_sampling_strategy != "random":
            given = training.train_sampling_strategy
            raise ValueError(f"train_sampling_strategy must be random where left_to_right_share changes, got {given}")

    def refuse(self, reason: str) -> None:
        """Raise a `ValueError` if anything here was given, which `reason` makes useless."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if given:
            raise ValueError(f"{', '.join(given)} shape insertion sequences, {reason}: got {given}")
