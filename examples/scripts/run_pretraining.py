r"""Pre-train InsNeXt, sentences first and documents then, or DRT on whole texts.

    python examples/scripts/run_pretraining.py --model_type insnext --tokenizer_name TOKENIZER --stage sentences \
        --config_overrides '{"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}' \
        --train_file train.jsonl --validation_file valid.jsonl --do_train --do_eval --output_dir runs/sentences
    python examples/scripts/run_pretraining.py --model_name_or_path runs/sentences --stage documents \
        --train_file train.jsonl --do_train --output_dir runs/documents
    python examples/scripts/run_pretraining.py --model_type drt --preset small-x2 --tokenizer_name TOKENIZER \
        --dataset_name NAME --do_train --output_dir runs/drt
    python examples/scripts/run_pretraining.py --model_name_or_path CONVERTED --stage documents --adapter lora \
        --lora_target_modules all-linear --lora_r 32 --learning_rate 2e-4 --head_learning_rate 1e-3 \
        --left_to_right_share 0.8 0.3 --alignment_weight 1 --bf16 --train_file train.jsonl --do_train \
        --output_dir runs/adapted
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/scripts/run_pretraining.py ...

Files hold one text a row in `--text_column`; a line of a .txt file is a text. What becomes of a text:

    InsNeXt, stage sentences   its sentences, many to a row of --block_size (256) tokens, isolated from one another
    InsNeXt, stage documents   the whole of it, to --block_size (what the model holds); longer ones are cut, and only
                               the last piece teaches to stop
    DRT                        joined with the others by EOS and cut into rows of --block_size (1,024) tokens; what is
                               left over at the end of a thousand texts is dropped

A model that `conversion.from_llama --to insnext` made is its source from left to right. --adapter adapts it: the slot
head is trained whole and saved with the adapter; what chooses slots, of which the source knows nothing, at
--head_learning_rate, what says their tokens at the rate of the adapter.
--left_to_right_share says how many texts are plainly left to right, at the beginning and at the end, and
--alignment_weight keeps the hidden states of such texts beside the source's. `loss.png` shows the losses by step.

A batch of --per_device_train_batch_size texts takes as few rows as it fits into. Interrupted, the same command goes on
from the last complete checkpoint in --output_dir, to bit-equal losses and weights on a CPU.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import (
    AdapterArguments,
    DataArguments,
    InsertionArguments,
    ModelArguments,
    check_choice,
    parse,
)
from common.data import body, check_texts, insertion_collator, load_splits, wanted_examples
from common.models import add_adapter, load_config, load_model, load_tokenizer
from common.training import note_arguments, scheduled, start, train_and_evaluate
from transformers import AutoModelForCausalLM, TrainingArguments, default_data_collator

from modeling_insnext.alignment import AlignedTrainer
from modeling_insnext.data import split_sentences
from modeling_insnext.insertion_trainer import InsertionTrainer
from modeling_insnext.runs import plot_losses
from modeling_insnext.trainers import TokenMeanTrainer


STAGES = ("sentences", "documents")
CONTEXTS = {"words": 0.25, "keywords": 0.35, "spans": 0.15, "prefix": 0.1, "reencode": 0.6, "windowed": 0.1}


@dataclass
class PretrainingArguments:
    _argument_group_name = "pre-training"

    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    stage: str | None = field(default=None, metadata={"help": "InsNeXt: sentences or documents."})
    block_size: int | None = field(default=None, metadata={"help": "Tokens a row."})
    alignment_weight: float | None = field(
        default=None, metadata={"help": "InsNeXt under an adapter: of the distance to the states of the source."}
    )

    def __post_init__(self):
        if self.stage is not None:
            check_choice("stage", self.stage, STAGES)
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")
        if self.alignment_weight is not None and not 0 <= self.alignment_weight < float("inf"):
            raise ValueError(f"alignment_weight must be finite and at least 0, got {self.alignment_weight}")


def check(args: PretrainingArguments, insertion: InsertionArguments, adapter: AdapterArguments, config) -> None:
    """Raise a `ValueError` if the options are not those of the architecture."""
    check_choice("the model type of a checkpoint", config.model_type, ("insnext", "drt"))
    if config.model_type == "drt":
        insertion.refuse("which DRT does not write")
        for name in ("stage", "alignment_weight"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} is for model type insnext, got {name}={getattr(args, name)!r} and drt")
        return
    if args.alignment_weight is not None and adapter.adapter == "none" and adapter.adapter_name_or_path is None:
        raise ValueError(f"alignment_weight needs an adapter, got alignment_weight={args.alignment_weight}")
    if args.stage is None:
        raise ValueError(f"model type insnext needs stage, one of {STAGES}, got None")
    limit = config.max_position_embeddings
    if args.block_size is not None and args.block_size > limit:
        raise ValueError(f"block_size must be at most max_position_embeddings={limit}, got {args.block_size}")


def insertion_texts(tokenizer, column: str, stage: str, block_size: int):
    """Return the function that makes texts of at most `block_size` tokens of a batch of rows."""

    def make(batch):
        texts = batch[column]
        if stage == "sentences":
            lines = [line.strip() for text in texts for line in text.split("\n") if line.strip()]
            texts = [sentence for line in lines for sentence in split_sentences(line) if sentence]
        made = {"input_ids": [], "complete": []}
        size = block_size - 1
        # a text may spell a special token: it means its letters
        for ids in tokenizer(texts, split_special_tokens=True)["input_ids"] if texts else []:
            ids = body(tokenizer, ids)
            for first in range(0, len(ids), size):
                made["input_ids"].append([tokenizer.bos_token_id, *ids[first : first + size]])
                made["complete"].append(first + size >= len(ids))
        return made

    return make


def joined_rows(tokenizer, column: str, block_size: int):
    """Return the function that joins the texts of a batch by EOS and cuts them into rows of `block_size` tokens."""

    def make(batch):
        joined = []
        for ids in tokenizer(batch[column], split_special_tokens=True)["input_ids"]:
            joined += ids
            if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
                joined.append(tokenizer.eos_token_id)
        whole = len(joined) // block_size * block_size
        rows = [joined[first : first + block_size] for first in range(0, whole, block_size)]
        return {"input_ids": rows, "labels": [list(row) for row in rows]}

    return make


def row_length(args: PretrainingArguments, config) -> int:
    if args.block_size is not None:
        return args.block_size
    if config.model_type == "drt":
        return 1024
    return min(256, config.max_position_embeddings) if args.stage == "sentences" else config.max_position_embeddings


def make_examples(args: PretrainingArguments, config, tokenizer):
    """Return the function that makes training examples of a batch of rows."""
    if config.model_type == "drt":
        return joined_rows(tokenizer, args.text_column, row_length(args, config))
    return insertion_texts(tokenizer, args.text_column, args.stage, row_length(args, config))


def make_trainer(args: PretrainingArguments, insertion: InsertionArguments, model, tokenizer, rows: dict, training):
    """Return the trainer of an insertion model."""
    # of training first, of evaluation last
    collators = [
        insertion_collator(insertion, tokenizer, texts, CONTEXTS, training, pack_to=row_length(args, model.config))
        for texts in rows.values()
    ]
    options = {"args": training, "processing_class": tokenizer, "learning_rates": insertion.learning_rates}
    options |= scheduled(insertion, rows, training)
    options |= {"data_collator": collators[0], "eval_data_collator": collators[-1]}
    if args.alignment_weight is None:
        return InsertionTrainer(model, **options)
    return AlignedTrainer(model, alignment_weight=args.alignment_weight, **options)


def main(args: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the metrics of the evaluation."""
    model_args, data, pretraining, insertion, adapter, training = parse(
        ModelArguments,
        DataArguments,
        PretrainingArguments,
        InsertionArguments,
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
    check(pretraining, insertion, adapter, config)
    insertion.check_schedule(training)
    start(training)
    splits = load_splits(data, model_args)
    check_texts(splits, [pretraining.text_column])
    make = make_examples(pretraining, config, tokenizer)
    rows = wanted_examples(splits, [pretraining.text_column], make, data, training)
    note_arguments(training, model_args, data, pretraining, insertion, adapter)
    insnext = config.model_type == "insnext"
    model = load_model(AutoModelForCausalLM, model_args, config)
    model = add_adapter(model, adapter, "CAUSAL_LM", head=["slot_head"] if insnext else None)
    if insnext:
        trainer = make_trainer(pretraining, insertion, model, tokenizer, rows, training)
    else:
        options = {"data_collator": default_data_collator, "processing_class": tokenizer, **rows}
        trainer = TokenMeanTrainer(model, training, **options)
    metrics = train_and_evaluate(trainer, perplexity=not insnext)
    if training.do_train and training.should_save:
        parts = ("position_loss", "token_loss", "alignment_loss") if insnext else ("loss",)
        plot_losses(trainer.state.log_history, parts, Path(training.output_dir) / "loss.png")
    return metrics


if __name__ == "__main__":
    main()
