"""Where a slot stands in its row's text, and what tells the layers so: rotary angles, learned vectors, or neither.

Shape suffixes: B rows, H heads, L slots, P places, D head width. Positions count a row's own slots from its first one,
landmarks in the text included, whatever padding surrounds them: reading in pieces changes none. Angles: rope.
"""

import torch

from .layout import Layout
from .rope import tables, turn


def slot_positions(layout: Layout, device: torch.device) -> torch.Tensor:
    """Return the position of every slot, `[B, L]`, or `[1, L]` if rows stand alike."""
    first = layout.first if len(set(layout.first)) > 1 else layout.first[:1]
    return torch.tensor(first, device=device)[:, None] + torch.arange(layout.width, device=device)


def rotate(x_BHPD: torch.Tensor, theta: float) -> torch.Tensor:
    """Return x with rotary positions 0..P-1."""
    P, D = x_BHPD.shape[-2:]
    wide = torch.promote_types(x_BHPD.dtype, torch.float32)
    rate = theta ** (-torch.arange(0, D, 2, device=x_BHPD.device, dtype=wide) / D)
    angle = torch.arange(P, device=x_BHPD.device, dtype=wide)[:, None] * rate
    return turn(x_BHPD, *tables(angle, x_BHPD.dtype))
