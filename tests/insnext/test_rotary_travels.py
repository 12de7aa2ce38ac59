"""Rotary positions compiled, and in a folder that is loaded without the package."""

import json

import torch

from modeling_insnext import InsertionCache
from modeling_insnext.insnext.attention import Interval
from tests.insnext.test_rotary import rotary_model
from tests.support.built_text import random_text
from tests.support.clean_process import run_clean
from tests.support.equality import difference, same_bits
from tests.support.insnext import random_ids


CONTEXT, LENGTH = 5, 12
TEXT, POSITIONS = random_text(LENGTH, CONTEXT, torch.Generator().manual_seed(3))


def step_by_step(model, encode):
    """Return the states of all tokens, the written ones encoded by `encode` one by one behind a static cache."""
    cache = InsertionCache(1, 16)
    states = []
    for first, last in [(0, CONTEXT), *((i, i + 1) for i in range(CONTEXT, LENGTH))]:
        ranks = torch.zeros(1, 16, dtype=torch.long)
        ranks[:, :last] = POSITIONS[:, :last].argsort(1).argsort(1)
        entries = torch.arange(first, last)[None]
        interval = Interval(ranks, torch.zeros_like(entries), torch.full_like(entries, last - 1), entries, ranked=True)
        run = encode if first else model
        out = run(input_ids=TEXT[:, first:last], past_key_values=cache, interval=interval, advance_cache=False)
        cache.advance(last - first)
        states.append(out.last_hidden_state)
    return torch.cat(states, 1)


@torch.no_grad()
def test_steps_are_compiled_once_and_are_the_same():
    model = rotary_model("yarn", attn="sdpa").model
    expected = model(TEXT, positions=POSITIONS, context_length=CONTEXT).last_hidden_state
    seen = []

    def counting(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=False)
    assert difference(step_by_step(model, compiled), expected) < 1e-9
    assert len(seen) == 1
    # control: a step of another width is another graph
    entries = torch.arange(2)[None]
    wider = Interval(torch.arange(16)[None], torch.zeros_like(entries), torch.ones_like(entries), entries, ranked=True)
    compiled(input_ids=TEXT[:, :2], past_key_values=InsertionCache(1, 16), interval=wider, advance_cache=False)
    assert len(seen) == 2


@torch.no_grad()
def test_a_compiled_pass_over_any_order_is_the_same():
    model = rotary_model(attn="sdpa").model
    read = {"positions": POSITIONS, "context_length": CONTEXT}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    expected = model(TEXT, **read).last_hidden_state
    assert difference(compiled(TEXT, **read).last_hidden_state, expected) < 1e-9
    read["positions"] = POSITIONS.roll(1, 1)
    assert difference(compiled(TEXT, **read).last_hidden_state, expected) > 1e-3


IN_THE_CLEAN_PROCESS = """
import json
import torch
from transformers import AutoModelForCausalLM

canvas, ids = (torch.tensor(x) for x in json.loads(sys.argv[1]))
found = {}
for attention in ("eager", "sdpa"):
    model = AutoModelForCausalLM.from_pretrained("lm", trust_remote_code=True, attn_implementation=attention)
    with torch.no_grad():
        logits = model(ids).logits.tolist()
    options = {"slot_mask": torch.ones_like(canvas, dtype=torch.bool), "min_new_tokens": 8, "max_new_tokens": 8}
    found[attention] = [logits, model.generate(canvas, **options, ebr=True, ebr_ratio=0.5).tolist()]
print("FOUND" + json.dumps(found))
"""


def test_remote_code_reads_and_writes_as_the_package(tmp_path):
    model = rotary_model("llama3", attn="sdpa", dtype=torch.float64)
    canvas, ids = torch.tensor([[1, 5, 6, 7]]), random_ids(2, 9, vocab_size=23)
    model.save_pretrained(tmp_path / "lm")
    done = run_clean(IN_THE_CLEAN_PROCESS, tmp_path, json.dumps([canvas.tolist(), ids.tolist()]))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND")[1])
    options = {"slot_mask": torch.ones_like(canvas, dtype=torch.bool), "min_new_tokens": 8, "max_new_tokens": 8}
    written = model.generate(canvas, **options, ebr=True, ebr_ratio=0.5)
    with torch.no_grad():
        text = [i for i in range(23) if i not in model.config.never_inserted]
        expected = model(ids).logits[..., text]
        model.model.rope = model.model.rope._replace(frequencies=[1.1 * f for f in model.model.rope.frequencies])
        other = model(ids).logits[..., text]
    for logits, tokens in found.values():
        theirs = torch.tensor(logits, dtype=torch.float64)[..., text]
        assert difference(theirs, expected) < 1e-9 < 1e-4 < difference(theirs, other)
        assert same_bits(torch.tensor(tokens), written)
