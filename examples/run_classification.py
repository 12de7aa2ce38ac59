"""Classify sentences or pairs of sentences, as in GLUE, with InsNeXt or DRT, whole or through LoRA.

    python examples/run_classification.py --model_name_or_path examples/checkpoints/insnext-mini \
        --train_file nlu/sst2_train.jsonl.gz --validation_file nlu/sst2_dev.jsonl --text_columns sentence \
        --do_train --do_eval --output_dir runs/sst2
    python examples/run_classification.py --model_name_or_path MODEL --adapter lora \
        --train_file nlu/rte_train.jsonl.gz --validation_file nlu/rte_validation.jsonl.gz \
        --text_columns sentence1 sentence2 --do_train --do_eval --output_dir runs/rte
    python examples/run_classification.py --model_name_or_path MODEL --dataset_name nyu-mll/glue \
        --dataset_config_name cola --text_columns sentence --do_train --do_eval --output_dir runs/cola

The classes are those of the training data, or of the checkpoint if nothing is trained. A pair is one text with the
separator of the tokenizer, or else EOS, in between. Reported are the loss, the accuracy with its Wilson interval, and
Matthews' correlation. --do_predict writes predictions.jsonl. Without --model_name_or_path, --model_type or
--config_name trains the same shape from random weights. Interrupted, the same command goes on from the last complete
checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from arguments import AdapterArguments, DataArguments, ModelArguments, parse
from common import (
    add_adapter,
    load_config,
    load_model,
    load_splits,
    load_tokenizer,
    mapped,
    split_of,
    start,
    train_and_evaluate,
    wanted_examples,
    without_eos,
    write_lines,
)
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from modeling_insnext.data import wilson_interval


@dataclass
class ClassificationArguments:
    text_columns: list[str] = field(default_factory=lambda: ["sentence"], metadata={"help": "One column or two."})
    label_column: str = field(default="label", metadata={"help": "Integers or names of classes."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a text; what is longer is cut."})

    def __post_init__(self):
        if len(self.text_columns) not in (1, 2):
            raise ValueError(f"text_columns must be one column or two, got {self.text_columns}")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")


def classes_of(args: ClassificationArguments, training, splits, config) -> list[str]:
    """Return the names of the classes, in the order of the logits.

    Raises:
        ValueError: If a label is neither an integer nor a name, or there are fewer than two classes.
    """
    if not training.do_train:
        return [config.id2label[index] for index in range(config.num_labels)]
    rows = split_of(splits, "train", [*args.text_columns, args.label_column])
    feature = rows.features[args.label_column]
    if hasattr(feature, "names"):
        return list(feature.names)
    labels = sorted(rows.unique(args.label_column))
    wrong = [label for label in labels if not isinstance(label, (int, str))]
    if wrong or len(labels) < 2:
        raise ValueError(f"{args.label_column} must hold integers or names of at least two classes, got {labels[:5]}")
    return [str(label) for label in labels]


def encode(args: ClassificationArguments, tokenizer, batch) -> list[list[int]]:
    """Return the tokens of each row: one text, or two with the separator in between."""
    first = tokenizer(batch[args.text_columns[0]])["input_ids"]
    if len(args.text_columns) == 1:
        return [ids[: args.max_length] for ids in first]
    separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    separator = [] if separator is None else [separator]
    second = tokenizer(batch[args.text_columns[1]], add_special_tokens=False)["input_ids"]
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

    def number(label) -> int:
        name = names[label] if names is not None and isinstance(label, int) else str(label)
        if name not in classes:
            raise ValueError(f"{args.label_column} must be one of {classes}, got {label!r}")
        return classes.index(name)

    def make(batch):
        made = {"input_ids": encode(args, tokenizer, batch)}
        if classes is not None:
            made["labels"] = [number(label) for label in batch[args.label_column]]
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


def main(args: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the metrics of the evaluation."""
    model_args, data, classification, adapter, training = parse(
        ModelArguments, DataArguments, ClassificationArguments, AdapterArguments, TrainingArguments, args=args
    )
    data.check_splits(training)
    tokenizer = load_tokenizer(model_args)
    config = load_config(model_args, tokenizer)
    start(training)
    splits = load_splits(data, model_args)
    classes = classes_of(classification, training, splits, config)
    config.id2label, config.label2id = dict(enumerate(classes)), {name: index for index, name in enumerate(classes)}
    columns = [*classification.text_columns, classification.label_column]
    feature = next(iter(splits.values())).features.get(classification.label_column)
    tests = split_of(splits, "test", classification.text_columns) if training.do_predict else None
    make = examples(classification, tokenizer, classes, feature)
    rows = wanted_examples(splits, columns, make, data, training)
    model = add_adapter(load_model(AutoModelForSequenceClassification, model_args, config), adapter, "SEQ_CLS")
    trainer = Trainer(
        model=model,
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
