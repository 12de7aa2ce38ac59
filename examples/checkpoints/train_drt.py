"""Train a small DRT on books and needles mixed, or one of its baselines on the same batches.

    python examples/checkpoints/prepare_books.py --data_dir DATA --output_dir data/books
    python examples/checkpoints/train_drt.py --corpus data/books --output_dir runs/drt --max_steps 2500
    python examples/checkpoints/train_drt.py --corpus data/books --output_dir runs/window --max_steps 2500 \
        --baseline sliding_window

Rows are windows of one long text, `--length` tokens each, so nothing is padded. A batch holds books, with a loss on
every token; needles (passkey, several keys, two hops: modeling_insnext.tasks.needles), with a loss on the answers; or
a string of random ids twice, with a loss on the second, which soonest teaches to copy from what was retrieved. A small
model learns in stages: first to copy, from weights that are near it (`--copying_init`), in short rows of few distinct
ids (`--id_range`); then to find, in longer rows, `--model_name_or_path` naming the stage before. The card of
`examples/checkpoints/drt-mini` holds the commands that made it.

A pretrained model learns to use a memory with the rest of it frozen:

    python -m conversion.from_llama SMOLLM2 runs/source --to drt --memory copy
    python examples/checkpoints/prepare_books.py --data_dir DATA --output_dir data/smol --tokenizer runs/source
    python examples/checkpoints/train_drt.py --corpus data/smol --output_dir runs/memory --trained memory --lora_r 16 \
        --model_name_or_path runs/source --shortest 2048 --length 4096 --needle_share 0.5 --needles '{}' \
        --word_needles '{"passkey": [0.3, 1], "multi_key": [0.4, 3], "variable_tracking": [0.3, 2, {"hops": 1}]}' \
        --learning_rate 1e-3 --lora_learning_rate 3e-4 --bf16 --use_cpu --logging_steps 10 --max_steps 200

`--trained memory` trains what retrieves, whole, and LoRA of the source if there is a rank; `final/` then holds both
and not the source. Rows are of one length a batch. The log has tokens a second and the peak of the memory.

The same seed draws the same batches for every model. Interrupted, the same command goes on from the last checkpoint in
`output_dir`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from copying_init import start_from_copying
from memory_training import TRAINED, MeasuredTrainer, freeze_source
from small_checkpoint import train_small_checkpoint
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed

from modeling_insnext import DrtConfig, DrtForCausalLM
from modeling_insnext.tasks import NeedleTask, WordNeedleTask, draw_needles


@dataclass
class DrtArguments:
    corpus: str = field(default="data/books", metadata={"help": "Folder with tokenizer/, train.npy and valid.npy."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Go on from these weights."})
    baseline: str | None = field(default=None, metadata={"help": "A baseline of DrtConfig.baseline instead of DRT."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flex_attention, ..."})
    length: int = field(default=1024, metadata={"help": "Tokens a row; on a GPU 4096 to 16384."})
    shortest: int | None = field(
        default=None, metadata={"help": "Rows of a batch have any multiple of the chunk from here to length tokens."}
    )
    trained: str = field(default="all", metadata={"help": "all, or memory: what retrieves alone."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the frozen rest; 0: none."})
    lora_learning_rate: float | None = field(default=None, metadata={"help": "In the place of learning_rate there."})
    needle_share: float = field(default=0.7, metadata={"help": "Share of batches that hold needles."})
    repeat_share: float = field(default=0.0, metadata={"help": "Share of batches that hold a random string twice."})
    id_range: str = field(
        default="null", metadata={"help": "First and one past the last id of random strings, JSON; null: all."}
    )
    needles: str = field(
        default='{"passkey": [0.2, 1], "multi_key": [0.45, 4], "two_hop": [0.35, 2]}',
        metadata={"help": "Share, questions a text and, if not num_ids, random ids of each kind of needle, JSON."},
    )
    word_needles: str = field(
        default="{}",
        metadata={"help": "Share, questions a text and options of each kind of WordNeedleTask, JSON; in the same sum."},
    )
    num_ids: int = field(default=5, metadata={"help": "Random ids of a passkey, a value or a variable."})
    hidden_size: int = 128
    intermediate_size: int = 384
    num_attention_heads: int = 4
    num_lower_layers: int = 2
    retrieval_groups: str = field(default="[1, 1]", metadata={"help": "Upper layers of each retrieval, JSON."})
    num_encoder_layers: int = 1
    chunk_size: int = 64
    num_retrieved_chunks: int = 8
    sliding_window: int = 160
    config_overrides: str = field(
        default="{}", metadata={"help": "Fields of DrtConfig, JSON; they also change what model_name_or_path holds."}
    )
    copying_init: bool = field(default=False, metadata={"help": "Start from copying_init.py, a new model only."})
    evaluation_rows: int = field(default=32, metadata={"help": "Held-out rows of each kind."})

    def __post_init__(self):
        if self.trained not in TRAINED:
            raise ValueError(f"trained must be one of {TRAINED}, got {self.trained!r}")
        if self.trained == "all" and (self.lora_r or self.lora_learning_rate is not None):
            raise ValueError(f"lora_r needs trained=memory, got lora_r={self.lora_r}")
        if self.lora_r < 0 or (self.lora_learning_rate is not None and not self.lora_r):
            raise ValueError(f"lora_learning_rate needs a lora_r of at least 1, got {self.lora_r}")
        if self.shortest is not None and not 0 < self.shortest <= self.length:
            raise ValueError(f"shortest must be in 1..{self.length}, got {self.shortest}")


def make_config(args: DrtArguments, tokenizer) -> DrtConfig:
    config = DrtConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        retrieval_groups=json.loads(args.retrieval_groups),
        **{
            name: getattr(args, name)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_lower_layers",
                "num_encoder_layers",
                "chunk_size",
                "num_retrieved_chunks",
                "sliding_window",
            )
        },
        **json.loads(args.config_overrides),
    )
    return config if args.baseline is None else config.baseline(args.baseline)


def make_model(args: DrtArguments, tokenizer) -> DrtForCausalLM:
    if args.model_name_or_path is not None:
        if args.copying_init or args.baseline is not None:
            raise ValueError("copying_init and baseline are for a new model, got model_name_or_path as well")
        config = DrtConfig.from_pretrained(args.model_name_or_path, **json.loads(args.config_overrides))
        args.chunk_size = config.chunk_size
        return DrtForCausalLM.from_pretrained(args.model_name_or_path, config=config, dtype=torch.float32)
    model = DrtForCausalLM(make_config(args, tokenizer))
    if args.copying_init:
        start_from_copying(model)
    return model


def needle_shares(args: DrtArguments) -> dict[str, float]:
    """Return the share of each kind of needle among them all."""
    shares = {kind: share for kind, (share, *_) in json.loads(args.needles).items()}
    shares |= {f"word_{kind}": share for kind, (share, *_) in json.loads(args.word_needles).items()}
    return {kind: share / sum(shares.values()) for kind, share in shares.items()}


def make_tasks(args: DrtArguments, tokenizer, questions: int | None = None) -> dict[str, NeedleTask | WordNeedleTask]:
    """Return the needle tasks; `questions` overrides the number of questions a text."""
    in_words = {
        f"word_{kind}": WordNeedleTask(
            kind,
            tokenizer,
            chunk_size=args.chunk_size,
            num_questions=count if questions is None else questions,
            **(options[0] if options else {}),
        )
        for kind, (_, count, *options) in json.loads(args.word_needles).items()
    }
    in_ids = {
        kind: NeedleTask(
            kind,
            tokenizer,
            chunk_size=args.chunk_size,
            num_ids=width[0] if width else args.num_ids,
            num_questions=count if questions is None else questions,
            id_range=json.loads(args.id_range),
        )
        for kind, (_, count, *width) in json.loads(args.needles).items()
    }
    return in_ids | in_words


class BooksAndNeedles(IterableDataset):
    """Rows of `length` tokens, one kind a batch; row i is a function of the seed and i alone."""

    def __init__(self, args: DrtArguments, tokenizer, batch_size: int, seed: int):
        self.books = np.load(f"{args.corpus}/train.npy", mmap_mode="r")
        self.tasks = make_tasks(args, tokenizer)
        shares = needle_shares(args)
        if args.needle_share and not shares:
            raise ValueError(f"needle_share needs needles or word_needles, got {args.needle_share} and none")
        self.kinds = ["books", "repeat", *shares]
        books = 1 - args.needle_share - args.repeat_share
        if books < -1e-9:
            raise ValueError(f"needle_share + repeat_share must be at most 1, got {1 - books}")
        self.shares = [max(books, 0), args.repeat_share, *(args.needle_share * share for share in shares.values())]
        self.ids = json.loads(args.id_range) or (len(tokenizer.all_special_ids), len(tokenizer))
        chunk = args.chunk_size
        self.lengths = [args.length]
        if args.shortest is not None:
            self.lengths = list(range(-(-args.shortest // chunk) * chunk, args.length + 1, chunk))
        self.batch_size, self.seed = batch_size, seed

    def __iter__(self):
        index = 0
        while True:
            rng = np.random.default_rng((self.seed, index))
            kind = rng.choice(self.kinds, p=self.shares)
            length = self.lengths[rng.integers(len(self.lengths)) if len(self.lengths) > 1 else 0]
            for row in range(index * self.batch_size, (index + 1) * self.batch_size):
                yield self.row(kind, row, length)
            index += 1

    def row(self, kind: str, row: int, length: int) -> dict[str, torch.Tensor]:
        if kind == "books":
            start = np.random.default_rng((self.seed, 1, row)).integers(len(self.books) - length)
            ids = torch.from_numpy(self.books[start : start + length].astype(np.int64))
            return {"input_ids": ids, "labels": ids.clone()}
        if kind == "repeat":
            half = np.random.default_rng((self.seed, 2, row)).integers(*self.ids, size=length // 2)
            ids = torch.from_numpy(np.tile(half, 2))
            return {"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) > len(half), ids, -100)}
        sample = draw_needles(self.tasks[kind], self.books, length, row, self.seed)
        return {
            "input_ids": torch.from_numpy(np.asarray(sample.input_ids, dtype=np.int64)),
            "labels": torch.from_numpy(sample.labels),
        }


class HeldOut(Dataset):
    """Rows of held-out books, or of needles hidden in them with one question each."""

    def __init__(self, args: DrtArguments, tokenizer, kind: str):
        books = np.load(f"{args.corpus}/valid.npy", mmap_mode="r")
        if kind == "books":
            starts = np.linspace(0, len(books) - args.length, args.evaluation_rows).astype(int)
            self.rows = [(books[start : start + args.length],) * 2 for start in starts]
        else:
            task = make_tasks(args, tokenizer, questions=1)[kind]
            samples = [draw_needles(task, books, args.length, i, seed=1) for i in range(args.evaluation_rows)]
            self.rows = [(sample.input_ids, sample.labels) for sample in samples]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        ids, labels = (torch.from_numpy(np.asarray(row, dtype=np.int64)) for row in self.rows[index])
        return {"input_ids": ids, "labels": labels}


def exact_match(prediction) -> dict[str, float]:
    """Share of rows all of whose supervised tokens are predicted, and share of these tokens."""
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    right, asked = (guesses == labels) & (labels != -100), labels != -100
    return {"exact_match": float((right.sum(1) == asked.sum(1)).mean()), "token_match": right.sum() / asked.sum()}


def plot_history(history: list[dict], kinds: list[str], path: Path) -> None:
    """Draw held-out losses and exact matches by step."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for color, kind in enumerate(kinds):
        rows = [row for row in history if f"eval_{kind}_loss" in row]
        steps = [row["step"] for row in rows]
        axes[0].plot(steps, [row[f"eval_{kind}_loss"] for row in rows], color=f"C{color}", label=kind)
        if kind != "books":
            shares = [100 * row[f"eval_{kind}_exact_match"] for row in rows]
            axes[1].plot(steps, shares, color=f"C{color}", label=kind)
    axes[0].set(xlabel="step", ylabel="nats a supervised token", title="held-out loss")
    axes[1].set(xlabel="step", ylabel="%", title="whole answers, held out")
    for axis in axes:
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    args, training = HfArgumentParser((DrtArguments, TrainingArguments), usage="%(prog)s [--ARGUMENT VALUE ...]").parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(f"{args.corpus}/tokenizer")
    model = make_model(args, tokenizer)
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    if args.trained == "memory":
        model = freeze_source(model, args.lora_r)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print(
        f"{model.num_parameters():,} parameters, {trained:,} of them trained, "
        f"{training.train_batch_size * args.length:,} tokens a step"
    )
    kinds = ["books", *needle_shares(args)]
    batch_size = training.train_batch_size * training.gradient_accumulation_steps
    trainer = MeasuredTrainer(
        model=model,
        learning_rates={} if args.lora_learning_rate is None else {"lora_": args.lora_learning_rate},
        args=training,
        train_dataset=BooksAndNeedles(args, tokenizer, batch_size, training.seed),
        eval_dataset={kind: HeldOut(args, tokenizer, kind) for kind in kinds},
        processing_class=tokenizer,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=exact_match,
    )
    final = train_small_checkpoint(trainer)
    plot_history(trainer.state.log_history, kinds, final / "loss.png")


if __name__ == "__main__":
    main()
