"""Train examples/checkpoints/insnext-mini from the files that prepare_corpus.py wrote.

    python examples/checkpoints/prepare_corpus.py --data_dir DATA --output_dir data
    python examples/checkpoints/train_insnext_mini.py --corpus data --output_dir runs/mini --max_steps 3000
    python examples/checkpoints/train_insnext_mini.py --corpus data --output_dir runs/mini2 --model_name_or_path runs/mini/final \
        --reencode 0.9 --context_step_weight 6 --max_steps 400

The first trains from scratch, the second goes on with more re-encoded text; the full commands, with optimiser and
schedule, are in the checkpoint's card. Interrupted, the same command goes on from the last checkpoint in `output_dir`.
"""

import json
from dataclasses import dataclass, field

import numpy as np
import torch
from small_checkpoint import train_small_checkpoint
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed

from modeling_insnext import InsNextConfig, InsNextForInsertionLM
from modeling_insnext.data import (
    ContextMixture,
    InsertionCollator,
    load_texts,
    rarity_table,
    sentence_end_table,
    word_start_table,
)
from modeling_insnext.insertion_trainer import InsertionTrainer
from modeling_insnext.runs import plot_losses


@dataclass
class MiniArguments:
    corpus: str = field(default="data", metadata={"help": "Folder with tokenizer/, train.npz and heldout.npz."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Go on from these weights, with another mixture; the sizes below do not count."},
    )
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    intermediate_size: int = 640
    pack_to: int = field(default=256, metadata={"help": "Tokens a packed row."})
    orders: str = field(
        default='{"gap_left_to_right": 0.75, "left_to_right": 0.1, "uniform": 0.15}',
        metadata={"help": "Weighted mixture of insertion orders, JSON."},
    )
    reencode: float = field(default=0.6, metadata={"help": "Share of texts whose context is partly written text."})
    windowed: float = field(default=0.1, metadata={"help": "Share of texts with a second re-encoded block."})
    context_step_weight: float = field(default=3.0, metadata={"help": "Weight of the step after a re-encoding."})
    repeat: str = field(
        default='{"commongen": 3, "stories": 3, "books": 1}',
        metadata={"help": "Times a source is seen an epoch, JSON."},
    )


def make_config(args, tokenizer) -> InsNextConfig:
    return InsNextConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=args.intermediate_size,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_collator(args, tokenizer, texts, **options):
    return InsertionCollator(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        order=json.loads(args.orders),
        contexts=ContextMixture(
            words=0.25, keywords=0.35, spans=0.15, prefix=0.1, reencode=args.reencode, windowed=args.windowed
        ),
        word_starts=word_start_table(tokenizer),
        sentence_ends=sentence_end_table(tokenizer),
        token_rarity=rarity_table([text["input_ids"] for text in texts], len(tokenizer)),
        pack_to=args.pack_to,
        truncate=True,
        context_step_weight=args.context_step_weight,
        **options,
    )


def main():
    args, training = HfArgumentParser((MiniArguments, TrainingArguments), usage="%(prog)s [--ARGUMENT VALUE ...]").parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(f"{args.corpus}/tokenizer")
    train, heldout = (load_texts(f"{args.corpus}/{name}.npz") for name in ("train", "heldout"))
    repeat = json.loads(args.repeat)
    train = [text for text in train for _ in range(repeat[text["source"]])]
    heldout = [heldout[i] for i in np.random.default_rng(0).permutation(len(heldout))[:400]]
    if args.model_name_or_path is None:
        model = InsNextForInsertionLM(make_config(args, tokenizer))
    else:
        model = InsNextForInsertionLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    print(f"{model.num_parameters():,} parameters, {sum(len(t['input_ids']) for t in train):,} tokens an epoch")
    training.remove_unused_columns = False
    trainer = InsertionTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=heldout,
        data_collator=make_collator(args, tokenizer, train),
        processing_class=tokenizer,
    )
    final = train_small_checkpoint(trainer)
    plot_losses(trainer.state.log_history, ("position_loss", "token_loss"), final / "loss.png")


if __name__ == "__main__":
    main()
