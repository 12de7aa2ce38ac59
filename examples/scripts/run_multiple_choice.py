r"""Fine-tune InsNeXt to choose one of several answers, each read together with the question as one text.

    python examples/scripts/run_multiple_choice.py --model_name_or_path examples/checkpoints/insnext-mini \
        --train_file mcqa/openbookqa_train.jsonl --validation_file mcqa/openbookqa_dev.jsonl \
        --do_train --do_eval --output_dir runs/openbookqa

A row has a question, a list of answers and the index of the right one; all rows must have the same number of answers.
With --blank _ an answer stands in the place of that mark. DRT has no such head: run_scoring.py compares likelihoods
instead, for any language model and without training. Interrupted, the same command goes on from the last complete
checkpoint.
"""

from dataclasses import dataclass

import torch
from common.arguments import AdapterArguments, ChoiceArguments, DataArguments, ModelArguments, parse
from common.data import load_splits, split_of, wanted_examples
from common.models import add_adapter, load_config, load_model, load_tokenizer
from common.training import note_arguments, start, train_and_evaluate
from run_classification import measure
from transformers import AutoModelForMultipleChoice, TrainingArguments

from modeling_insnext.trainers import FiniteTrainer


@dataclass
class MultipleChoiceArguments(ChoiceArguments):
    _argument_group_name = "multiple choice"

    max_length: int = 256

    def __post_init__(self):
        super().__post_init__()
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")


def examples(args: MultipleChoiceArguments, tokenizer, num_choices: int):
    """Return the function that tokenises every answer of a row with its question, the end of the text kept."""

    def make(batch, rows):
        made = {"choice_ids": [], "labels": [], "length": []}
        for row, query, choices, gold in zip(rows, *(batch[column] for column in args.columns), strict=True):
            args.check_row(query, choices, gold, row)
            if len(choices) != num_choices:
                raise ValueError(
                    f"each row must have {num_choices} choices, got {len(choices)} in row {row}: {query!r}"
                )
            texts = ["".join(args.text_of(query, choice)) for choice in choices]
            # a text may spell a special token: it means its letters
            ids = [ids[-args.max_length :] for ids in tokenizer(texts, split_special_tokens=True)["input_ids"]]
            made["choice_ids"].append(ids)
            made["labels"].append(int(gold))
            # what --train_sampling_strategy group_by_length reads
            made["length"].append(max(map(len, ids)))
        return made

    return make


class ChoiceCollator:
    """Pad the choices of all rows to one length: `input_ids` and `attention_mask` [B, C, T], `labels` [B]."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        flat = [ids for feature in features for ids in feature["choice_ids"]]
        batch = self.tokenizer.pad({"input_ids": flat}, return_tensors="pt")
        shaped = {name: tensor.unflatten(0, (len(features), -1)) for name, tensor in batch.items()}
        return {**shaped, "labels": torch.tensor([feature["labels"] for feature in features])}


def main(args: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the metrics of the evaluation."""
    model_args, data, choice, adapter, training = parse(
        ModelArguments,
        DataArguments,
        MultipleChoiceArguments,
        AdapterArguments,
        TrainingArguments,
        args=args,
        description=__doc__,
    )
    data.check_splits(training)
    if training.do_predict:
        raise ValueError("do_predict is for run_finetuning.py and run_classification.py, got True")
    tokenizer = load_tokenizer(model_args)
    config = load_config(model_args, tokenizer)
    if config.model_type == "drt":
        raise ValueError("model type drt has no multiple-choice head: compare likelihoods with run_scoring.py")
    start(training)
    # the collator reads a column that is no argument of the model
    training.remove_unused_columns = False
    splits = load_splits(data, model_args)
    first = split_of(splits, next(iter(splits)), choice.columns)[0]
    choice.check_row(*(first[column] for column in choice.columns), 0)
    make = examples(choice, tokenizer, len(first[choice.choices_column]))
    rows = wanted_examples(splits, choice.columns, make, data, training)
    note_arguments(training, model_args, data, choice, adapter)
    model = add_adapter(load_model(AutoModelForMultipleChoice, model_args, config), adapter, None, ["score"])
    trainer = FiniteTrainer(
        model=model,
        args=training,
        data_collator=ChoiceCollator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=measure,
        **rows,
    )
    return train_and_evaluate(trainer)


if __name__ == "__main__":
    main()
