"""Tiny models, random canvases and a twin of `generate` that has no cache: it encodes the whole text at every step."""

import math
from functools import partial

import torch

from modeling_insnext.insnext.attention import alibi_slopes
from modeling_insnext.insnext.budget import Budget
from modeling_insnext.insnext.canvas import Canvas
from modeling_insnext.insnext.draft import Draft
from tests.support.insnext import BOS, EOS, PAD, tiny_model


VOCAB = 13
writing_model = partial(tiny_model, vocab_size=VOCAB, attn=None)


def canvas_of(rows, **fields):
    """Return a canvas from rows of (token, open) pairs, padded on the right."""
    width = max(map(len, rows))
    table = [[*row, *[(PAD, False)] * (width - len(row))] for row in rows]
    ids = torch.tensor([[token for token, _ in row] for row in table])
    slots = torch.tensor([[is_open for _, is_open in row] for row in table])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Canvas.from_ids(ids, mask, slots, **fields)


def draft_of(model, canvas, limit, **options):
    """Return an encoded canvas that may grow by `limit` tokens a row."""
    return Draft(model, canvas, Budget(canvas, torch.full_like(canvas.lengths, limit)), **options)


def row_of(canvas, row):
    """Return one row of a canvas without its padding."""
    length = int(canvas["attention_mask"][row].sum())
    cut = {}
    for name, tensor in canvas.items():
        if name == "continuation_mask":
            cut[name] = tensor
        else:
            cut[name] = tensor[row : row + 1] if name.startswith(("min_", "max_")) else tensor[row : row + 1, :length]
    return cut


class TextTwin:
    """One text that grows, its whole history encoded afresh whenever anything is asked of it.

    Attributes:
        ids: Tokens in insertion order.
        text: Entries from left to right.
        horizons: Last entry that each entry saw when it was encoded.
        gaps: Gap of the slot right of each entry, -1 where it is closed.
    """

    def __init__(self, model, ids, gaps):
        self.model = model
        self.ids, self.gaps = list(ids), list(gaps)
        self.text = list(range(len(ids)))
        self.horizons = [len(ids) - 1] * len(ids)
        self.together, self.encoded = len(ids), len(ids)
        self.struck = []
        self._encode(0)

    def _encode(self, first):
        """Note that the entries from `first` on were encoded together."""

    def insert(self, writes, step, ratio=None, window=None):
        """Write (slot, token) pairs in one step and apply the EBR rule."""
        for slot, token in writes:
            self.text.insert(self.text.index(slot) + 1, len(self.ids))
            self.ids.append(token)
            self.gaps.append(self.gaps[slot])
        length, count = len(self.ids), len(writes)
        self.horizons += [length - 1] * count
        self.encoded += count
        first = length - count
        if ratio is not None and length - self.together > ratio * self.together:
            block = length if window is None else min(length, max(window, count))
            first = length - block
            self.horizons[first:] = [length - 1] * block
            self.encoded += block - count
            self.together = length
            self.struck.append(step)
        self._encode(first)

    def tokens(self):
        return [self.ids[entry] for entry in self.text]

    def hidden(self):
        """Return the hidden states of all entries, `[N, D]`, from one forward pass."""
        ranks = torch.empty(1, len(self.ids), dtype=torch.long)
        ranks[0, self.text] = torch.arange(len(self.ids))
        interval = {"positions": ranks, "horizon": torch.tensor([self.horizons])}
        return self.model.model(torch.tensor([self.ids]), **interval).last_hidden_state[0]

    @torch.no_grad()
    def scores(self):
        """Return logits of the slots by entry, of STOP, and of the tokens in each slot `[N, V]`."""
        hidden = self.hidden()
        head, config = self.model.slot_head, self.model.config
        state = hidden[-1]
        right = [None] * len(self.ids)
        for place, entry in enumerate(self.text):
            right[entry] = head.edge if place == len(self.text) - 1 else hidden[self.text[place + 1]]
        slots = torch.stack([head.left_proj(a) + head.right_proj(b) for a, b in zip(hidden, right, strict=True)])
        query, cap = head.query_proj(state), head.cap
        scale = math.sqrt(config.hidden_size)

        def capped(score):
            return cap * torch.tanh(score / scale / cap)

        logits = head.norm(slots + head.state_proj(state)) @ self.model.model.embed_tokens.weight.T
        logits[:, [PAD, BOS, EOS]] = -math.inf
        return capped(head.key_proj(slots) @ query), capped(head.stop_key @ query), logits


class HandTwin(TextTwin):
    """A twin with keys and values in lists, every block encoded by hand: what `ebr_window` means, in plain Python.

    Where a window cuts an older block, the tokens before the cut keep what they saw of the tokens behind it; no single
    forward pass has that.
    """

    @torch.no_grad()
    def _encode(self, first):
        encoder, config = self.model.model, self.model.config
        heads, width = config.num_attention_heads, config.head_dim
        if first == 0:
            self.pairs, self.final = [[] for _ in encoder.layers], []
        offsets = torch.tensor([self._offsets(i, first) for i in range(first, len(self.ids))])
        left, right = alibi_slopes(heads, config.alibi_slope_ratio)[..., None, None]
        bias = torch.where(offsets < 0, left * offsets, -right * offsets)
        hidden = encoder.embed_tokens(torch.tensor(self.ids[first:]))
        for layer, pairs in zip(encoder.layers, self.pairs, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            del pairs[first:]
            pairs += zip(attention.k_proj(normed), attention.v_proj(normed), strict=True)
            keys, values = (torch.stack(side).view(-1, heads, width) for side in zip(*pairs, strict=True))
            query = attention.q_proj(normed).view(-1, heads, width)
            weights = (torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(width) + bias).softmax(-1)
            hidden = hidden + attention.o_proj(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        del self.final[first:]
        self.final += encoder.norm(hidden)

    def _offsets(self, i, first):
        """Return how far each entry stands from entry `i` among those that it sees, infinity where it does not."""
        causal = self.model.config.block_attention == "causal" and i < len(self.ids) - 1
        left = self.text[: self.text.index(i) + 1]
        seen = [j for j in self.text if j < first or j in left] if causal else self.text
        here = seen.index(i)
        return [float(seen.index(j) - here) if j in seen else math.inf for j in range(len(self.ids))]

    def hidden(self):
        return torch.stack(self.final)


def greedy_twin(model, ids, slot_mask, limit, ratio=None, window=None, parallel=1):
    """Write greedily without a cache; return the text, the steps and the twin."""
    gaps, opened = [], 0
    for is_open in slot_mask:
        gaps.append(opened if is_open else -1)
        opened += bool(is_open)
    twin = HandTwin(model, ids, gaps) if window else TextTwin(model, ids, gaps)
    steps = [-1] * len(ids)
    step = 0
    while len(twin.ids) < len(ids) + limit:
        slots, stop, tokens = twin.scores()
        choices = sorted((-float(slots[entry]), entry) for entry in range(len(twin.ids)) if twin.gaps[entry] >= 0)
        better = [entry for score, entry in choices if -score > float(stop)][:parallel]
        better = better[: len(ids) + limit - len(twin.ids)]
        if not better:
            break
        step += 1
        twin.insert([(entry, int(tokens[entry].argmax())) for entry in better], step, ratio, window)
        steps += [step] * len(better)
    return twin.tokens(), [steps[entry] for entry in twin.text], twin
