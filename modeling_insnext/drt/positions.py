"""Where a slot stands in its row's text, and what tells the layers so: rotary angles, learned vectors, or neither.

Shape suffixes: B rows, H heads, L slots, P places, D head width. Positions count a row's own slots from its first one,
landmarks in the text included, whatever padding surrounds them: reading in pieces changes none. Sources: RoPE
(arXiv:2104.09864); its scalings: llama3, YaRN (arXiv:2309.00071), as Transformers computes them.
"""

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .layout import Layout


def slot_positions(layout: Layout, device: torch.device) -> torch.Tensor:
    """Return the position of every slot, `[B, L]`, or `[1, L]` if rows stand alike."""
    first = layout.first if len(set(layout.first)) > 1 else layout.first[:1]
    return torch.tensor(first, device=device)[:, None] + torch.arange(layout.width, device=device)


def rope_frequencies(config) -> tuple[list[float], float]:
    """Return the D / 2 angles a position and the factor on cosines and sines that `config.rope_parameters` demand.

    Numbers, no tensor: weights are moved, cast and first built on `meta`, and none of it may touch them.
    """
    with torch.device("cpu"):
        if config.rope_parameters["rope_type"] == "default":
            exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
            return (1.0 / config.rope_parameters["rope_theta"] ** exponent).tolist(), 1.0
        frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
        return frequencies.tolist(), float(factor)


def rotary_table(position_BL: torch.Tensor, frequencies: list[float], factor: float, dtype: torch.dtype):
    """Return cosines and sines, `[B, 1, L, D]` each, halves repeated.

    Angles are float64 whatever the dtype: at a position of ten million, float32 would be wrong by half a radian.
    """
    wide = torch.float32 if position_BL.device.type == "mps" else torch.float64
    rate_D = torch.tensor(frequencies, device=position_BL.device, dtype=wide).repeat(2)
    angle = (position_BL[..., None] * rate_D)[:, None]
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def turn(x_BHLD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x rotated by the angles of :func:`rotary_table`, halves as pairs (the layout of Llama)."""
    left, right = x_BHLD.chunk(2, dim=-1)
    return x_BHLD * cos + torch.cat([-right, left], -1) * sin


def rotate(x_BHPD: torch.Tensor, theta: float) -> torch.Tensor:
    """Return x with rotary positions 0..P-1."""
    P, D = x_BHPD.shape[-2:]
    wide = torch.promote_types(x_BHPD.dtype, torch.float32)
    rate = theta ** (-torch.arange(0, D, 2, device=x_BHPD.device, dtype=wide) / D)
    angle = (torch.arange(P, device=x_BHPD.device, dtype=wide)[:, None] * rate).repeat(1, 2)
    return turn(x_BHPD, angle.cos().to(x_BHPD.dtype), angle.sin().to(x_BHPD.dtype))
