"""Fine-tune with LoRA, DoRA or whole: writing around keywords, filling gaps, or going on behind a prompt.

    python examples/run_finetuning.py --task keywords --text_column references --keywords_column concepts \
        --model_name_or_path examples/checkpoints/insnext-mini --adapter lora --learning_rate 3e-3 \
        --train_file commongen/train.jsonl.gz --test_file commongen/dev.jsonl --do_train --do_predict \
        --output_dir runs/commongen
    python examples/run_finetuning.py --task infilling --model_name_or_path examples/checkpoints/insnext-mini \
        --train_file stories.jsonl --do_train --output_dir runs/infilling
    python examples/run_finetuning.py --task completion --prompt_column question --completion_column answer \
        --model_name_or_path MODEL --train_file questions.jsonl --do_train --output_dir runs/answers

    task        for       a row of training data                        what --do_predict writes for a row of test data
    keywords    InsNeXt   texts and the words given in them; without    a text around its words
                          --keywords_column rare words of the text
    infilling   InsNeXt   texts, of which one to three spans are        the text with its gaps, ___, filled
                          missing, drawn anew every epoch
    completion  both      a prompt and its completion                   the completion

A column of texts may hold a list of texts a row. Words are given where they occur, inflected or not; in prediction
they are the keywords, as they are and in their order. Predictions go to predictions.jsonl in --output_dir, each row
with its `prediction`. An adapter is saved alone: `AutoPeftModelForCausalLM.from_pretrained(output_dir)` loads it with
its base. Interrupted, the same command goes on from the last complete checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from arguments import (
    AdapterArguments,
    DataArguments,
    InsertionArguments,
    ModelArguments,
    check_choice,
    json_object,
    parse,
)
from common import (
    add_adapter,
    insertion_collator,
    load_config,
    load_model,
    load_splits,
    load_tokenizer,
    split_of,
    start,
    train_and_evaluate,
    wanted_examples,
    without_eos,
    write_lines,
)
from prepare_corpus import keyword_spans
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from modeling_insnext.trainer import InsertionTrainer


REENCODED = {"reencode": 0.6, "windowed": 0.1}


@dataclass
class FinetuningArguments:
    task: str = field(metadata={"help": "keywords, infilling or completion."})
    text_column: str | None = field(default=None, metadata={"help": "keywords, infilling: texts; by default text."})
    keywords_column: str | None = field(default=None, metadata={"help": "keywords: lists of words."})
    prompt_column: str | None = field(default=None, metadata={"help": "completion: prompts; by default prompt."})
    completion_column: str | None = field(default=None, metadata={"help": "completion: by default completion."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a text; what is longer is cut."})
    generation: str = field(default='{"max_new_tokens": 40}', metadata={"help": "Options of generate, JSON."})

    def __post_init__(self):
        columns = {
            "keywords": {"text_column": "text", "keywords_column": None},
            "infilling": {"text_column": "text"},
            "completion": {"prompt_column": "prompt", "completion_column": "completion"},
        }
        check_choice("task", self.task, columns)
        for name in ("text_column", "keywords_column", "prompt_column", "completion_column"):
            if name not in columns[self.task] and getattr(self, name) is not None:
                raise ValueError(f"{name} is not for task {self.task}, got {getattr(self, name)!r}")
            setattr(self, name, getattr(self, name) or columns[self.task].get(name))
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        json_object("generation", self.generation)

    @property
    def columns(self) -> list[str]:
        """Columns of training data."""
        names = (self.text_column, self.keywords_column, self.prompt_column, self.completion_column)
        return [name for name in names if name is not None]

    @property
    def test_columns(self) -> list[str]:
        read = {"keywords": self.keywords_column, "infilling": self.text_column, "completion": self.prompt_column}
        return [read[self.task]]

    @property
    def contexts(self) -> dict:
        """What is given of a text, beside what the row says."""
        if self.task == "completion":
            return {}
        drawn = {"infilling": {"spans": 1.0}, "keywords": {} if self.keywords_column else {"keywords": 1.0}}
        return {**drawn[self.task], **REENCODED}


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


def texts_of(value) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def insertion_examples(args: FinetuningArguments, tokenizer):
    """Return the function that tokenises texts and marks what of them is given."""
    limit = args.max_length

    def make(batch):
        texts = [texts_of(value) for value in batch[args.text_column]]
        words = batch[args.keywords_column] if args.keywords_column else [[]] * len(texts)
        pairs = [(text, row) for row, group in zip(words, texts, strict=True) for text in group]
        encoded = tokenizer([text for text, _ in pairs], return_offsets_mapping=bool(args.keywords_column))
        made = {"input_ids": [ids[:limit] for ids in encoded["input_ids"]]}
        made["complete"] = [len(ids) <= limit for ids in encoded["input_ids"]]
        if args.keywords_column:
            offsets = encoded["offset_mapping"]
            spans = [keyword_spans(text, " ".join(row).split()) for text, row in pairs]
            made["given"] = [marked(*pair)[:limit] for pair in zip(offsets, spans, strict=True)]
        return made

    return make


def marked(offsets, spans) -> list[bool]:
    """Return for every token whether it lies in one of the spans of characters."""
    return [any(start < right and left < end for left, right in spans) for start, end in offsets]


def prompt_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return [without_eos(tokenizer, ids) for ids in tokenizer(list(texts))["input_ids"]]


def completion_examples(args: FinetuningArguments, tokenizer, insnext: bool):
    """Return the function that puts completions behind their prompts; only completions are learned."""
    # by insertion, STOP says that a text ends
    end = [] if insnext or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def make(batch):
        prompts = prompt_ids(tokenizer, batch[args.prompt_column])
        completions = tokenizer(batch[args.completion_column], add_special_tokens=False)["input_ids"]
        whole = [prompt + completion + end for prompt, completion in zip(prompts, completions, strict=True)]
        cut = [ids[: args.max_length] for ids in whole]
        given = [[place < len(prompt) for place in range(len(ids))] for prompt, ids in zip(prompts, cut, strict=True)]
        if insnext:
            complete = [len(ids) <= args.max_length for ids in whole]
            return {"input_ids": cut, "given": given, "complete": complete}
        labels = [
            [-100 if fixed else token for token, fixed in zip(*pair, strict=True)]
            for pair in zip(cut, given, strict=True)
        ]
        return {"input_ids": cut, "labels": labels}

    return make


def make_examples(args: FinetuningArguments, tokenizer, insnext: bool):
    """Return the function that makes training examples of a batch of rows."""
    if args.task == "completion":
        return completion_examples(args, tokenizer, insnext)
    return insertion_examples(args, tokenizer)


def make_collator(args: FinetuningArguments, insertion: InsertionArguments, tokenizer, rows: dict, training):
    """Return the collator of insertion sequences."""
    if args.task == "completion" and insertion.order is None:
        insertion.order = "left_to_right"
    texts = next(iter(rows.values()), [])
    options = {"max_length": args.max_length, "truncate": True}
    return insertion_collator(insertion, tokenizer, texts, args.contexts, training, **options)


@torch.no_grad()
def predict(args: FinetuningArguments, model, tokenizer, rows, training) -> list[dict]:
    """Return the rows, each with what the model wrote for it."""
    model.eval()
    options, size = json_object("generation", args.generation), training.per_device_eval_batch_size
    written, column = [], rows[args.test_columns[0]]
    for first in tqdm(range(0, len(rows), size), desc="Predicting", disable=training.disable_tqdm):
        given = column[first : first + size]
        if args.task == "completion":
            written += completions(model, tokenizer, given, options)
            continue
        canvas = {"keywords": [list(words) for words in given]} if args.task == "keywords" else {"text": list(given)}
        out = model.generate(**model.canvas(tokenizer, **canvas).to(model.device), **options)
        written += tokenizer.batch_decode(out, skip_special_tokens=True)
    return [{**row, "prediction": text} for row, text in zip(rows, written, strict=True)]


def completions(model, tokenizer, prompts: list[str], options: dict) -> list[str]:
    """Return what the model writes behind each prompt."""
    ids = prompt_ids(tokenizer, prompts)
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    out = model.generate(**batch, **options)
    # insertion gives a text back without the padding in front of it
    padded = model.config.model_type != "insnext"
    starts = [batch["input_ids"].shape[1] if padded else len(row) for row in ids]
    rows = [row[first:] for row, first in zip(out, starts, strict=True)]
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
    )
    data.check_splits(training)
    tokenizer = load_tokenizer(model_args)
    config = load_config(model_args, tokenizer)
    check(finetuning, insertion, training, config.model_type)
    start(training)
    splits = load_splits(data, model_args)
    tests = split_of(splits, "test", finetuning.test_columns) if training.do_predict else None
    insnext = config.model_type == "insnext"
    rows = wanted_examples(splits, finetuning.columns, make_examples(finetuning, tokenizer, insnext), data, training)
    if insnext:
        collator = make_collator(finetuning, insertion, tokenizer, rows, training)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer)
    model = add_adapter(load_model(AutoModelForCausalLM, model_args, config), adapter, "CAUSAL_LM")
    trainer_class = InsertionTrainer if insnext else Trainer
    trainer = trainer_class(model, training, data_collator=collator, processing_class=tokenizer, **rows)
    metrics = train_and_evaluate(trainer, perplexity=not insnext)
    if tests is not None:
        written = predict(finetuning, model, tokenizer, tests, training)
        write_lines(Path(training.output_dir) / "predictions.jsonl", written)
    return metrics


if __name__ == "__main__":
    main()
