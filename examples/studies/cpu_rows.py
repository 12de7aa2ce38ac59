"""The rows of benchmark_cpu: each yields its two sides, or why it cannot be measured here."""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from step_clock import in_turns, random_text, write
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_insnext import DrtForCausalLM, InsNextConfig, InsNextForInsertionLM


@dataclass
class Sides:
    """Seconds (of memory: MiB / 1000) of each turn of both sides."""

    what: str
    against: str
    goal: float | None
    ours: np.ndarray
    theirs: np.ndarray


def load(args, name: str):
    """Return a model of the arguments in float32: `model`, `mini` or `source`."""
    model_class = AutoModelForCausalLM if name == "source" else InsNextForInsertionLM
    return model_class.from_pretrained(getattr(args, name), dtype=torch.float32).eval()


@torch.no_grad()
def continue_text(model, tokens: int, steps: int, rows: int = 1):
    """Write `steps` tokens behind a text, in several copies of it by sampling: the decoding loop of Transformers."""
    ids = random_text(model, 1, tokens)
    past = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=past, logits_to_keep=1)
    if rows > 1:
        past.batch_repeat_interleave(rows)
    options = {"do_sample": False} if rows == 1 else {"do_sample": True, "top_k": 0, "temperature": 1.0, "top_p": 1.0}
    lengths = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1, "pad_token_id": 0}
    return model.generate(ids.repeat(rows, 1), past_key_values=past, **lengths, **options)


def llama_like(model) -> LlamaForCausalLM:
    """Return a Llama of a model's sizes with weights of no meaning."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(
        **{name: getattr(model.config, name) for name in (*sizes, "num_key_value_heads", "max_position_embeddings")},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def steps_of(*jobs, single: bool = True) -> list[np.ndarray]:
    """Return the seconds of the steps of jobs, each a model, a function of it and its arguments, run in turns."""
    turns = [(model, partial(function, model, *more, **options)) for model, function, more, options in jobs]
    return [clock.steps(single) for clock in in_turns(*turns)]


def step_rows(args) -> Iterator[Sides]:
    """A cached step against a step of the source, and against itself in a short text."""
    for name, source in (("model", "its source"), ("mini", "a Llama of its sizes")):
        ours = load(args, name)
        theirs = load(args, "source") if name == "model" else llama_like(ours)
        for rows in args.batch_sizes:
            found, others = {}, {}
            for tokens in args.lengths:
                asked = (tokens, args.steps, rows)
                both = steps_of((ours, write, asked, {}), (theirs, continue_text, asked, {}))
                found[tokens], others[tokens] = both
                goal = GOALS.get(rows) if name == "model" else None
                yield Sides(f"{name}: step, {rows} rows, n = {tokens}", source, goal, *both)
            first, last = args.lengths[0], args.lengths[-1]
            for whose, seconds, goal in ((name, found, 1.3), (source, others, None)):
                sides = (np.sort(seconds[last]), np.sort(seconds[first]))
                yield Sides(f"{whose}: step, {rows} rows, n = {last}", f"n = {first}", goal, *sides)


def ebr_rows(args) -> Iterator[Sides]:
    """What EBR adds to a text from its first token on, and what a cache saves."""
    for name, tokens in (("model", 64), ("mini", 256)):
        model, tokens = load(args, name), args.steps if args.smoke else tokens
        job = (model, write, (4, tokens))
        on, off = steps_of((*job, {"ebr": True, "ebr_ratio": 1.0}), (*job, {}), single=False)
        sums = (seconds.sum(keepdims=True) for seconds in (on, off))
        yield Sides(f"{name}: {tokens} tokens, EBR at ratio 1", "EBR off", 1.15, *sums)
        yield anew_sides(args, name, model)


def anew_sides(args, name: str, model) -> Sides:
    """Writing a text with EBR at ratio 1 against encoding it anew at every step, from steps at some lengths.

    The sums over all lengths are those of straight lines between the lengths that are measured.
    """
    marks = args.lengths[:2] if args.smoke else [8, 128, 512]
    step, anew = [], []
    for tokens in marks:
        job = (model, write, (tokens, 5))
        once, whole = steps_of((*job, {}), (*job, {"ebr": True, "ebr_ratio": 0.0}), single=False)
        step.append(np.median(once))
        anew.append(np.median(whole))
    every = np.arange(1, marks[-1] + 1)
    struck = every[(every & (every + 1)) == 0]
    ours = np.interp(every, marks, step).sum() + np.interp(struck, marks, anew).sum()
    theirs = np.interp(every, marks, anew).sum()
    what = f"{name}: {marks[-1]} tokens, cache and EBR at ratio 1"
    return Sides(what, "encoding anew at every step", 1 / 8, np.array([ours]), np.array([theirs]))


def bookkeeping_rows(args) -> Iterator[Sides]:
    """A step of the small model without the products of its weights, against these."""
    model = load(args, "mini")
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(1, layer.in_features) for layer in layers]

    @torch.no_grad()
    def weights() -> float:
        began = time.thread_time()
        for layer, vector in zip(layers, inputs, strict=True):
            torch.nn.functional.linear(vector, layer.weight)
        return time.thread_time() - began

    for tokens in args.lengths[:2]:
        (step,) = steps_of((model, write, (tokens, args.steps), {}))
        alone = np.array([weights() for _ in step])
        what = f"mini: step without weights, n = {tokens}"
        yield Sides(what, "weights alone", None, step - np.median(alone), alone)


def beam_rows(args) -> Iterator[Sides]:
    """Four beams against four sampled rows."""
    for name in ("model", "mini"):
        model = load(args, name)
        tokens, steps = args.lengths[0], args.steps
        beams = (model, write, (tokens, steps), {"num_beams": 4})
        ours, theirs = steps_of(beams, (model, write, (tokens, steps, 4), {}))
        yield Sides(f"{name}: step, 4 beams, n = {tokens}", "4 rows of sampling", 1.3, ours, theirs)


def training_rows(args) -> Iterator[Sides | str]:
    """LoRA: one pass forward and back over 256 tokens, gap by gap, against causal LoRA of the source."""
    if importlib.util.find_spec("peft") is None:
        yield "peft is not installed"
        return
    from peft import LoraConfig, get_peft_model

    rows, tokens = (2, 16) if args.smoke else (1, 256)
    adapter = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
    models = [get_peft_model(load(args, name), LoraConfig(**adapter)).train() for name in ("model", "source")]
    ids = random_text(models[0], rows, tokens)
    context, rank = tokens // 4, torch.arange(tokens)
    # every fourth token is given, then what lies between them is written from left to right
    given = rank % 4 == 0
    order = torch.cat([rank[given], rank[~given]])
    insertion = {"input_ids": ids[:, order], "positions": order.expand(rows, -1), "context_length": context}
    batches = [insertion | {"labels": insertion["input_ids"]}, {"input_ids": ids, "labels": ids}]
    seconds, memory = [[], []], [[], []]
    for turn in range(1 + (1 if args.smoke else 2)):
        for side, (model, batch) in enumerate(zip(models, batches, strict=True)):
            reset_peak()
            held, began = peak(), time.process_time()
            model(**batch).loss.backward()
            model.zero_grad()
            if turn:
                seconds[side].append(time.process_time() - began)
                memory[side].append(max(peak() - held, 1e-3))
    what = f"model: LoRA, {rows} x {tokens} tokens"
    yield Sides(f"{what}, time", "causal LoRA of its source", 1.25, *map(np.array, seconds))
    if Path("/proc/self/clear_refs").exists():
        yield Sides(f"{what}, memory above the model", "causal LoRA of its source", 1.2, *map(np.array, memory))


def reset_peak() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> float:
    """Return the most memory that was resident since `reset_peak`, in MiB / 1000, the unit of `Sides`."""
    if not Path("/proc/self/status").exists():
        return 0.0
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024 / 1e3


def drt_rows(args) -> Iterator[Sides]:
    """A decoding step of DRT, of the source's weights, far behind the beginning, against the source's whole cache."""
    tokens, layers = (90, 1) if args.smoke else (4096, 4)
    source = load(args, "source")
    config = type(source.config).from_dict(
        source.config.to_dict() | {"num_hidden_layers": layers, "layer_types": None}
    )
    short = type(source)(config).eval()
    short.load_state_dict(source.state_dict(), strict=False)
    with tempfile.TemporaryDirectory() as folder:
        short.save_pretrained(f"{folder}/source")
        convert = [sys.executable, "-m", "conversion.from_llama", f"{folder}/source", f"{folder}/drt", "--to", "drt"]
        subprocess.run([*convert, "--sliding_window", "72" if args.smoke else "512"], check=True, capture_output=True)
        ours = DrtForCausalLM.from_pretrained(f"{folder}/drt", dtype=torch.float32).eval()
        asked = (tokens, args.steps)
        sides = steps_of((ours, continue_plainly, asked, {}), (short, continue_plainly, asked, {}))
    yield Sides(f"DRT of {layers} layers: step behind {tokens} tokens", "its source, whole cache", 1.2, *sides)


def continue_plainly(model, tokens: int, steps: int):
    """Write `steps` tokens behind a prompt."""
    lengths = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1, "pad_token_id": 0, "do_sample": False}
    return model.generate(random_text(model, 1, tokens), **lengths)


def loading_rows(args) -> Iterator[Sides]:
    """Import beside that of a model of Transformers, and loading weights, each several times."""
    times = int(not args.smoke) * 2 + 1
    plain = "from transformers import LlamaForCausalLM"
    imports = [[imported(code) for code in (f"{plain}; import modeling_insnext", plain)] for _ in range(times)]
    yield Sides("import modeling_insnext and a Llama", "import a Llama", 1.1, *np.array(imports).T)
    seconds = []
    for name in ("model", "source") * (times + 1):
        began = time.process_time()
        load(args, name)
        seconds.append(time.process_time() - began)
    # the first pair warms the disk
    yield Sides("model: load", "load of its source", 1.1, *np.array(seconds[2:]).reshape(-1, 2).T)


def imported(code: str) -> float:
    timed = f"import time; {code}; print(time.process_time())"
    return float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout)


def int8_rows(args) -> Iterator[Sides | str]:
    """Weights in int8 by torchao against float32."""
    if importlib.util.find_spec("torchao") is None:
        yield "torchao is not installed"
        return
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantised = TorchAoConfig(Int8WeightOnlyConfig())
    small = InsNextForInsertionLM.from_pretrained(args.model, dtype=torch.float32, quantization_config=quantised)
    tokens = args.lengths[0]
    asked = (tokens, args.steps)
    sides = steps_of((small.eval(), write, asked, {}), (load(args, "model"), write, asked, {}))
    yield Sides(f"model: step with int8 weights, n = {tokens}", "float32", 0.6, *sides)


def tiny_models(folder: Path) -> tuple[str, str, str]:
    """Save a tiny source, what is made of it and a small InsNeXt; return where they are."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    source, model, mini = (str(folder / name) for name in ("source", "model", "mini"))
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, tie_word_embeddings=True)).save_pretrained(source)
    InsNextForInsertionLM(InsNextConfig(**sizes, **heads, **tokens, position_encoding="rotary")).save_pretrained(model)
    InsNextForInsertionLM(InsNextConfig(**sizes, **heads, **tokens)).save_pretrained(mini)
    return source, model, mini


# goals of a step by rows
GOALS = {1: 1.15, 8: 1.25}
ROWS = {
    "steps": step_rows,
    "ebr": ebr_rows,
    "bookkeeping": bookkeeping_rows,
    "beams": beam_rows,
    "training": training_rows,
    "drt": drt_rows,
    "loading": loading_rows,
    "int8": int8_rows,
}
