"""What one step of insertion costs the 573M model: batch 1 and 32, static cache, EBR on and off.

    PYTHONPATH=.:kernels python kernels/benchmarks/decode.py

A step encodes the token written last, makes its two slots, scores all slots and STOP, takes the best slot, scores the
vocabulary in it and takes the best token: what a server has to do, in one replayed graph. EBR encodes the text anew
each time it has doubled; its cost is spread over all steps. `generate` is measured as it is, its choices and checks
in Python included. Weights are random.
"""

import time

import torch
from timing import DEVICE, Clock, ceilings, main, markdown, median_ms, synchronize

from modeling_insnext import InsNextConfig, InsNextForInsertionLM
from modeling_insnext.insnext.attention import Interval
from modeling_insnext.insnext.cache import InsertionCache


GOALS = {"step_ms": 1.0, "ebr_share": 0.15}  # at batch 1
COLUMNS = {
    "what": "what", "attention": "attention", "B": "batch", "filled": "tokens", "step_ms": "step ms",
    "floor_ms": "weights over bandwidth, ms", "ebr_share": "EBR adds", "note": "note",
}  # fmt: skip


class UncheckedCache(InsertionCache):
    """A static cache that asks the GPU nothing, so that a graph can be captured; the caller minds its length."""

    @property
    def longest(self) -> int:
        return 0


class Step:
    """One step of insertion on tensors that stay where they are.

    Args:
        model: An `InsNextForInsertionLM`.
        B: Texts that grow together.
        capacity: Length of the cache.
        filled: Tokens that the texts hold.
        encoder: What encodes one token: `model.model` or a compiled form of it.
    """

    def __init__(self, model, B: int, capacity: int, filled: int, encoder):
        self.model, self.head, self.encoder = model, model.slot_head, encoder
        self.cache = UncheckedCache(B, capacity, DEVICE)
        self.ids = torch.randint(3, model.config.vocab_size, (B, 1), device=DEVICE)
        order = torch.rand(B, capacity, device=DEVICE).argsort(1)
        last = torch.full((B, 1), filled, device=DEVICE)
        self.interval = Interval(order, torch.zeros_like(last), last.clone(), last.clone())
        self.keys = torch.randn(B, capacity, model.config.hidden_size, device=DEVICE, dtype=model.dtype)
        self.slots, self.right = torch.randn_like(self.keys), torch.randn_like(self.keys)
        self.alive = torch.arange(capacity, device=DEVICE) < filled
        with torch.no_grad():
            # makes the buffers; their content is random, which costs the same
            self.cache.lengths += filled
            self.encode(model.model)
            for layer in self.cache.layers:
                layer.keys.normal_()
                layer.values.normal_()

    def encode(self, encoder) -> torch.Tensor:
        return encoder(
            input_ids=self.ids, interval=self.interval, past_key_values=self.cache, advance_cache=False
        ).last_hidden_state[:, 0]

    @torch.no_grad()
    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        head, state = self.head, self.encode(self.encoder)
        entry = self.interval.entries_BQ
        left, right = head.sides(state)
        self.right.scatter_(1, entry[..., None].expand(-1, -1, right.shape[1]), right[:, None])
        # the slot right of the new token, and the one left of it, that its left neighbour keeps
        for where, slot in ((entry, left + self.right[:, 0]), (entry - 1, self.slots[:, 0] + right)):
            index = where[..., None].expand(-1, -1, slot.shape[1])
            self.slots.scatter_(1, index, slot[:, None])
            self.keys.scatter_(1, index, head.key_proj(slot)[:, None])
        query = head.query_proj(state)
        scores = head.position_logits(query[:, None], self.keys)[:, 0].masked_fill(~self.alive, -torch.inf)
        best = torch.cat([scores, head.stop_logit(query)[:, None]], 1).argmax(1).clamp_max(self.keys.shape[1] - 1)
        chosen = self.slots[torch.arange(len(best), device=best.device), best]
        return best, self.model.lm_head(head.token_state(chosen, state)).argmax(1)


def captured(step):
    """Return the replay of a graph of one step; on a CPU the step."""
    if DEVICE == "cpu":
        return step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def ebr_ms(model, B: int, steps: int) -> float:
    """Return the milliseconds that encoding anew at 2, 4, 8, ... tokens adds to each of `steps` steps."""
    total, length = 0.0, 2
    with torch.no_grad():
        while length <= steps:
            ids = torch.randint(3, model.config.vocab_size, (B, length), device=DEVICE)
            order = torch.rand(B, length, device=DEVICE).argsort(1)
            first = torch.zeros_like(ids)
            entries = torch.arange(length, device=DEVICE).expand(B, -1)
            interval = Interval(order, first, first + length - 1, entries)
            total += median_ms(lambda i=ids, x=interval: model.model(input_ids=i, interval=x), 60, 20)
            length *= 2
    return total / steps


def generate_ms(model, B: int, tokens: int, **options) -> float:
    """Return milliseconds for each step of `generate`."""
    ids = torch.tensor([[1, 5, 6]], device=DEVICE).repeat(B, 1)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "use_cache": True} | options
    started = time.perf_counter()
    model.generate(ids, **options)
    synchronize()
    return (time.perf_counter() - started) / tokens * 1e3


def run(smoke: bool, seconds: float = 120) -> dict:
    tiny = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = InsNextConfig(**tiny, num_attention_heads=2) if smoke else InsNextConfig.preset("advanced")
    capacity, steps = (32, 16) if smoke else (1024, 512)
    clock, peaks, rows = Clock(seconds), ceilings(smoke), []
    torch.manual_seed(0)
    model = InsNextForInsertionLM(config).to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32).eval()
    floor = sum(x.numel() * x.element_size() for x in model.parameters()) / peaks["copy_gb_s"] / 1e6
    attentions = ("eager",) if smoke else ("insnext_triton", "sdpa")

    def attempt(what, attention, B, function, **more) -> None:
        row = {"what": what, "attention": attention, "B": B, "filled": capacity // 2, "floor_ms": floor, **more}
        if clock.over():
            return
        try:
            row |= function()
        except Exception as error:  # one way that fails must not hide the others
            row["note"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)

    def network_step(B, attention, compiled):
        model.set_attn_implementation(attention)
        torch._dynamo.reset()
        encoder = torch.compile(model.model, dynamic=False) if compiled else model.model
        step_ms = median_ms(captured(Step(model, B, capacity, capacity // 2, encoder)), 200)
        return {"step_ms": step_ms, "ebr_share": ebr_ms(model, B, steps) / step_ms}

    for attention in attentions:
        for B in (1, 32):
            attempt("graph", attention, B, lambda b=B, a=attention: network_step(b, a, False))
    for B in (1, 32):
        for ebr in (False, True):
            options = {"ebr": ebr, "ebr_ratio": 1.0} if ebr else {"ebr": False}
            attempt(
                f"generate, EBR {'on' if ebr else 'off'}", attentions[0], B,
                lambda b=B, o=options: {"step_ms": generate_ms(model, b, 8 if smoke else 48, **o)}, filled="3 and up",
            )  # fmt: skip
    if not smoke:
        for B in (1, 32):
            attempt("compiled, graph", attentions[0], B, lambda b=B: network_step(b, attentions[0], True))
    return {"rows": rows, "ceilings": peaks, "goals": GOALS, "cut_short": clock.over()}


def table(result: dict) -> str:
    goals = result["goals"]
    text = f"\nGoals at batch 1: {goals['step_ms']} ms a step, EBR adds at most {goals['ebr_share']:.0%}.\n"
    return markdown(result["rows"], COLUMNS) + text


if __name__ == "__main__":
    main(run, table)
