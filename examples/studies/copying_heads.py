r"""Where a pretrained model copies from, and what a memory reads there: before training and after.

    python examples/studies/copying_heads.py --corpus data/smol \
        --memories groups_of_five=runs/five copying_layers=runs/source trained=runs/source:runs/memory

Heads: of SmolLM2's, with all of the text in sight, the mean attention from a token of an answer (the digits of needles
in words behind the first) to the token of the needle that it must become: what a copied head has to find in a chunk.

Reading: held-out rows as those of train_memory.py, self-attention sees --window tokens and the first one, needles
stand outside. -log p of answers in nats a token, and whole answers, if nothing is read, if only the chunks that hold
the answer may be found, and of what is found. `found`: how many of the right chunks are among those retrieved, where
there are as many to choose from as stands behind it, other rows' included. Intervals are 95 % of the mean over texts.
Memories are folders of conversion.from_llama, gates set to 1, or with a colon those of train_memory.py on them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from left_to_right_perplexity import load
from report import RESULTS, command, environment, write_report
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser

from modeling_insnext import DrtConfig, DrtForCausalLM
from modeling_insnext.tasks import WordNeedleTask, draw_needles, wilson_interval


# the recipe and the conversion are tools of the clone and not installed
sys.path.append(str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
from frozen_lower import encode, question_scores, upper_states  # isort: skip
from train_memory import Rows, banned, next_targets, parse, set_gates  # isort: skip
from conversion.smollm2 import hub_folder, packaged_file  # isort: skip


@dataclass
class Arguments:
    memories: list[str] = field(metadata={"help": "name=folder or name=folder:folder of train_memory.py."})
    corpus: str = field(metadata={"help": "Folder with valid.npy in the tokens of the memories."})
    source: str | None = field(default=None, metadata={"help": "What the memories were made of; default: SmolLM2."})
    head_texts: int = field(default=6, metadata={"help": "Texts of each kind in which heads are looked at; 0: none."})
    head_length: int = field(default=448, metadata={"help": "Tokens of these."})
    texts: int = field(default=12, metadata={"help": "Rows to read."})
    chunks: int = 7
    tail: int = 3
    window: int = 128
    seed: int = 2
    output: str = field(default=f"{RESULTS}/copying_heads", metadata={"help": "Results, without .json and .md."})


@torch.no_grad()
def attention_to_answers(source, tokenizer, haystack: np.ndarray, kind: str, arguments: Arguments) -> torch.Tensor:
    """Return the mean attention `[layers, heads]` from each answer token to where it stands in the needle."""
    task, sums, count = WordNeedleTask(kind, tokenizer), 0, 0
    for index in range(arguments.head_texts):
        sample = draw_needles(task, haystack, arguments.head_length, index, arguments.seed)
        question = sample.questions[0]
        start, stop = sample.needles[question.needles[0]]
        answer, needle = list(sample.input_ids[question.end + 1 : question.stop]), list(sample.input_ids[start:stop])
        # the full stop is glued to other tokens in neither
        at = next(i for i in range(len(needle)) if needle[i : i + len(answer) - 1] == answer[:-1])
        ids = torch.from_numpy(np.asarray(sample.input_ids))[None]
        attentions = torch.stack(source(ids, output_attentions=True, use_cache=False).attentions)[:, 0]
        digits = range(1, len(answer) - 1)
        sums = sums + sum(attentions[:, :, question.end + i, start + at + i] for i in digits)
        count += len(digits)
    return sums / count


def load_memory(argument: str, window: int):
    """Return the name and the model of `name=folder` or `name=folder:trained`."""
    name, _, folders = argument.partition("=")
    folder, _, trained = folders.partition(":")
    if not folder:
        raise ValueError(f"memories must be name=folder or name=folder:folder, got {argument!r}")
    config = DrtConfig.from_pretrained(folder, sliding_window=window)
    model = DrtForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    set_gates(model, 1.0)
    if trained:
        model.load_state_dict(load_file(Path(trained) / "memory.safetensors"), strict=False)
    return name, model


def answers(model, rows: list, lower_BLD: torch.Tensor, memory) -> list[tuple[float, bool]]:
    """Return nats a token of each answer, and whether it is whole."""
    hidden = upper_states(model.model, lower_BLD, memory)
    told = []
    for state_LD, target_L in zip(hidden, next_targets(rows, hidden.shape[1]), strict=True):
        asked = target_L != -100
        logits, wanted = model.lm_head(state_LD[asked]), target_L[asked]
        nats = torch.nn.functional.cross_entropy(logits, wanted)
        told.append((float(nats), bool((logits.argmax(-1) == wanted).all())))
    return told


@torch.no_grad()
def reading(model, rows: Rows, numbers: range, tail: int) -> dict:
    """Return what a memory's answers are worth, by what it may find."""
    drawn, lower = rows.take(numbers)
    C = lower.shape[1] // model.config.chunk_size
    bans = banned(drawn, C)
    memory = encode(model.model, lower, bans, tail)
    found = question_scores(model.model, lower, memory).topk(model.config.num_retrieved_chunks).indices
    right = torch.zeros_like(bans)
    for b, row in enumerate(drawn):
        right[b, [b * C + chunk for chunk in row.answers]] = True
    share = right.gather(1, found).sum(1) / right.sum(1)
    result = {"found": share.tolist(), "of": memory.allowed[:, -2].sum(1).tolist()}
    result["finds"] = answers(model, drawn, lower, memory)
    memory.allowed = memory.allowed & right[:, None]
    result["right"] = answers(model, drawn, lower, memory)
    set_gates(model, 0.0)
    result["nothing"] = answers(model, drawn, lower, memory)
    return result


def in_words(told: list) -> tuple[str, str]:
    nats, whole = np.array(told).T
    low, high = wilson_interval(int(whole.sum()), len(whole))
    half = 1.96 * nats.std(ddof=1) / len(nats) ** 0.5
    return (
        f"{nats.mean():.2f} ± {half:.2f}",
        f"{int(whole.sum())} of {len(whole)} ({100 * low:.0f}-{100 * high:.0f} %)",
    )


def markdown(report: dict) -> str:
    lines = [
        "| memory | needle | found | nothing read | right chunks alone | what it finds |",
        "|---|---|---|---|---|---|",
    ]
    for name, kinds in report["reading"].items():
        for kind, result in kinds.items():
            cells = [", ".join(in_words(result[part])) for part in ("nothing", "right", "finds")]
            found = f"{np.mean(result['found']):.2f} of {np.mean(result['of']):.0f}"
            lines.append(f"| {name} | {kind} | {found} | " + " | ".join(cells) + " |")
    if report["heads"]:
        lines += [
            "",
            "| needle | heads of the source that look at the answer, layer.head and attention |",
            "|---|---|",
        ]
    for kind, table in report["heads"].items():
        best = sorted(
            ((share, f"{i}.{j}") for i, row in enumerate(table) for j, share in enumerate(row)), reverse=True
        )
        lines.append(f"| {kind} | " + ", ".join(f"{name} {share:.2f}" for share, name in best[:10]) + " |")
    return "\n".join(lines)


def main(arguments: Arguments) -> None:
    named = [load_memory(argument, arguments.window) for argument in arguments.memories]
    folder = arguments.memories[0].partition("=")[2].partition(":")[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    haystack = np.load(f"{arguments.corpus}/valid.npy", mmap_mode="r")
    recipe = parse(["--model", folder, "--corpus", arguments.corpus, "--output_dir", "-", "--book_share", "0"])
    recipe.chunks, kinds = arguments.chunks, recipe.kinds
    heads, told = {}, {}
    if arguments.head_texts:
        source = load(arguments.source or str(packaged_file() or hub_folder()), torch.float32)
        source.set_attn_implementation("eager")
        heads = {kind: attention_to_answers(source, tokenizer, haystack, kind, arguments).tolist() for kind in kinds}
    for name, model in named:
        for kind in tqdm(kinds, desc=name):
            recipe.kinds = [kind]
            rows = Rows(model, tokenizer, haystack, recipe, arguments.seed)
            gates = {n: weight.clone() for n, weight in model.named_parameters() if n.endswith(".gate")}
            told.setdefault(name, {})[kind] = reading(model, rows, range(arguments.texts), arguments.tail)
            model.load_state_dict(gates, strict=False)
    report = {"command": command(__file__), "environment": environment(threads=torch.get_num_threads())}
    report |= {"heads": heads, "reading": told}
    write_report(arguments.output, report, markdown(report))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
