"""Training throughput of InsNeXt: one step of forward, backward and AdamW, by attention implementation and context.

    PYTHONPATH=.:kernels python kernels/benchmarks/training.py

Weights and optimizer are bfloat16, texts random and written in a random order, every step supervised. `compiled` means
that each block is compiled alone. The share of the matmul peak counts what the model must multiply once forward and
twice backward; recomputation counts as time only. The profile is that of the first row that ran.
"""

import torch
from timing import DEVICE, Clock, ceilings, main, markdown, median_ms, peak_mb, synchronize
from torch import nn

from modeling_insnext import InsNextConfig, InsNextForInsertionLM


GOAL = 400_000  # tokens a second at context 1024
COLUMNS = {
    "attention": "attention", "compiled": "blocks compiled", "context": "context", "texts": "texts a step",
    "step_ms": "step ms", "tokens_s": "tokens/s", "peak_gb": "peak GB", "share": "share of matmul peak",
    "note": "note",
}  # fmt: skip


def batch_of(texts: int, context: int, vocab_size: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocab_size, (texts, context), device=DEVICE)
    ids[:, 0] = 1
    order = torch.rand(texts, context - 1, device=DEVICE).argsort(1) + 1
    positions = torch.cat([torch.zeros_like(ids[:, :1]), order], 1)
    return {"input_ids": ids, "positions": positions, "context_length": 1, "labels": ids}


def operations(model: InsNextForInsertionLM, texts: int, context: int) -> float:
    """Return the operations of one step: 6 for each weight and token, 12 for each seen pair of tokens and width."""
    weights = sum(x.weight.numel() for x in model.modules() if isinstance(x, nn.Linear))
    # a token has two slots: their keys are made twice
    weights += model.slot_head.key_proj.weight.numel()
    pairs = context * (context + 1) / 2
    config = model.config
    # half of all slots are alive at a time, as many as there are tokens: one product, where attention has two
    products = config.num_hidden_layers + 0.5
    return texts * (6 * weights * context + 12 * pairs * config.hidden_size * products)


def step_of(model, optimizer, batch):
    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(config, attention: str, compiled: bool, texts: int, context: int, peak: float) -> tuple[dict, object]:
    """Return a row and the step it timed; where memory is short, of half as many texts."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = InsNextForInsertionLM(config).to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32).train()
    model.set_attn_implementation(attention)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=DEVICE == "cuda")
    row = {"attention": attention, "compiled": compiled, "context": context}
    while True:
        step = step_of(model, optimizer, batch_of(texts, context, config.vocab_size))
        try:
            step()
            row["step_ms"] = median_ms(step, 1500, 20)
            break
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            if texts == 1:
                return {**row, "texts": 1, "note": "out of memory"}, None
            texts //= 2
    memory = peak_mb(step)
    row |= {
        "texts": texts,
        "tokens_s": texts * context / row["step_ms"] * 1e3,
        "peak_gb": None if memory is None else torch.cuda.max_memory_allocated() / 2**30,
        "share": operations(model, texts, context) / row["step_ms"] / 1e9 / peak,
    }
    return row, step


def top_ten(step) -> list[dict]:
    """Return the ten kernels that one step spends most time in."""
    activity = torch.profiler.ProfilerActivity.CUDA if DEVICE == "cuda" else torch.profiler.ProfilerActivity.CPU
    step()
    synchronize()
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        synchronize()
    attribute = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events)
    return [
        {
            "kernel": event.key[:100],
            "calls": event.count,
            "ms": getattr(event, attribute) / 1e3,
            "share": getattr(event, attribute) / total,
        }
        for event in events[:10]
    ]


def cases(smoke: bool) -> list[tuple[str, bool, int, int]]:
    """Return attention, compiled, texts and context; what the goal asks about comes first."""
    if smoke:
        return [("insnext_triton", False, 1, 16), ("sdpa", False, 2, 16)]
    chosen = [("insnext_triton", True, 32, 1024), ("insnext_triton", True, 8, 4096)]
    chosen += [("sdpa", True, 32, 1024), ("flex_attention", True, 32, 1024), ("insnext_triton", False, 32, 1024)]
    chosen += [("sdpa", True, 8, 4096), ("flex_attention", True, 8, 4096), ("eager", True, 32, 1024)]
    return [*chosen, ("eager", True, 8, 4096)]


def run(smoke: bool, seconds: float = 120) -> dict:
    tiny = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = InsNextConfig(**tiny, num_attention_heads=2) if smoke else InsNextConfig.preset("base")
    clock, peaks, rows, profile = Clock(seconds), ceilings(smoke), [], []
    for attention, compiled, texts, context in cases(smoke):
        if clock.over():
            break
        try:
            row, step = measure(config, attention, compiled, texts, context, peaks["matmul_tflops"])
        except Exception as error:  # one implementation that fails must not hide the others
            row, step = {"attention": attention, "compiled": compiled, "context": context, "texts": texts}, None
            row["note"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        if not profile and step is not None:
            profile = top_ten(step)
        del step
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows, "profile": profile, "ceilings": peaks, "goal": GOAL, "cut_short": clock.over()}


def table(result: dict) -> str:
    text = markdown(result["rows"], COLUMNS) + f"\nGoal at context 1024: {result['goal']:,} tokens/s.\n"
    if result["profile"]:
        text += "\nTop ten of one step of the first row that ran:\n\n" + markdown(result["profile"])
    return text


if __name__ == "__main__":
    main(run, table)
