"""Random insertion sequences, and a text that is really built by list insertion: the oracle."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from modeling_insnext.insnext.attention import build_interval
from modeling_insnext.insnext.slot_losses import insertion_losses
from modeling_insnext.insnext.supervision import Supervision
from tests.support.insnext import BOS


@dataclass
class Built:
    """Texts of one row, built by list insertion.

    Attributes:
        positions: Index of every entry in its final text.
        start: First entry of every entry's text.
        horizon: Last entry of every entry's block.
        snapshots: For every entry the text, as entries from left to right, right after its block was written.
        finals: For every entry its final text.
        contexts: Length of the first block of every text.
    """

    positions: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    horizon: list[int] = field(default_factory=list)
    snapshots: list[list[int]] = field(default_factory=list)
    finals: list[list[int]] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)

    def tensors(self):
        """Return positions, start and horizon, each `[1, N]`."""
        return tuple(torch.tensor([values]) for values in (self.positions, self.start, self.horizon))

    def interval(self):
        positions, start, horizon = self.tensors()
        return build_interval(positions.shape, positions.device, positions=positions, start=start, horizon=horizon)


def build_row(texts: list[list[list[int]]], pads: int = 0) -> Built:
    """Build the texts of a row: a text is a list of blocks, a block a list of places to insert at (`list.insert`)."""
    row = Built()
    for blocks in texts:
        first, text = len(row.start), []
        for block in blocks:
            for place in block:
                text.insert(place, len(row.start))
                row.start.append(first)
            size = len(row.start)
            row.horizon += [size - 1] * len(block)
            row.snapshots += [list(text)] * len(block)
        row.positions += [text.index(entry) for entry in range(first, len(row.start))]
        row.finals += [text] * len(text)
        row.contexts.append(len(blocks[0]))
    for _ in range(pads):
        entry = len(row.start)
        row.start.append(entry)
        row.horizon.append(entry)
        row.positions.append(0)
        row.snapshots.append([entry])
        row.finals.append([entry])
    return row


@st.composite
def text_blocks(draw, most=8):
    """Draw a text: a context whose first token is the leftmost, then blocks, mostly of one token."""
    sizes = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=1, max_size=most))
    blocks, length = [], 0
    for size in sizes:
        block = []
        for _ in range(size):
            block.append(0 if length == 0 else draw(st.integers(1, length)))
            length += 1
        blocks.append(block)
    return blocks


@st.composite
def packed_rows(draw, most_texts=3):
    """Draw a row of texts packed behind one another, padded on the right."""
    texts = draw(st.lists(text_blocks(), min_size=1, max_size=most_texts))
    return build_row(texts, draw(st.integers(0, 2)))


def random_text(length: int, context: int, generator: torch.Generator):
    """Return ids and positions `[1, length]`: BOS and `context - 1` tokens in text order, then random writing."""
    given = torch.randperm(length - 1, generator=generator)[: context - 1].sort().values + 1
    positions = torch.cat([torch.zeros(1, dtype=torch.long), given])
    rest = torch.tensor([p for p in range(length) if p not in positions.tolist()], dtype=torch.long)
    positions = torch.cat([positions, rest[torch.randperm(len(rest), generator=generator)]])
    ids = torch.randint(3, 23, (1, length), generator=generator)
    ids[0, 0] = BOS
    return ids, positions[None]


def random_ids(row: Built, generator: torch.Generator):
    """Return ids `[1, N]` for a built row: BOS begins every text, PAD fills single texts at the end."""
    ids = torch.randint(3, 23, (1, len(row.start)), generator=generator)
    for entry, start in enumerate(row.start):
        if entry == start:
            ids[0, entry] = BOS
    return ids


def losses_by_state(model, ids, interval, **supervision):
    """Return position and token loss of every state, `[B, N]`, and which states write something supervised."""
    supervision.setdefault("labels", ids)
    hidden = model.model(ids, interval=interval).last_hidden_state
    return insertion_losses(model, hidden, ids, interval, Supervision(**supervision))
