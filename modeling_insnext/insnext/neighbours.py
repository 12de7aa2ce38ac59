"""Who stood beside a token when it was encoded: nearest smaller values, in O(n log n) and without an (n, n) tensor.

In the order of the text, the token left of token i at a time t is the nearest on its left that was encoded by then:
the nearest smaller value in the list of times. Minima over stretches of 1, 2, 4, ... tokens find it for all tokens at
once: a stretch of which nobody was encoded by then is skipped, the longest first.
"""

from typing import NamedTuple

import torch


class Neighbours(NamedTuple):
    """Indices of the nearest tokens, each `[B, N]`: -1 where none stands left, N where none stands right.

    Attributes:
        newest_left: Among the tokens encoded with a token or before it.
        newest_right: Likewise.
        older_left: Among the tokens encoded before it.
        older_right: Likewise.
    """

    newest_left: torch.Tensor
    newest_right: torch.Tensor
    older_left: torch.Tensor
    older_right: torch.Tensor


def neighbours(positions_BN: torch.Tensor, start_BN: torch.Tensor, horizon_BN: torch.Tensor) -> Neighbours:
    """Return the neighbours of every token in its own text.

    Args:
        positions_BN: Integers whose order is the order of the text; distinct in a text.
        start_BN: First entry of each entry's text.
        horizon_BN: Last entry that was encoded together with it: it ascends, and ends with the text.
    """
    N = positions_BN.shape[1]
    by_position_BN = positions_BN.argsort(dim=1)
    by_text_BN = start_BN.gather(1, by_position_BN).argsort(dim=1, stable=True)
    order_BN = by_position_BN.gather(1, by_text_BN)
    text_BN, time_BN = start_BN.gather(1, order_BN), horizon_BN.gather(1, order_BN)

    found = []
    for flip in (False, True):
        text, time, order = (x.flip(1) for x in (text_BN, time_BN, order_BN)) if flip else (text_BN, time_BN, order_BN)
        minima = _minima(time)
        for until in (time, time - 1):
            place = _nearest(minima, until)
            there = place.clamp_min(0)
            is_own = (place >= 0) & (text.gather(1, there) == text)
            token = torch.where(is_own, order.gather(1, there), N if flip else -1)
            found.append(torch.empty_like(token).scatter(1, order, token))
    newest_left, older_left, newest_right, older_right = found
    return Neighbours(newest_left, newest_right, older_left, older_right)


def _minima(time_BN: torch.Tensor) -> list[torch.Tensor]:
    """Return the minimum over the 1, 2, 4, ... entries that end at each, behind a first entry earlier than any."""
    minima = [torch.nn.functional.pad(time_BN, (1, 0), value=-2)]
    length, width = 1, time_BN.shape[1]
    while length < width:
        last = minima[-1]
        before = torch.nn.functional.pad(last[:, :-length], (length, 0), value=-2)
        minima.append(torch.minimum(last, before))
        length *= 2
    return minima


def _nearest(minima: list[torch.Tensor], until_BN: torch.Tensor) -> torch.Tensor:
    """Return the nearest place on the left of each whose time is at most `until`, -1 if there is none."""
    # in `minima`, place j stands at j + 1
    end_BN = torch.arange(until_BN.shape[1], device=until_BN.device).expand_as(until_BN)
    for k, minimum in reversed(list(enumerate(minima))):
        end_BN = torch.where(minimum.gather(1, end_BN) > until_BN, end_BN - 2**k, end_BN)
    return end_BN - 1
