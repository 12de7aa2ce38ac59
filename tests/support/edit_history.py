"""A document without a cache: its whole history, removed tokens included, is read in one pass."""

import torch
from transformers.cache_utils import DynamicCache

from modeling_insnext.insnext.attention import alibi_bias, alibi_slopes
from modeling_insnext.insnext.canvas_pieces import token_ids
from modeling_insnext.insnext.rotary import RotaryPairs
from tests.support.equality import relative_error


# float64: what is computed otherwise agrees to that in the norm, and a wrong rule is off by a million times more
EXACT = 1e-9


class EditHistory:
    """What a document is by definition: lists, and a pass that knows for every token the text it saw.

    Attributes:
        tokens: Every token that was ever encoded, in that order.
        snapshots: For each the text, as indices of tokens from left to right, right after its block was put in.
        text: The text now, likewise.
        encoded: Tokens that the document must have encoded.
        forgets: A wrong rule, for controls: removed tokens stay where they were for whom is encoded later.
    """

    def __init__(self, model, tokenizer, text, forgets=True):
        self.model, self.tokenizer, self.forgets = model, tokenizer, forgets
        self.tokens, self.snapshots, self.text, self.past = [], [], [], []
        self.encoded, self.shadow = 0, []
        self.block(0, 0, self.ids_of(text))

    def ids_of(self, text):
        return [self.tokenizer.bos_token_id, *(token_ids(self.tokenizer, text) if text else [])]

    def ids(self):
        return [self.tokens[index] for index in self.text]

    def block(self, first, last, tokens):
        """Replace the tokens from `first` to before `last`; the new ones are encoded together."""
        new = list(range(len(self.tokens), len(self.tokens) + len(tokens)))
        gone = self.text[first:last]
        self.text = [*self.text[:first], *new, *self.text[last:]]
        where = self.shadow.index(gone[0]) if gone else self.shadow.index(self.text[first - 1]) + 1 if first else 0
        self.shadow = [*self.shadow[:where], *new, *self.shadow[where:]]
        self.tokens += tokens
        seen = self.text if self.forgets else self.shadow
        self.snapshots += [self.seen_by(token, new, seen) for token in new]
        self.encoded += len(tokens)

    def seen_by(self, token, block, text):
        """Return what a token of a block sees: the text, in causal blocks without the block's tokens right of it."""
        if self.model.config.block_attention == "bidirectional" or token == block[-1]:
            return list(text)
        return [other for other in text if other <= token or other not in block]

    def become(self, ids):
        """Replace the smallest run that makes these the tokens."""
        mine, first = self.ids(), 0
        while first < min(len(mine), len(ids)) and mine[first] == ids[first]:
            first += 1
        last, end = len(mine), len(ids)
        while last > first and end > first and mine[last - 1] == ids[end - 1]:
            last, end = last - 1, end - 1
        self.block(first, last, ids[first:end])

    def note(self):
        self.past.append(list(self.text))

    def undo(self):
        self.text = self.past.pop()
        self.shadow = list(self.text)

    def refresh(self):
        tokens, self.text, self.shadow = self.ids(), [], []
        self.block(0, 0, tokens)

    @torch.no_grad()
    def read(self):
        """Return hidden states `[N, D]` of all tokens ever encoded, and their keys and values, layer by layer."""
        N, model = len(self.tokens), self.model.model
        offsets = torch.zeros(1, N, N, dtype=torch.long)
        hidden_keys = torch.ones(1, 1, N, N, dtype=torch.bool)
        for query, text in enumerate(self.snapshots):
            own = text.index(query)
            offsets[0, query, text] = torch.arange(len(text)) - own
            hidden_keys[0, 0, query, text] = False
        states = model.embed_tokens(torch.tensor([self.tokens]))
        mask = torch.zeros(hidden_keys.shape, dtype=states.dtype).masked_fill(hidden_keys, -torch.inf)
        if model.rope is not None:
            prepared = RotaryPairs(model.rope.turns(offsets[:, None], states.dtype), mask)
        else:
            slopes = alibi_slopes(model.config.num_attention_heads, model.config.alibi_slope_ratio)
            prepared = alibi_bias(offsets[:, None], *slopes[..., None, None]) + mask
        cache = DynamicCache(config=model.config)
        for layer in model.layers:
            states = layer(states, attention_mask=prepared, past_key_values=cache)
        return model.norm(states)[0], [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    def expected(self):
        """Return what a document of this history holds: entry by entry of the cache, and slot by slot of the text."""
        hidden, columns = self.read()
        entries, head = sorted(self.text), self.model.slot_head
        left, right = head.sequence_sides(hidden[None])
        slots = left[0, self.text] + right[0, [*self.text[1:], len(self.tokens)]]
        return {
            "hidden": hidden[entries],
            "columns": [(keys[:, entries], values[:, entries]) for keys, values in columns],
            "slots": slots,
            "keys": head.key_proj(slots),
            "state": hidden[entries[-1]],
        }


def held(document):
    """Return the same of a document."""
    draft = document.draft
    size, order = draft.size, draft.order()
    return {
        "hidden": draft.hidden[0, :size],
        "columns": [(layer.keys[0, :, :size], layer.values[0, :, :size]) for layer in draft.cache.layers],
        "slots": draft.slots[0, order],
        "keys": draft.keys[0, order],
        "state": draft.state[0],
    }


def agree(actual, expected) -> bool:
    """Say whether tensors, or lists and dictionaries of them, agree to `EXACT`."""
    if isinstance(expected, torch.Tensor):
        return relative_error(actual, expected) <= EXACT
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(agree(actual[name], expected[name]) for name in expected)
    return all(agree(*pair) for pair in zip(actual, expected, strict=True))


def is_its_history(document, history) -> bool:
    """Say whether a document holds what its history says."""
    return document.ids == history.ids() and agree(held(document), history.expected())


def everything(document):
    """Return copies of whatever a document holds, but the count of what was encoded."""
    draft, size = document.draft, document.draft.size
    names = ("ids", "ranks", "changed_at", "left", "right", "slots", "keys", "hidden", "encoded_together")
    tensors = {name: getattr(draft, name)[..., :size, :] for name in names if getattr(draft, name).ndim == 3}
    tensors |= {name: getattr(draft, name)[..., :size] for name in names if getattr(draft, name).ndim < 3}
    following = torch.where(draft.following == draft.capacity, -1, draft.following)[:, :size]
    numbers = torch.tensor([document.drift, draft.changes], dtype=torch.float64)
    letters = torch.tensor([ord(letter) for letter in document.text], dtype=torch.long)
    tensors |= {"following": following, "numbers": numbers, "text": letters, "tokens": torch.tensor(document.ids)}
    held_now = {**tensors, **held(document)}
    return _copied(held_now)


def _copied(held):
    if isinstance(held, torch.Tensor):
        return held.clone()
    if isinstance(held, dict):
        return {name: _copied(value) for name, value in held.items()}
    return [_copied(value) for value in held]
