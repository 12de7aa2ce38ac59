"""Train the memory of a pretrained model on a CPU: what retrieves, on lower layers that are read once.

    python -m conversion.from_llama SMOLLM2 runs/source --to drt --memory copy --retrieval_groups 13 \
        --cross_attention_layers 4
    python examples/checkpoints/prepare_books.py --data_dir DATA --output_dir data/smol --tokenizer runs/source
    python examples/checkpoints/train_memory.py --model runs/source --corpus data/smol --output_dir runs/memory

The source is frozen. A row of `--chunks` chunks hides a needle in words (its answer has the loss), or is of a book (its
last chunks have it); self-attention sees `--window` tokens here, so that short rows need the memory. What leaves the
lower layers of a row is kept: `--rows` rows serve all epochs. Rows of a batch search one another's chunks (see
frozen_lower). `--hint` adds the cross entropy of the chunk that holds the answer, among all that could be chosen, to
the loss: retrieval is told what is right where its text says so, which the loss of the answer alone would find later.

Interrupted, the same command goes on. `--output_dir` gets memory.safetensors (what is new alone), state.pt and
history.json; a line of it has the CPU seconds spent so far.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from frozen_lower import encode, lower_states, question_scores, upper_states
from memory_training import freeze_source
from safetensors.torch import save_file
from transformers import AutoTokenizer

from modeling_insnext import DrtConfig, DrtForCausalLM
from modeling_insnext.runs import write_atomically
from modeling_insnext.tasks import WordNeedleTask, draw_needles


HELD_OUT_ROWS = 12
# learning rates of the few weights that scale others, in the place of the rest's
SCALES = ("gate", "query_norms")


class Row(NamedTuple):
    """One text: its ids, its labels (-100 where there is no loss), and which of its chunks hold the answer."""

    kind: str
    ids: torch.Tensor
    labels: torch.Tensor
    answers: tuple[int, ...]


class Rows:
    """Rows drawn by number, with the lower states of those that were asked for kept."""

    def __init__(self, model, tokenizer, ids: np.ndarray, args, seed: int):
        self.model, self.ids, self.args, self.seed = model, ids, args, seed
        self.S = model.config.chunk_size
        self.tasks = {kind: WordNeedleTask(kind, tokenizer, self.S) for kind in args.kinds}
        self.kept = {}

    def draw(self, number: int) -> Row:
        length, rng = self.args.chunks * self.S, np.random.default_rng((self.seed, number))
        if rng.random() < self.args.book_share:
            start = rng.integers(len(self.ids) - length)
            ids = torch.from_numpy(self.ids[start : start + length].astype(np.int64))
            labels = torch.where(torch.arange(length) >= length - 2 * self.S, ids, -100)
            return Row("books", ids, labels, ())
        kind = self.args.kinds[rng.integers(len(self.args.kinds))]
        sample = draw_needles(self.tasks[kind], self.ids, length, number, self.seed)
        held = {at // self.S for n in sample.questions[0].needles for at in range(*sample.needles[n])}
        ids = torch.from_numpy(np.asarray(sample.input_ids))
        return Row(kind, ids, torch.from_numpy(sample.labels), tuple(sorted(held)))

    def take(self, numbers) -> tuple[list[Row], torch.Tensor]:
        """Return rows and their lower states `[B, L, D]`."""
        fresh = [n for n in numbers if n not in self.kept]
        if fresh:
            rows = [self.draw(n) for n in fresh]
            states = lower_states(self.model.model, torch.stack([row.ids for row in rows]))
            self.kept |= {n: pair for n, *pair in zip(fresh, rows, states, strict=True)}
        rows, states = zip(*(self.kept[n] for n in numbers), strict=True)
        return list(rows), torch.stack(states)


def banned(rows: list[Row], chunks: int) -> torch.Tensor:
    """Return `[B, B chunks]`, True where a row must not look: another's question, or what would answer two."""
    bans = torch.zeros(len(rows), len(rows), chunks, dtype=torch.bool)
    for b, row in enumerate(rows):
        for o, other in enumerate(rows):
            if o != b:
                bans[b, o, -2:] = True
                bans[b, o] |= row.kind == "books"
                if row.kind == other.kind == "passkey":
                    bans[b, o, list(other.answers)] = True
    return bans.flatten(1)


def next_targets(rows: list[Row], last: int) -> torch.Tensor:
    """Return what the last states of each row must predict, `[B, last]`: the label of the next token."""
    labels = torch.stack([row.labels for row in rows])
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:][:, -last:]


class Losses(NamedTuple):
    """Means of a batch in nats, answers that were whole, and the needles among its rows' choice."""

    needle: torch.Tensor
    book: torch.Tensor
    hint: torch.Tensor
    whole: int
    needles: int
    recall: float


def losses(model, rows: list[Row], lower_BLD: torch.Tensor, args, read: int | None = None) -> Losses:
    """Return the losses of a batch: of the right chunk in all rows, of tokens in the first `read` ones."""
    C = lower_BLD.shape[1] // model.config.chunk_size
    memory = encode(model.model, lower_BLD, banned(rows, C), args.tail)
    scores_BN = question_scores(model.model, lower_BLD, memory).log_softmax(-1)
    sought = {b: [b * C + chunk for chunk in row.answers] for b, row in enumerate(rows) if row.answers}
    hints = [-scores_BN[b, some].logsumexp(0) for b, some in sought.items()]
    best = scores_BN.topk(model.config.num_retrieved_chunks).indices.tolist()
    hits = [len(set(some) & set(best[b])) / len(some) for b, some in sought.items()]
    rows = rows[:read]
    hidden = upper_states(model.model, lower_BLD[: len(rows)], memory)
    targets = next_targets(rows, hidden.shape[1])
    asked = targets != -100
    logits, wanted = model.lm_head(hidden[asked]), targets[asked]
    each = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    row_of = torch.arange(len(rows))[:, None].expand_as(asked)[asked]
    needle_B = torch.tensor([row.kind != "books" for row in rows])
    right = torch.ones(len(rows)).scatter_reduce(0, row_of, (logits.argmax(-1) == wanted).float(), "amin")
    zero, of_needle = each.new_zeros(()), needle_B[row_of]
    return Losses(
        each[of_needle].mean() if of_needle.any() else zero,
        each[~of_needle].mean() if (~of_needle).any() else zero,
        torch.stack(hints).mean() if hints else zero,
        int(right[needle_B].sum()),
        int(needle_B.sum()),
        float(np.mean(hits)) if hits else 0.0,
    )


@torch.no_grad()
def evaluate(model, rows: Rows, args) -> dict:
    """Return the mean losses of held-out rows, and how many answers are whole; no noise in the choice."""
    model.eval()
    parts = []
    for first in range(0, HELD_OUT_ROWS, args.batch):
        parts.append(losses(model, *rows.take(range(first, min(first + args.batch, HELD_OUT_ROWS))), args))
    model.train()
    means = {
        name: float(np.mean([float(getattr(part, name)) for part in parts])) for name in ("needle", "book", "hint")
    }
    counts = {name: sum(getattr(part, name) for part in parts) for name in ("whole", "needles")}
    return {**means, **counts, "recall": round(float(np.mean([part.recall for part in parts])), 3)}


def set_gates(model, value: float) -> None:
    """Open every gate of cross-attention so far."""
    for name, weight in model.named_parameters():
        if name.endswith(".gate"):
            weight.data.fill_(value)


def make_optimizer(model, args) -> torch.optim.Optimizer:
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    scales = [weight for name, weight in named if any(part in name for part in SCALES)]
    rest = [weight for name, weight in named if not any(part in name for part in SCALES)]
    groups = [{"params": rest, "lr": args.learning_rate}, {"params": scales, "lr": args.scale_learning_rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    for group in optimizer.param_groups:
        group["rate"] = group["lr"]
    return optimizer


def save(model, optimizer, history: list[dict], step: int, spent: float, output: Path) -> None:
    new = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    save_file({name: weight.detach().contiguous() for name, weight in new.items()}, output / "memory.safetensors")
    state = {"new": new, "optimizer": optimizer.state_dict(), "step": step, "spent": spent, "history": history}
    torch.save(state, output / "state.tmp")
    (output / "state.tmp").replace(output / "state.pt")
    write_atomically(output / "history.json", json.dumps(history))


def train(model, training: Rows, held_out: Rows, args) -> None:
    output, history, step, spent = Path(args.output_dir), [], 0, 0.0
    output.mkdir(parents=True, exist_ok=True)
    optimizer, begun = make_optimizer(model, args), time.process_time()
    if (output / "state.pt").is_file():
        state = torch.load(output / "state.pt", weights_only=True)
        model.load_state_dict(state["new"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        step, spent, history = state["step"], state["spent"], state["history"]
    model.train()
    while step < args.max_steps:
        if step % args.evaluate_every == 0:
            history.append({"step": step, **{f"eval_{k}": v for k, v in evaluate(model, held_out, args).items()}})
            print(json.dumps(history[-1]), flush=True)
        torch.manual_seed(args.seed * 1_000_003 + step)
        numbers = torch.randperm(args.rows)[: args.batch].tolist()
        part = losses(model, *training.take(numbers), args, args.read)
        (part.needle + args.book_weight * part.book + args.hint * part.hint).backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        share = min((step + 1) / args.warmup_steps, max(1 - step / args.max_steps, 0.1))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        cpu = spent + time.process_time() - begun
        means = {name: round(float(getattr(part, name).detach()), 4) for name in ("needle", "book", "hint")}
        history.append(
            {"step": step, **means, "recall": round(part.recall, 3), "norm": round(float(norm), 3), "cpu": round(cpu)}
        )
        print(json.dumps(history[-1]), flush=True)
        if step % args.save_every == 0 or step == args.max_steps:
            save(model, optimizer, history, step, cpu, output)
    history.append({"step": step, **{f"eval_{k}": v for k, v in evaluate(model, held_out, args).items()}})
    print(json.dumps(history[-1]), flush=True)
    save(model, optimizer, history, step, cpu if step else 0.0, output)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that the conversion made")
    parser.add_argument("--corpus", required=True, help="folder with train.npy and valid.npy in its tokens")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--kinds", nargs="+", default=["passkey", "multi_key"], help="of WordNeedleTask")
    parser.add_argument("--chunks", type=int, default=7, help="of a row")
    parser.add_argument("--tail", type=int, default=3, help="last chunks that the upper layers read")
    parser.add_argument("--window", type=int, default=128, help="tokens that self-attention sees in training")
    parser.add_argument("--rows", type=int, default=96, help="rows of training, read again and again")
    parser.add_argument("--batch", type=int, default=12, help="rows of a step, whose chunks are searched together")
    parser.add_argument("--read", type=int, default=3, help="rows of a batch that the upper layers read")
    parser.add_argument("--book_share", type=float, default=0.15)
    parser.add_argument("--book_weight", type=float, default=0.5)
    parser.add_argument("--hint", type=float, default=1.0, help="weight of the cross entropy of the right chunk")
    parser.add_argument("--gate", type=float, default=1.0, help="of every head at the start, where there are gates")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--scale_learning_rate", type=float, default=5e-3, help="of gates and norms of queries")
    parser.add_argument("--warmup_steps", type=int, default=5)
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument("--evaluate_every", type=int, default=30)
    parser.add_argument("--save_every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    config = DrtConfig.from_pretrained(args.model, sliding_window=args.window)
    model = freeze_source(DrtForCausalLM.from_pretrained(args.model, config=config, dtype=torch.float32))
    set_gates(model, args.gate)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = {name: np.load(f"{args.corpus}/{name}.npy", mmap_mode="r") for name in ("train", "valid")}
    training = Rows(model, tokenizer, ids["train"], args, args.seed)
    train(model, training, Rows(model, tokenizer, ids["valid"], args, args.seed + 1), args)


if __name__ == "__main__":
    main()
