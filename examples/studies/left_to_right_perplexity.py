r"""Perplexity from left to right of an insertion model beside its source: log p(token | the text goes on).

    python examples/studies/left_to_right_perplexity.py SOURCE MODEL --data_file lm/wikitext2_valid.txt.gz

MODELs are folders, names on the Hub, or GGUF files (which need the package gguf), the same tokenizer to all of them,
the last one's. What an insertion model says is taken given that the text does not stop; ids that frame its texts,
which it never writes, have probability 0 in all models. The text, behind one BOS, is cut into windows of --window
tokens whose first token is given. Prints one line of JSON a model.
"""

import argparse
import gzip
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_insnext import InsNextForInsertionLM


def load(name: str, dtype: torch.dtype):
    """Return a causal language model in a folder, on the Hub or in a GGUF file."""
    path = Path(name)
    if path.suffix != ".gguf":
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()


def read(path: str, tokenizer, tokens: int, window: int) -> torch.Tensor:
    """Return the first tokens of a text behind BOS, `[windows, window]`.

    Raises:
        ValueError: If the text is shorter than one window.
    """
    # a token has at least one character, and few have more than ten
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        text = file.read(10 * tokens)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:tokens]
    if len(ids) < window:
        raise ValueError(f"the text must have at least one window of {window} tokens, got {len(ids)}")
    return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)


@torch.no_grad()
def token_nats(model, ids: torch.Tensor, never: list[int]) -> torch.Tensor:
    """Return -log p(token | the text goes on, the token is text) of each token of a text but the first, float64."""
    log_p = model(ids[None]).logits[0, :-1].double()
    log_p[:, never] = -torch.inf
    return -log_p.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def nats_per_token(model, ids: torch.Tensor, never: list[int]) -> float:
    """Return the mean of -log p(token | the text goes on, the token is text)."""
    total = sum(token_nats(model, row, never).sum().item() for row in ids)
    return total / (ids.numel() - len(ids))


def main(argv: list[str] | None = None) -> list[dict]:
    """Print and return what each model says of the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="the last one must be an insertion model")
    parser.add_argument("--data_file", required=True, help="a text, .gz or not")
    parser.add_argument("--tokens", type=int, default=8192, help="how much of it is read (default: 8192)")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are read together (default: 1024)")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16"])
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.models[-1])
    ids = read(args.data_file, tokenizer, args.tokens, args.window)
    reports = []
    # the last one says which ids frame a text
    for name in reversed(args.models):
        model = load(name, getattr(torch, args.dtype))
        if not reports:
            if not isinstance(model, InsNextForInsertionLM):
                raise ValueError(f"the last model must be an insertion model, got {type(model).__name__}")
            never = model.config.never_inserted
        nats = nats_per_token(model, ids, never)
        reports.append({"model": name, "tokens": ids.numel() - len(ids), "nats": nats, "perplexity": math.exp(nats)})
        print(json.dumps(reports[-1]), flush=True)
    return reports


if __name__ == "__main__":
    main()
