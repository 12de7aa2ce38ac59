"""What a long context is worth to DRT, and what it costs: perplexity by context length, decoding by context length.

    python examples/studies/evaluate_drt.py --models drt=examples/checkpoints/drt-mini window=runs/window/final \
        --text data/books/valid.npy --output examples/studies/results/drt

Perplexity: the same `--targets` tokens at the same places of the held-out text are predicted behind contexts of
different lengths, so that columns differ in nothing else; ± is half of a 95 % interval over the places, paired where
models are compared. Decoding: a text of that length is read once (chunk memory where `--location` says), then
`--steps` tokens are decoded one by one; bytes are what the cache holds after that, on the device and off it, beside
what the complete chunks must take: two vectors of all key heads a token.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from needle_in_a_haystack import load
from report import command, environment, write_report
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from modeling_insnext import ChunkMemoryCache


@dataclass
class Arguments:
    models: list[str] = field(metadata={"help": "name=folder; decoding is measured for the first."})
    text: str = field(metadata={"help": "Token ids of held-out text, .npy (prepare_books.py)."})
    contexts: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096, 16384])
    places: int = field(default=64, metadata={"help": "Places of the text that are predicted."})
    targets: int = field(default=128, metadata={"help": "Tokens predicted at each place."})
    decode_contexts: list[int] = field(default_factory=lambda: [4096, 65536, 1048576])
    steps: int = field(default=256, metadata={"help": "Tokens decoded, a multiple of the chunk size."})
    location: str = field(default="host", metadata={"help": "Where chunks lie: device, host or disk."})
    searches: list[str] = field(default_factory=lambda: ["exact"], metadata={"help": "exact, faiss, or both."})
    segment_length: int = 16384
    output: str = field(default="runs/drt", metadata={"help": "Writes .json and .md."})


@torch.no_grad()
def losses(model, text: np.ndarray, context: int, arguments: Arguments, progress) -> np.ndarray:
    """Return the mean loss in nats of each place."""
    longest = max(arguments.contexts)
    ends = np.linspace(longest, len(text) - arguments.targets, arguments.places).astype(int)
    rows = max(1, 16384 // context)
    found = []
    for first in range(0, len(ends), rows):
        batch = np.stack([text[end - context : end + arguments.targets] for end in ends[first : first + rows]])
        ids = torch.from_numpy(batch.astype(np.int64)).to(model.device)
        logits = model(ids, use_cache=False, logits_to_keep=arguments.targets + 1).logits[:, :-1].float()
        target = ids[:, -arguments.targets :]
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1))
        progress.update(len(batch))
    return torch.cat(found).cpu().numpy()


def half_interval(values: np.ndarray) -> float:
    return float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def perplexities(models, text, arguments: Arguments) -> dict:
    total = len(models) * len(arguments.contexts) * arguments.places
    with tqdm(total=total, unit="place", desc="perplexity") as progress:
        by_model = {
            name: {context: losses(model, text, context, arguments, progress) for context in arguments.contexts}
            for name, model, _ in models
        }
    first = by_model[models[0][0]]
    return {
        name: {
            str(context): {
                "loss": float(loss.mean()),
                "half_interval": half_interval(loss),
                "difference": float((loss - first[context]).mean()),
                "difference_half_interval": half_interval(loss - first[context]) if loss is not first[context] else 0,
            }
            for context, loss in by_context.items()
        }
        for name, by_context in by_model.items()
    }


@torch.no_grad()
def decoding(model, text: np.ndarray, context: int, search: str, arguments: Arguments) -> dict:
    """Return times and bytes of decoding behind `context` tokens."""
    ids = torch.from_numpy(np.resize(text, context).astype(np.int64))[None].to(model.device)
    past = ChunkMemoryCache(model.config, location=arguments.location, search=search, crop_margin=0)
    start = time.perf_counter()
    model.prefill(
        ids, past_key_values=past, segment_length=arguments.segment_length, lower_only=True, show_progress=True
    )
    prefill = time.perf_counter() - start
    times = []
    token = ids[:, -1:]
    for _ in range(arguments.steps):
        start = time.perf_counter()
        token = model(token, past_key_values=past).logits[:, -1:].argmax(-1)
        if token.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    config = model.config
    chunks = (context + arguments.steps) // config.chunk_size
    vectors = chunks * 2 * config.chunk_size * config.memory_heads * config.head_dim
    return {
        "prefill_s": prefill,
        "step_ms": float(np.mean(times)),
        "median_step_ms": float(np.median(times)),
        "device_bytes": past.device_bytes(),
        "landmark_bytes": past.memory.device_bytes() if past.memory.slab is not None else 0,
        "host_bytes": past.host_bytes(),
        "computed_bytes": vectors * torch.finfo(model.dtype).bits // 8,
    }


def markdown(report: dict) -> str:
    contexts, first = report["contexts"], next(iter(report["perplexity"]))
    lines = [
        "| perplexity, context | " + " | ".join(f"{c:,}" for c in contexts) + " |",
        "|---" * (len(contexts) + 1) + "|",
    ]
    for name, by_context in report["perplexity"].items():
        cells = []
        for context in contexts:
            cell = by_context[str(context)]
            text = f"{np.exp(cell['loss']):.2f}"
            if name != first:
                text += f" ({cell['difference']:+.3f} ± {cell['difference_half_interval']:.3f} nats)"
            cells.append(text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| decoding behind | search | step, mean | median | cache on device | of it landmarks | off it (computed) | "
        "prefill |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for search, context, cell in (
        (search, *item) for search, cells in report["decoding"].items() for item in cells.items()
    ):
        lines.append(
            f"| {int(context):,} tokens | {search} | {cell['step_ms']:.2f} ms | {cell['median_step_ms']:.2f} ms | "
            f"{cell['device_bytes'] / 1e6:.2f} MB | {cell['landmark_bytes'] / 1e6:.2f} MB | "
            f"{cell['host_bytes'] / 1e6:.1f} MB ({cell['computed_bytes'] / 1e6:.1f}) | {cell['prefill_s']:.1f} s |"
        )
    return "\n".join(lines)


def main(arguments: Arguments) -> None:
    models = [load(argument) for argument in arguments.models]
    text = np.load(arguments.text, mmap_mode="r")
    report = {
        "command": command(__file__),
        "environment": environment(threads=torch.get_num_threads()),
        "contexts": arguments.contexts,
        "perplexity": perplexities(models, text, arguments),
        "decoding": {
            search: {str(n): decoding(models[0][1], text, n, search, arguments) for n in arguments.decode_contexts}
            for search in arguments.searches
        },
    }
    write_report(arguments.output, report, markdown(report))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
