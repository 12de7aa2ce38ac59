r"""Fine-tune with LoRA, DoRA or whole: writing around keywords, filling gaps, or going on behind a prompt.

    python examples/scripts/run_finetuning.py --task keywords --text_column references --keywords_column concepts \
        --model_name_or_path examples/checkpoints/insnext-mini --adapter lora --learning_rate 3e-3 \
        --train_file commongen/train.jsonl.gz --test_file commongen/dev.jsonl --do_train --do_predict \
        --output_dir runs/commongen
    python examples/scripts/run_finetuning.py --task infilling --model_name_or_path examples/checkpoints/insnext-mini \
        --train_file stories.jsonl --do_train --output_dir runs/infilling
    python examples/scripts/run_finetuning.py --task completion --prompt_column question --completion_column answer \
        --model_name_or_path MODEL --train_file questions.jsonl --do_train --output_dir runs/answers

    task        for       a row of training data                        what --do_predict writes for a row of test data
    keywords    InsNeXt   texts and the words given in them; without    a text around its words
                          --keywords_column rare words of the text
    infilling   InsNeXt   texts, of which one to three spans are        the text with its gaps, ___, filled
                          missing, drawn anew every epoch
    completion  both      a prompt and its completion                   the completion

A column of texts may hold a list of texts a row. Keywords are lists of words and phrases. They are given where they
stand as whole words, inflected or not, whatever their case; the log says how many do not stand in their texts. In
prediction they are the keywords, as they are and in their order. Of what is longer than --max_length the end is cut; a
row of which nothing is left to learn, as its prompt is so long, is left out, and the log says how many are. A text
that spells a special token, as "<pad>", means its letters.

Predictions go to predictions.jsonl in --output_dir, each row with its `prediction`; every row is checked before
anything is trained. `eval_perplexity` (DRT) is per token of the completions, whatever the batches. An adapter is saved
alone: `AutoPeftModelForCausalLM.from_pretrained(output_dir)` loads it with its base. Interrupted, the same command
goes on from the last complete checkpoint.
"""

import logging
from pathlib import Path

import torch
from common.arguments import (
    AdapterArguments,
    DataArguments,
    InsertionArguments,
    ModelArguments,
    json_object,
    parse,
)
from common.data import insertion_collator, load_splits, split_of, wanted_examples
from common.finetuning import FinetuningArguments, check_rows, make_examples, prompt_ids, with_lists
from common.models import add_adapter, load_config, load_model, load_tokenizer
from common.training import note_arguments, scheduled, start, train_and_evaluate, write_lines
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, TrainingArguments

from modeling_insnext import Canvas, build_canvas
from modeling_insnext.insertion_trainer import InsertionTrainer
from modeling_insnext.trainers import TokenMeanTrainer


logger = logging.getLogger(__name__)


def check(args: FinetuningArguments, insertion: InsertionArguments, training, model_type: str) -> None:
    """Raise a `ValueError` if the task is not for the architecture or cannot be predicted."""
    if model_type != "insnext":
        insertion.refuse(f"which model type {model_type} does not write")
        if args.task != "completion":
            raise ValueError(f"task {args.task} needs model type insnext, got {model_type!r}, which writes at the end")
    if training.do_predict and args.task == "keywords" and args.keywords_column is None:
        raise ValueError("do_predict with task keywords needs keywords_column, got None")
    if training.do_predict and training.world_size > 1:
        raise ValueError(f"do_predict needs one process, got {training.world_size}")


def check_tests(args: FinetuningArguments, tokenizer, config, tests) -> None:
    """Raise a `ValueError` that names the row if the model cannot write for a row of the test data."""
    check_rows(args, tests, "test", args.test_columns)
    insnext, room = config.model_type == "insnext", json_object("generation", args.generation).get("max_new_tokens")
    for number, value in enumerate(tests[args.test_columns[0]]):
        try:
            if args.task != "completion":
                canvas = build_canvas(tokenizer, **given_of(args, [value]), vocab_size=config.vocab_size)
            elif ids := prompt_ids(tokenizer, [value])[0]:
                canvas = Canvas.from_ids(torch.tensor([ids]))
            else:
                raise ValueError(f"{args.prompt_column} must have at least one token, got {value!r}")
            if insnext:
                canvas.validate(config.vocab_size, room, config.max_position_embeddings)
        except ValueError as error:
            raise ValueError(f"row {number} of the test data: {error}") from error


def report_losses(rows: dict, splits, args: FinetuningArguments) -> None:
    """Log how many rows and keywords the examples lack."""
    for name, made in rows.items():
        split = {"train_dataset": "train", "eval_dataset": "validation"}[name]
        if "asked" in made.column_names:
            asked = sum(made["asked"])
            logger.info(
                "%s data: %d of %d keywords do not stand in their texts", split, asked - sum(made["found"]), asked
            )
        left_out = len(splits[split]) - len(made)
        if args.task == "completion" and left_out:
            text = "%s data: %d of %d rows are left out: max_length=%d leaves nothing of their completions"
            logger.warning(text, split, left_out, len(splits[split]), args.max_length)


def make_collators(args: FinetuningArguments, insertion: InsertionArguments, tokenizer, rows: dict, training) -> dict:
    """Return the collators of insertion sequences, of training first, of evaluation last."""
    if args.task == "completion" and insertion.order is None:
        insertion.order = "left_to_right"
    options = {"max_length": args.max_length, "truncate": True}
    made = [
        insertion_collator(insertion, tokenizer, texts, args.contexts, training, **options)
        for texts in rows.values() or [[]]
    ]
    return {"data_collator": made[0], "eval_data_collator": made[-1]}


@torch.no_grad()
def write(args: FinetuningArguments, model, tokenizer, given, options: dict) -> list[str]:
    """Return what the model writes for values of the column of test data."""
    model.eval()
    if args.task == "completion":
        return completions(model, tokenizer, given, options)
    out = model.generate(**model.canvas(tokenizer, **given_of(args, given)).to(model.device), **options)
    # a word begins with its space, the first of a text too
    return [text.removeprefix(" ") for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


def predict(args: FinetuningArguments, model, tokenizer, rows, training) -> list[dict]:
    """Return the rows, each with what the model wrote for it."""
    options, size = json_object("generation", args.generation), training.per_device_eval_batch_size
    written, column = [], rows[args.test_columns[0]]
    for first in tqdm(range(0, len(rows), size), desc="Predicting", disable=training.disable_tqdm):
        written += write(args, model, tokenizer, column[first : first + size], options)
    return [{**row, "prediction": text} for row, text in zip(rows, written, strict=True)]


def check_generation(args: FinetuningArguments, model, tokenizer, tests) -> None:
    """Write one token for the first row, so that options which cannot be served are refused before any training.

    Raises:
        ValueError: If `generate` refuses them.
    """

    def stop(input_ids, scores, **kwargs):
        return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)

    options = {**json_object("generation", args.generation), "stopping_criteria": [stop]}
    given = tests[args.test_columns[0]][:1]
    try:
        # what training draws is none of this
        with torch.random.fork_rng(devices=[]):
            write(args, model, tokenizer, given, options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation must hold options of generate, got {args.generation}: {error}") from error


def given_of(args: FinetuningArguments, values) -> dict:
    """Return what a canvas is made of."""
    return {"keywords": [list(words) for words in values]} if args.task == "keywords" else {"text": list(values)}


def completions(model, tokenizer, prompts: list[str], options: dict) -> list[str]:
    """Return what the model writes behind each prompt."""
    ids = prompt_ids(tokenizer, prompts)
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    # texts come back with the padding in front of them
    out = model.generate(**batch, **options)
    rows = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def main(args: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the metrics of the evaluation."""
    model_args, data, finetuning, insertion, adapter, training = parse(
        ModelArguments,
        DataArguments,
        FinetuningArguments,
        InsertionArguments,
        AdapterArguments,
        TrainingArguments,
        args=args,
        description=__doc__,
    )
    data.check_splits(training)
    tokenizer = load_tokenizer(model_args)
    config = load_config(model_args, tokenizer)
    check(finetuning, insertion, training, config.model_type)
    insertion.check_schedule(training)
    start(training)
    splits = with_lists(finetuning, load_splits(data, model_args))
    for split, wanted in (("train", training.do_train), ("validation", training.do_eval)):
        if wanted:
            check_rows(finetuning, split_of(splits, split, finetuning.columns), split, finetuning.columns)
    tests = split_of(splits, "test", finetuning.test_columns) if training.do_predict else None
    if tests is not None:
        check_tests(finetuning, tokenizer, config, tests)
    insnext = config.model_type == "insnext"
    rows = wanted_examples(splits, finetuning.columns, make_examples(finetuning, tokenizer, insnext), data, training)
    report_losses(rows, splits, finetuning)
    note_arguments(training, model_args, data, finetuning, insertion, adapter)
    if insnext:
        options = make_collators(finetuning, insertion, tokenizer, rows, training)
        options |= {"learning_rates": insertion.learning_rates}
        rows = scheduled(insertion, rows, training)
    else:
        options = {"data_collator": DataCollatorForSeq2Seq(tokenizer)}
    head = ["slot_head"] if insertion.head_learning_rate is not None else None
    model = add_adapter(load_model(AutoModelForCausalLM, model_args, config), adapter, "CAUSAL_LM", head)
    if tests is not None:
        check_generation(finetuning, model, tokenizer, tests)
    trainer_class = InsertionTrainer if insnext else TokenMeanTrainer
    trainer = trainer_class(model, training, processing_class=tokenizer, **options, **rows)
    metrics = train_and_evaluate(trainer, perplexity=not insnext)
    if tests is not None:
        written = predict(finetuning, model, tokenizer, tests, training)
        write_lines(Path(training.output_dir) / "predictions.jsonl", written)
    return metrics


if __name__ == "__main__":
    main()
