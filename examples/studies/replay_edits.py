"""Real edits of functions, replayed on what is cached: how far it drifts from the new text read anew; its costs.

    python examples/studies/replay_edits.py --edits DATA/code/py_stdlib_edits.jsonl.gz --checkpoint MODEL

Each row of the data is a function before and after a change; what differs is replayed hunk by hunk, the last first.

    document        `model.open`: the new tokens see both sides, all others keep what they knew
    max_drift x     the same, refreshing by itself
    PIE             (arXiv:2407.03157) a causal reading; the new tokens see what is left of them, the keys right of the
                    change are rotated to their new places and keep what they knew
    from the edit   the causal reading again from the first changed token on: exact
    anew            the document opened anew: exact

Drift is KL(fresh || cached) in nats of the next token, of the same kind of reading: mean over places spread over the
text, as the cache stands (left), and at the end of the text once its last token is read again (right). The model must
have rotary positions: PIE is about these. Time is of the processor, in one thread.
"""

import difflib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean, median

import torch
from report import RESULTS, command, environment, write_report
from transformers import AutoTokenizer, HfArgumentParser

from modeling_insnext import InsertionCache, InsNextForInsertionLM
from modeling_insnext.insnext.attention import Interval
from modeling_insnext.insnext.document import changed_run
from modeling_insnext.runs import read_rows


PLACES = 16


@dataclass
class ReplayArguments:
    edits: str = field(metadata={"help": "Rows of before and after, .jsonl.gz."})
    checkpoint: str = field(metadata={"help": "An InsNeXt model with rotary positions."})
    output: str = field(default=f"{RESULTS}/replay_edits", metadata={"help": "Writes .json and .md."})
    count: int = field(default=30, metadata={"help": "Changed functions, spread over the data."})
    longest: int = field(default=80, metadata={"help": "Tokens of a function, before and after."})
    max_drift: float = field(default=0.5, metadata={"help": "Of the document that refreshes by itself."})
    keystroke_tokens: int = field(default=200, metadata={"help": "Length of the document that is typed into."})


class CausalFile:
    """A file read from left to right with its cache; keys are kept without positions, so reading them is PIE's turn.

    Args:
        model: An `InsNextForInsertionLM` with rotary positions.
        ids: The tokens.
    """

    def __init__(self, model, ids: list[int]):
        self.model, self.cache, self.ids, self.encoded = model, InsertionCache(1), [], 0
        self.hidden = torch.zeros(0, model.config.hidden_size, dtype=model.dtype)
        self._read(ids)

    def _read(self, ids: list[int]) -> None:
        """Read tokens behind those in the cache."""
        entries = self.cache.entries(len(ids))
        positions = torch.arange(int(entries[0, -1]) + 1)[None]
        interval = Interval(positions, torch.zeros_like(entries), entries, entries, ranked=True)
        output = self.model.model(torch.tensor([ids]), interval=interval, past_key_values=self.cache)
        self.hidden = torch.cat([self.hidden, output.last_hidden_state[0]])
        self.ids, self.encoded = self.ids + ids, self.encoded + len(ids)

    def cut(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.cache.crop(torch.tensor([length]))
        self.ids, self.hidden = self.ids[:length], self.hidden[:length]

    def edit(self, ids: list[int]) -> None:
        """Become other tokens, the unchanged ones right of the change as PIE keeps them."""
        first, last, tokens = changed_run(self.ids, ids)
        kept = torch.arange(last, len(self.ids))
        columns, hidden = self.cache.columns(kept), self.hidden[last:]
        self.cut(first)
        if tokens:
            self._read(tokens)
        entries = self.cache.entries(len(kept))
        # written as they are: it is the reader who turns keys
        for layer, (keys, values) in zip(self.cache.layers, columns, strict=True):
            layer.write(keys, values, entries, max(layer.get_seq_length(), int(self.cache.lengths) + len(kept)))
        self.cache.advance(len(kept))
        self.ids, self.hidden = list(ids), torch.cat([self.hidden, hidden])

    def reread(self, ids: list[int]) -> None:
        """Become other tokens and read them from the first changed one on."""
        self.cut(min(changed_run(self.ids, ids)[0], len(ids) - 1))
        self._read(ids[len(self.ids) :])

    def log_p(self, places: list[int]) -> torch.Tensor:
        """Return log p(next token | the text goes on), `[P, V]`."""
        hidden, head = self.hidden[places], self.model.slot_head
        return self.model.token_logits(head.token_state(head.at_the_right_edge(hidden)[0], hidden)).log_softmax(-1)

    def read_end(self) -> None:
        last = self.ids[-1]
        self.cut(len(self.ids) - 1)
        self._read([last])


class LiveFile:
    """The same of a document."""

    def __init__(self, model, tokenizer, text: str, **options):
        self.document = model.open(tokenizer, text, **options)

    @property
    def encoded(self) -> int:
        return self.document.encoded_tokens

    def log_p(self, places: list[int]) -> torch.Tensor:
        draft, model = self.document.draft, self.document.model
        states = model.slot_head.token_state(draft.slots[0, draft.order()[places]], draft.state)
        return model.token_logits(states).log_softmax(-1)

    def read_end(self) -> None:
        draft = self.document.draft
        draft.replace(draft.size - 1, draft.size, self.document.ids[-1:])


def hunks(before: str, after: str) -> list[tuple[int, int, str]]:
    """Return (start, end, text) of the changes of one text into the other by lines, the last one first."""
    old, new = before.splitlines(True), after.splitlines(True)
    starts = [0]
    for line in old:
        starts.append(starts[-1] + len(line))
    found = [
        (starts[i], starts[j], "".join(new[k:m]))
        for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if tag != "equal"
    ]
    return found[::-1]


def changed_functions(path: str, tokenizer, count: int, longest: int) -> list[dict]:
    """Return rows whose two functions are short enough, spread over the file."""
    short = [
        row
        for row in read_rows(path)
        if all(len(tokenizer(row[key])["input_ids"]) <= longest for key in ("before", "after"))
    ]
    return short[:: max(len(short) // count, 1)][:count]


def divergence(fresh: torch.Tensor, cached: torch.Tensor) -> float:
    """Return the mean of KL(fresh || cached) over rows of log-probabilities; what can never stand there counts 0."""
    terms = torch.where(fresh.isneginf(), 0, fresh.exp() * (fresh - cached))
    return float(terms.sum(-1).mean())


def replay(model, tokenizer, row: dict, max_drift: float) -> Iterator[tuple[str, dict]]:
    """Yield for every way of keeping up with a row's change what it drifts and costs."""
    changes, texts = hunks(row["before"], row["after"]), [row["before"]]
    for start, end, text in changes:
        texts.append(texts[-1][:start] + text + texts[-1][end:])
    versions = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    old, ids = versions[0], versions[-1]
    places = sorted(set(torch.linspace(0, len(ids) - 1, PLACES).long().tolist()))

    def typed(file):
        for start, end, text in changes:
            file.document.replace(start, end, text)

    def turned(file):
        for version in versions[1:]:
            file.edit(version)

    start = time.process_time()
    fresh = {"live": LiveFile(model, tokenizer, row["after"])}
    yield "anew", {"drift": 0.0, "end": 0.0, "tokens": len(ids), "ms": 1000 * (time.process_time() - start)}
    fresh["causal"] = CausalFile(model, ids)
    ways = {
        "document": ("live", LiveFile(model, tokenizer, row["before"]), typed),
        f"max_drift {max_drift}": ("live", LiveFile(model, tokenizer, row["before"], max_drift=max_drift), typed),
        "PIE": ("causal", CausalFile(model, old), turned),
        "from the edit": ("causal", CausalFile(model, old), lambda file: file.reread(ids)),
    }
    for name, (kind, file, keep_up) in ways.items():
        encoded, start = file.encoded, time.process_time()
        keep_up(file)
        spent, tokens = time.process_time() - start, file.encoded - encoded
        drift = divergence(fresh[kind].log_p(places), file.log_p(places))
        file.read_end()
        end = divergence(fresh[kind].log_p([len(ids) - 1]), file.log_p([len(ids) - 1]))
        yield name, {"drift": drift, "end": end, "tokens": tokens, "ms": 1000 * spent}


def keystrokes(model, tokenizer, text: str, length: int) -> dict[str, float]:
    """Return what typing letters into a document costs beside a step of writing, medians."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: length - 1]
    document = model.open(tokenizer, tokenizer.decode(ids))
    costs, steps = [], []
    for place in torch.linspace(0, len(document.text), 10).long().tolist():
        tokens, passes, start = document.encoded_tokens, document.passes, time.process_time()
        document.insert(place, "e")
        spent = time.process_time() - start
        costs.append((1000 * spent, document.encoded_tokens - tokens, document.passes - passes))
        document.undo()
        # a step of writing encodes one token
        start = time.process_time()
        document.draft.replace(document.draft.size, document.draft.size, document.ids[-1:])
        steps.append(1000 * (time.process_time() - start))
        document.draft.replace(document.draft.size - 1, document.draft.size, [])
    ms, tokens, passes = (median(column) for column in zip(*costs, strict=True))
    most = max(cost[1] for cost in costs)
    return {"tokens": len(document.ids), "keystroke_ms": ms, "step_ms": median(steps), "encoded": tokens,
            "most_encoded": most, "passes": passes}  # fmt: skip


def table(rows: dict[str, list[dict]], keys: dict) -> str:
    """Return the rows as markdown."""
    lines = ["| kept up by | drift, all places | drift, end | tokens encoded | CPU ms |", "|---" * 5 + "|"]
    for name, results in rows.items():
        # a divergence of nothing is rounded to either side of 0
        drift, end, tokens, ms = (
            max(mean(row[key] for row in results), 0.0) for key in ("drift", "end", "tokens", "ms")
        )
        lines.append(f"| {name} | {drift:.4f} | {end:.4f} | {tokens:.1f} | {ms:.0f} |")
    typed = (
        "A letter typed into {tokens} tokens: {passes:.0f} pass over {encoded:.0f} tokens (at most {most_encoded}), "
        "{keystroke_ms:.0f} ms; a step of writing: {step_ms:.0f} ms."
    )
    return "\n".join(lines) + "\n\n" + typed.format(**keys)


@torch.no_grad()
def main(args: list[str] | None = None) -> dict:
    """Replay all edits, and write the table; returns the report."""
    (options,) = HfArgumentParser(ReplayArguments).parse_args_into_dataclasses(args)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = InsNextForInsertionLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    if model.config.position_encoding != "rotary":
        raise ValueError(f"PIE turns rotary keys, got position_encoding={model.config.position_encoding!r}")
    functions = changed_functions(options.edits, tokenizer, options.count, options.longest)
    rows = {}
    for row in functions:
        for name, result in replay(model, tokenizer, row, options.max_drift):
            rows.setdefault(name, []).append(result)
    keys = keystrokes(model, tokenizer, "\n".join(row["after"] for row in functions), options.keystroke_tokens)
    line = command(__file__, args).replace(options.edits, "DATA/code/py_stdlib_edits.jsonl.gz")
    report = {
        "command": line.replace(options.checkpoint, "MODEL"),
        "results": rows,
        "keystrokes": keys,
        "environment": environment(edits=len(functions), threads=1),
    }
    write_report(options.output, report, table(rows, keys))
    return report


if __name__ == "__main__":
    main()
