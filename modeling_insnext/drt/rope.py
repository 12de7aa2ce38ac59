"""Rotary positions: which angles `rope_parameters` demand, and how vectors are turned by them.

Sources: RoPE (arXiv:2104.09864); its scalings: llama3, YaRN (arXiv:2309.00071), as Transformers computes them.
"""

from typing import NamedTuple

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


# the numbers that each needs
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def check_rope(given: dict) -> None:
    """Check what a configuration gives as `rope_parameters`.

    Raises:
        ValueError: If the type is none of `ROPE_TYPES`, a number is missing or not positive, or only a part of a head
            would be turned.
    """
    rope_type = given.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {tuple(ROPE_TYPES)}, got {rope_type!r}")
    for name in (*ROPE_TYPES[rope_type], *(name for name in given if name == "rope_theta")):
        value = given.get(name)
        if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"rope_type={rope_type!r} needs a positive {name} in rope_parameters, got {value!r}")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"whole heads are turned, got partial_rotary_factor={given['partial_rotary_factor']}")


class Rope(NamedTuple):
    """Angles a position, D / 2 of them, and the factor on cosines and sines.

    Numbers, no tensor: weights are moved, cast and first built on `meta`, and none of it may touch them.
    """

    frequencies: list[float]
    factor: float

    def turns(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the `tables` of positions `[...]`, `[..., D]` each.

        Angles are float64 whatever the dtype: at a position of ten million, float32 would be wrong by half a radian.
        """
        wide = torch.float32 if positions.device.type == "mps" else torch.float64
        angle = positions[..., None] * torch.tensor(self.frequencies, device=positions.device, dtype=wide)
        return tables(angle, dtype, self.factor)


def tables(angle: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `turn` turns by: of angles `[..., D / 2]` cosines and sines, halves repeated, sines of the left half
    negative."""
    cos, sin = (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rope_of(config) -> Rope:
    """Return what `config.rope_parameters` demand."""
    with torch.device("cpu"):
        if config.rope_parameters["rope_type"] == "default":
            exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
            return Rope((1.0 / config.rope_parameters["rope_theta"] ** exponent).tolist(), 1.0)
        frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
        return Rope(frequencies.tolist(), float(factor))


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x `[..., D]` turned by `tables`, halves as pairs (the layout of Llama)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


__all__ = ["ROPE_TYPES", "Rope", "check_rope", "rope_of", "tables", "turn"]
