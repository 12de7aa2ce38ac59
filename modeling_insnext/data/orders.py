"""Insertion orders: who is written when, and what the position target of each step is.

An order maps (text, given units, generator) to a permutation of the missing units. Pieces of a unit are written left
to right, one after the other. Where an order's next choice, given what is already written, has a known distribution
over slots, the position target of that step (`TargetKind`) is that distribution instead of the slot that was drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..insnext.supervision import TargetKind
from .programs import draw_lines
from .units import UnitText


KEYWORD_SHARE = 0.25

DrawFunction = Callable[[UnitText, np.ndarray, np.random.Generator], np.ndarray]
KindsFunction = Callable[[UnitText, np.ndarray, np.ndarray], np.ndarray]


def hard_kinds(text: UnitText, given_units: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return `TargetKind.HARD` for every step of `units`."""
    return np.full(len(units), TargetKind.HARD)


@dataclass(frozen=True)
class Order:
    """A distribution over the permutations of the missing units.

    Args:
        name: Name in messages and in the registry.
        draw: `(text, given_units, generator) -> units`, one permutation of the missing units, `[M]`.
        kinds: `(text, given_units, units) -> kinds`, the position-target kind of each unit's first token, `[M]`.
    """

    name: str
    draw: DrawFunction
    kinds: KindsFunction = hard_kinds

    def __call__(self, text: UnitText, given_units: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw a permutation of the missing units and check it.

        Raises:
            ValueError: If what was drawn is no permutation of the missing units.
        """
        missing = np.flatnonzero(~given_units)
        units = np.asarray(self.draw(text, given_units, rng))
        if units.shape != missing.shape or not np.array_equal(np.sort(units), missing):
            raise ValueError(
                f"order {self.name!r} must return a permutation of the {len(missing)} missing units "
                f"{_shorten(missing)}, got {_shorten(units)}"
            )
        return units.astype(np.int64)


OrderSpec = str | DrawFunction | Mapping[str | DrawFunction, float] | Sequence[tuple[str | DrawFunction, float]]


@dataclass(frozen=True)
class OrderMixture:
    """Orders and the probability of each; one order is drawn per text."""

    orders: tuple[Order, ...]
    probabilities: tuple[float, ...]

    def draw(self, text: UnitText, given_units: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the missing units in order of writing and the target kind of each one's first token, both `[M]`."""
        choice = 0 if len(self.orders) == 1 else rng.choice(len(self.orders), p=self.probabilities)
        order = self.orders[choice]
        units = order(text, given_units, rng)
        return units, order.kinds(text, given_units, units)


def get_order(order: str | DrawFunction) -> Order:
    """Return a registered order by name, an `Order` as it is, or a callable as an order with hard targets.

    Raises:
        ValueError: If the name is not registered.
        TypeError: If `order` is neither a name nor callable.
    """
    if isinstance(order, Order):
        return order
    if isinstance(order, str):
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(sorted(ORDERS))}, got {order!r}")
        return ORDERS[order]
    if callable(order):
        return Order(getattr(order, "__name__", type(order).__name__), order)
    raise TypeError(f"an order must be a name or a callable, got {order!r}")


def get_mixture(spec: OrderSpec) -> OrderMixture:
    """Return the mixture that `spec` describes: an order, or a mapping or list of pairs (order, weight).

    Weights are divided by their sum.

    Raises:
        ValueError: If there is no order, or a weight is not a finite number above 0.
        TypeError: If `spec` is of another type.
    """
    if isinstance(spec, str) or callable(spec):
        spec = [(spec, 1.0)]
    pairs = list(spec.items()) if isinstance(spec, Mapping) else spec
    if not isinstance(pairs, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"orders must be an order, a mapping or a list of pairs (order, weight), got {spec!r}")
    if not pairs:
        raise ValueError(f"a mixture needs at least one order, got {spec!r}")
    for order, weight in pairs:
        if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"the weight of order {order!r} must be a finite number above 0, got {weight!r}")
    total = sum(weight for _, weight in pairs)
    return OrderMixture(tuple(get_order(order) for order, _ in pairs), tuple(weight / total for _, weight in pairs))


def keyword_units(text: UnitText, given_units: np.ndarray) -> np.ndarray:
    """Return the missing units that are keywords, `[K]`: those flagged, else the rarest quarter (at least one).

    With rarity they come rarest first, else in text order.

    Raises:
        ValueError: If the text has neither keywords nor rarity.
    """
    missing = np.flatnonzero(~given_units)
    if text.keywords is None and text.rarity is None:
        raise ValueError("keyword orders and contexts need keywords or rarity, got a text with neither")
    flagged = missing if text.keywords is None else missing[text.keywords[missing]]
    if text.rarity is None:
        return flagged
    ranked = flagged[np.argsort(-text.rarity[flagged], kind="stable")]
    if text.keywords is None:
        return ranked[: int(np.ceil(KEYWORD_SHARE * len(missing)))]
    return ranked


def gap_indices(given_units: np.ndarray) -> np.ndarray:
    """Return for each missing unit the number of its gap, `[M]`: gaps are maximal runs of missing units."""
    opens = ~given_units & np.append(True, given_units[:-1])
    return np.cumsum(opens)[~given_units] - 1


def _uniform(text, given_units, rng):
    return rng.permutation(np.flatnonzero(~given_units))


def _left_to_right(text, given_units, rng):
    return np.flatnonzero(~given_units)


def _binary_tree(text, given_units, rng):
    """The middle of every gap, then the middles of the halves, level by level, each level left to right."""
    missing, gaps = np.flatnonzero(~given_units), gap_indices(given_units)
    low = np.flatnonzero(np.diff(gaps, prepend=-1))
    high = np.append(low[1:], len(missing))
    levels = []
    while len(low):
        middle = (low + high) // 2
        levels.append(middle)
        low, high = np.stack([low, middle + 1], 1).ravel(), np.stack([middle, high], 1).ravel()
        low, high = low[low < high], high[low < high]
    return missing[np.concatenate(levels)] if levels else missing


def _keyword_first(text, given_units, rng):
    keywords = keyword_units(text, given_units)
    if text.rarity is None:
        keywords = rng.permutation(keywords)
    rest = ~given_units
    rest[keywords] = False
    return np.concatenate([keywords, rng.permutation(np.flatnonzero(rest))])


def _gap_left_to_right(text, given_units, rng):
    gaps = gap_indices(given_units)
    if len(gaps) == 0:
        return gaps
    turns = rng.permutation(gaps[-1] + 1)
    return np.flatnonzero(~given_units)[np.argsort(turns[gaps], kind="stable")]


def _sentence_local(text, given_units, rng):
    if text.sentences is None:
        raise ValueError("sentence_local needs the sentence of each unit, got a text without (set sentence_ends)")
    units = rng.permutation(np.flatnonzero(~given_units))
    return units[np.argsort(text.sentences[units], kind="stable")]


def _proportional_kinds(text, given_units, units):
    return np.full(len(units), TargetKind.PROPORTIONAL)


def _keyword_first_kinds(text, given_units, units):
    """Keywords are hard; the uniform rest is proportional."""
    is_keyword = np.arange(len(units)) < len(keyword_units(text, given_units))
    return np.where(is_keyword, TargetKind.HARD, TargetKind.PROPORTIONAL)


def _gap_kinds(text, given_units, units):
    """Equal weights where a gap begins and others are still to come."""
    gaps = np.empty(len(given_units), dtype=np.int64)
    gaps[~given_units] = gap_indices(given_units)
    begins = np.diff(gaps[units], prepend=-1) != 0
    unfinished = begins.sum() - np.cumsum(begins) + 1
    return np.where(begins & (unfinished > 1), TargetKind.EQUAL, TargetKind.HARD)


def _sentence_kinds(text, given_units, units):
    """Nothing outside the last sentence is missing while that one is written: uniform."""
    sentences = text.sentences[units]
    return np.where(sentences == sentences[-1:], TargetKind.PROPORTIONAL, TargetKind.HARD)


def _shorten(units: np.ndarray) -> str:
    return np.array2string(units, threshold=12, edgeitems=4, separator=", ")


ORDERS = {
    order.name: order
    for order in (
        Order("uniform", _uniform, _proportional_kinds),
        Order("left_to_right", _left_to_right),
        Order("binary_tree", _binary_tree),
        Order("keyword_first", _keyword_first, _keyword_first_kinds),
        Order("gap_left_to_right", _gap_left_to_right, _gap_kinds),
        Order("sentence_local", _sentence_local, _sentence_kinds),
        Order("program_lines", draw_lines),
    )
}
