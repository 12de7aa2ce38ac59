"""Star graphs: a task that is solved only by planning ahead. Needs numpy only.

`degree` directed paths share one node, the centre, and no other. The names of start and goal, the ends of one of the
paths, are given, and its interior is to be written. Every step but one follows the only edge that leaves a node. At
the centre `degree` edges leave, and which of them is right shows only by looking ahead, or back from the goal: that
step is the fork. An example of degree 3 with paths of 4, 3 and 3 nodes, the first one from 7 to 2:

    7 -> 4 -> 9 -> 2      centre 4, path 7 4 9 2, fork: 9 (not 0, not 5)
         4 -> 0 -> 3
    8 -> 4 -> 5 -> 1

Its text, edges in random order, one name a token and a comma after every edge; the last line is written by the model:

    <s> 4 0 , 8 4 , 9 2 , 7 4 , 5 1 , 4 9 , 0 3 , 4 5 , |  7       2
                                                             4  9

A path has `min_length` to `max_length` nodes, uniform. The centre is its node j, j uniform over
`0 .. length - min_plan - 1`, so that at least `min_plan` nodes follow. Names are drawn without replacement. A graph is
a function of the specification, the split, its index and the seed.

Sizes and specifications: ILM (arXiv:2505.05755) and its code; *easy* is the graph of Bachmann and Nagarajan
(arXiv:2403.06963), whose start is the centre. There the answer is written as pairs after the question; here each node
is written once, between start and goal.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np


PAD, BOS, EOS, COMMA, BAR = range(5)
NUM_SPECIAL = 5
SPLITS = {"train": 50_000, "val": 100, "test": 5_000}


@dataclass(frozen=True)
class StarGraphSpec:
    """What graphs are drawn.

    Args:
        degree: Number of paths through the centre.
        min_length: Fewest nodes of a path, both ends included.
        max_length: Most nodes of a path.
        min_plan: Fewest nodes of a path after the centre.
        num_names: Names to draw from.

    Raises:
        TypeError: If a field is not an integer.
        ValueError: If `degree` or `min_plan` is below 2, the lengths are out of order, `min_plan` leaves no room for a
            centre, or there are fewer names than nodes.
    """

    degree: int
    min_length: int
    max_length: int
    min_plan: int
    num_names: int

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{field.name} must be an integer, got {value!r}")
        if self.degree < 2:
            raise ValueError(f"degree must be at least 2, got {self.degree}")
        if self.min_plan < 2:
            raise ValueError(f"min_plan must be at least 2 (else the goal itself is the fork), got {self.min_plan}")
        if self.min_length > self.max_length:
            raise ValueError(f"min_length must be at most max_length, {self.max_length}, got {self.min_length}")
        if self.min_plan >= self.min_length:
            raise ValueError(f"min_plan must be below min_length, {self.min_length}, got {self.min_plan}")
        if self.num_names < self.max_nodes:
            raise ValueError(
                f"num_names must be at least {self.max_nodes} (degree * (max_length - 1) + 1), got {self.num_names}"
            )

    @property
    def max_nodes(self) -> int:
        return self.degree * (self.max_length - 1) + 1

    @property
    def vocab_size(self) -> int:
        return NUM_SPECIAL + self.num_names

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest text: BOS, three per edge, the bar, the path."""
        return 2 + 3 * (self.max_nodes - 1) + self.max_length


SPECS = {
    "easy": StarGraphSpec(degree=3, min_length=5, max_length=5, min_plan=4, num_names=20),
    "medium": StarGraphSpec(degree=3, min_length=3, max_length=6, min_plan=2, num_names=20),
    "hard": StarGraphSpec(degree=5, min_length=6, max_length=12, min_plan=5, num_names=56),
}


class StarGraph(NamedTuple):
    """A graph and its question.

    Attributes:
        edges: Names `[E, 2]` (from, to), in random order.
        path: Names `[L]` from start to goal.
        fork: Index in `path` of the first node after the centre.
    """

    edges: np.ndarray
    path: np.ndarray
    fork: int


def get_spec(graphs: str | StarGraphSpec) -> StarGraphSpec:
    """Return a specification by name, or as it is.

    Raises:
        ValueError: If there is none of that name.
    """
    if isinstance(graphs, StarGraphSpec):
        return graphs
    if graphs not in SPECS:
        raise ValueError(f"graphs must be one of {', '.join(SPECS)} or a StarGraphSpec, got {graphs!r}")
    return SPECS[graphs]


def draw_graph(graphs: str | StarGraphSpec, split: str, index: int, seed: int = 0) -> StarGraph:
    """Return graph `index` of a split: always the same one.

    Raises:
        ValueError: If there is no such specification or split, or `index` or `seed` is negative.
    """
    spec = get_spec(graphs)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    for name, value in (("index", index), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    lengths = rng.integers(spec.min_length, spec.max_length + 1, spec.degree)
    centres = rng.integers(0, lengths - spec.min_plan)
    names = rng.permutation(spec.num_names)[: lengths.sum() - spec.degree + 1]
    ends = np.cumsum(lengths - 1) + 1
    paths = [
        np.insert(names[end - length + 1 : end], centre, names[0])
        for end, length, centre in zip(ends, lengths, centres, strict=True)
    ]
    edges = np.concatenate([np.stack([path[:-1], path[1:]], 1) for path in paths])
    return StarGraph(rng.permutation(edges), paths[0], int(centres[0]) + 1)


def graph_text(graph: StarGraph) -> dict:
    """Return a text for `InsertionCollator`, `input_ids` and `given`, `[T]`, and `fork`, the index of the fork in it.

    Everything is given but the interior of the path.
    """
    edges = np.insert(graph.edges + NUM_SPECIAL, 2, COMMA, axis=1).ravel()
    input_ids = np.concatenate([[BOS], edges, [BAR], graph.path + NUM_SPECIAL])
    first = len(input_ids) - len(graph.path)
    given = np.ones(len(input_ids), dtype=bool)
    given[first + 1 : -1] = False
    return {"input_ids": input_ids, "given": given, "fork": first + graph.fork}


def star_texts(graphs: str | StarGraphSpec, split: str, size: int | None = None, seed: int = 0) -> list[dict]:
    """Return the first `size` texts of a split; see `graph_text`.

    Raises:
        ValueError: If `size` is not between 1 and the size of the split; see also `draw_graph`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    size = SPLITS[split] if size is None else size
    if not 1 <= size <= SPLITS[split]:
        raise ValueError(f"size must be in 1..{SPLITS[split]}, the size of {split}, got {size}")
    return [graph_text(draw_graph(graphs, split, index, seed)) for index in range(size)]
