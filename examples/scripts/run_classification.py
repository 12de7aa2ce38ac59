r"""Classify sentences or pairs of sentences, as in GLUE, with InsNeXt or DRT, whole or through LoRA.

    python examples/scripts/run_classification.py --model_name_or_path examples/checkpoints/insnext-mini \
        --train_file nlu/sst2_train.jsonl.gz --validation_file nlu/sst2_dev.jsonl --text_columns sentence \
        --do_train --do_eval --output_dir runs/sst2
    python examples/scripts/run_classification.py --model_name_or_path MODEL --adapter lora \
        --train_file nlu/rte_train.jsonl.gz --validation_file nlu/rte_validation.jsonl.gz \
        --text_columns sentence1 sentence2 --do_train --do_eval --output_dir runs/rte
    python examples/scripts/run_classification.py --model_name_or_path MODEL --dataset_name nyu-mll/glue \
        --dataset_config_name cola --text_columns sentence --do_train --do_eval --output_dir runs/cola

The classes are those of the training data, in the checkpoint's order if it has the same ones; a checkpoint of other
classes gets a new head. If nothing is trained they are the checkpoint's. With --adapter they are written beside the
adapter, to id2label.json, where --adapter_name_or_path finds them. A pair is one text with the separator of the
tokenizer, or else EOS, in between. Reported are the loss, the accuracy with its Wilson interval, and Matthews'
correlation. --do_predict writes predictions.jsonl. Without --model_name_or_path, --model_type or --config_name trains
the same shape from random weights. Interrupted, the same command goes on from the last complete checkpoint.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common.arguments import AdapterArguments, DataArguments, ModelArguments, parse
from common.data import check_texts, load_splits, mapped, split_of, wanted_examples, without_eos
from common.models import add_adapter, load_config, load_model, load_tokenizer
from common.training import note_arguments, start, train_and_evaluate, write_lines
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments
from transformers.utils import CONFIG_NAME, cached_file

from modeling_insnext.runs import write_atomically
from modeling_insnext.tasks import wilson_interval
from modeling_insnext.trainers import FiniteTrainer


CLASS_NAMES = "id2label.json"

logger = logging.getLogger(__name__)


@dataclass
class ClassificationArguments:
    _argument_group_name = "classification"

    text_columns: list[str] = field(default_factory=lambda: ["sentence"], metadata={"help": "One column or two."})
    label_column: str = field(default="label", metadata={"help": "Integers or names of classes."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a text; what is longer is cut."})

    def __post_init__(self):
        if len(self.text_columns) not in (1, 2):
            raise ValueError(f"text_columns must be one column or two, got {self.text_columns}")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")


class ClassificationTrainer(FiniteTrainer):
    """`FiniteTrainer` that writes the names of the classes beside an adapter: PEFT has no place for them."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save and hasattr(self.model, "peft_config"):
            path = Path(output_dir or self.args.output_dir) / CLASS_NAMES
            write_atomically(path, json.dumps(self.model.config.id2label, ensure_ascii=False))


def saved_classes(folder: str | None, cache_dir: str | None) -> list[str] | None:
    """Return the names of the classes that a checkpoint or an adapter was trained on, if it says them."""
    options = {"cache_dir": cache_dir, "_raise_exceptions_for_missing_entries": False}
    paths = [] if folder is None else [cached_file(folder, name, **options) for name in (CLASS_NAMES, CONFIG_NAME)]
    for path in filter(None, paths):
        read = json.loads(Path(path).read_text(encoding="utf-8"))
        names = read if Path(path).name == CLASS_NAMES else read.get("id2label")
        if names is not None:
            return [names[index] for index in sorted(names, key=int)]
    return None


def unnamed(classes: list[str]) -> bool:
    return all(name == f"LABEL_{index}" for index, name in enumerate(classes))


def trained_classes(args: ClassificationArguments, splits) -> list[str]:
    """Return the names of the classes of the training data.

    Raises:
        ValueError: If a label is neither an integer nor a name, or there are fewer than two classes.
    """
    rows = split_of(splits, "train", [*args.text_columns, args.label_column])
    feature = rows.features[args.label_column]
    if hasattr(feature, "names"):
        return list(feature.names)
    labels = sorted(rows.unique(args.label_column))
    wrong = [label for label in labels if not isinstance(label, (int, str))]
    if wrong or len(labels) < 2:
        raise ValueError(f"{args.label_column} must hold integers or names of at least two classes, got {labels[:5]}")
    return [str(label) for label in labels]


def classes_of(args: ClassificationArguments, adapter, training, splits, model_args, config) -> tuple[list[str], bool]:
    """Return the names of the classes in the order of the logits, and whether the checkpoint's head is for others.

    Raises:
        ValueError: If the checkpoint or the adapter to go on from was trained on other classes than the data has.
    """
    source = training.resume_from_checkpoint or adapter.adapter_name_or_path
    saved = saved_classes(source, model_args.cache_dir)
    known = saved or [config.id2label[index] for index in range(config.num_labels)]
    if not training.do_train:
        return known, False
    classes = trained_classes(args, splits)
    if set(classes) == set(known):
        return known, False
    if saved is not None:
        raise ValueError(f"{source} was trained on the classes {saved}, the data must have the same, got {classes}")
    return classes, model_args.model_name_or_path is not None and not unnamed(known)


def encode(args: ClassificationArguments, tokenizer, batch) -> list[list[int]]:
    """Return the tokens of each row: one text, or two with the separator in between."""
    # a text may spell a special token: it means its letters
    first = tokenizer(batch[args.text_columns[0]], split_special_tokens=True)["input_ids"]
    if len(args.text_columns) == 1:
        return [ids[: args.max_length] for ids in first]
    separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    separator = [] if separator is None else [separator]
    second = tokenizer(batch[args.text_columns[1]], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    room, pairs = args.max_length - len(separator), []
    for left, right in zip(first, second, strict=True):
        left = without_eos(tokenizer, left)
        # the longer text gives way, down to the length of the other
        kept = min(len(left), max(room - len(right), room - room // 2))
        pairs.append(left[:kept] + separator + right[: room - kept])
    return pairs


def examples(args: ClassificationArguments, tokenizer, classes: list[str] | None, feature):
    """Return the function that tokenises a batch, and with `classes` numbers its labels."""
    names = getattr(feature, "names", None)

    def number(label, row: int) -> int:
        if names is None:
            name = str(label)
        else:
            # -1 is how a `ClassLabel` says that a row has none
            name = names[label] if 0 <= label < len(names) else None
        unnamed_class = f"LABEL_{label}"
        if name not in classes and unnamed_class not in classes:
            raise ValueError(f"{args.label_column} must be one of {classes}, got {label!r} in row {row}")
        return classes.index(name if name in classes else unnamed_class)

    def make(batch, rows):
        made = {"input_ids": encode(args, tokenizer, batch)}
        if classes is not None:
            made["labels"] = [number(*pair) for pair in zip(batch[args.label_column], rows, strict=True)]
        return made

    return make


def matthews(guesses: np.ndarray, truths: np.ndarray) -> float:
    """Return Matthews' correlation of any number of classes (Gorodkin 2004), 0 where one side is constant.

    With counts c of agreements, s of rows, g_k of guesses and t_k of truths of class k:
    (c s - sum_k g_k t_k) / sqrt((s^2 - sum_k g_k^2) (s^2 - sum_k t_k^2)).
    """
    classes = np.unique(np.concatenate([guesses, truths]))
    g, t = ((classes == labels[:, None]).sum(0).astype(float) for labels in (guesses, truths))
    s, c = float(len(truths)), float((guesses == truths).sum())
    spread = (s * s - g @ g) * (s * s - t @ t)
    return float((c * s - g @ t) / spread**0.5) if spread > 0 else 0.0


def measure(prediction) -> dict[str, float]:
    """Return accuracy, its 95 % Wilson interval and Matthews' correlation."""
    guesses, truths = prediction.predictions.argmax(-1), prediction.label_ids
    low, high = wilson_interval(int((guesses == truths).sum()), len(truths))
    return {
        "accuracy": float((guesses == truths).mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "matthews": matthews(guesses, truths),
    }


def predict(trainer, args: ClassificationArguments, tokenizer, rows, classes: list[str], data) -> None:
    """Write the rows, each with the class that the model gives it."""
    made = mapped(rows, examples(args, tokenizer, None, None), data, trainer.args)
    guesses = trainer.predict(made).predictions.argmax(-1)
    if trainer.is_world_process_zero():
        written = [{**row, "prediction": classes[guess]} for row, guess in zip(rows, guesses, strict=True)]
        write_lines(Path(trainer.args.output_dir) / "predictions.jsonl", written)


def make_model(args: ModelArguments, adapter: AdapterArguments, config, new_head: bool):
    """Return the model with a head for the classes of the configuration, under its adapter if there is one."""
    model = load_model(AutoModelForSequenceClassification, args, config, ignore_mismatched_sizes=True)
    if new_head:
        logger.warning("%s has a head for other classes: a new one is made", args.model_name_or_path)
        model.score.reset_parameters()
    return add_adapter(model, adapter, "SEQ_CLS")


def main(args: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the metrics of the evaluation."""
    model_args, data, classification, adapter, training = parse(
        ModelArguments,
        DataArguments,
        ClassificationArguments,
        AdapterArguments,
        TrainingArguments,
        args=args,
        description=__doc__,
    )
    data.check_splits(training)
    tokenizer = load_tokenizer(model_args)
    config = load_config(model_args, tokenizer)
    start(training)
    splits = load_splits(data, model_args)
    check_texts(splits, classification.text_columns)
    classes, new_head = classes_of(classification, adapter, training, splits, model_args, config)
    config.id2label, config.label2id = dict(enumerate(classes)), {name: index for index, name in enumerate(classes)}
    columns = [*classification.text_columns, classification.label_column]
    feature = next(iter(splits.values())).features.get(classification.label_column)
    tests = split_of(splits, "test", classification.text_columns) if training.do_predict else None
    make = examples(classification, tokenizer, classes, feature)
    rows = wanted_examples(splits, columns, make, data, training)
    note_arguments(training, model_args, data, classification, adapter)
    trainer = ClassificationTrainer(
        model=make_model(model_args, adapter, config, new_head),
        args=training,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=measure,
        **rows,
    )
    metrics = train_and_evaluate(trainer)
    if tests is not None:
        predict(trainer, classification, tokenizer, tests, classes, data)
    return metrics


if __name__ == "__main__":
    main()
