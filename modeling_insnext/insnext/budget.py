"""What may still be written: into every gap, and in all. Lengths are resolved here, once, before any work.

Shape suffixes: R rows, G gaps of the row with most gaps.
"""

import torch

from .canvas import Canvas


class Budget:
    """Bounds of the gaps and of the rows, and what has been written of them.

    Args:
        canvas: The canvas, one row a text.
        limit: int64 `[R]`, most tokens that may be written in a row.
        least: `min_new_tokens`, below which no row stops.

    Attributes:
        minima: int64 `[R, G]`, least number of tokens in each gap.
        maxima: int64 `[R, G]`, largest number, -1 for no bound.
        written: int64 `[R, G]`, tokens written into each gap so far.
        limit: int64 `[R]`.
    """

    def __init__(self, canvas: Canvas, limit: torch.Tensor, least: int = 0):
        self.minima, self.maxima, self.limit, self.least = canvas.min_gap_tokens, canvas.max_gap_tokens, limit, least
        self.written = torch.zeros_like(self.minima)

    @classmethod
    def resolve(cls, canvas: Canvas, config, model_config) -> "Budget":
        """Return the budget that the options of a `generate` call ask for.

        A row writes `max_new_tokens`, or up to a text of `max_length`; where nobody set either, the 20 of
        Transformers, which count new tokens. No text outgrows the model.

        Args:
            canvas: The canvas, one row a text.
            config: An `InsertionGenerationConfig`.
            model_config: The model's own configuration.

        Raises:
            ValueError: If the canvas breaks a rule, the given tokens or minima leave no room, or `min_new_tokens`
                exceeds what the gaps can take.
        """
        given, longest = canvas.lengths, model_config.max_position_embeddings
        if config.max_new_tokens is not None:
            limit = torch.full_like(given, config.max_new_tokens)
        elif config.max_length is None:
            limit = torch.full_like(given, config._get_default_generation_params()["max_length"])
        elif config.max_length < int(given.max()):
            raise ValueError(
                f"max_length must leave room for the {int(given.max())} given tokens, got {config.max_length}"
            )
        else:
            limit = config.max_length - given
        canvas.validate(model_config.vocab_size, int(limit.min()), longest)
        budget = cls(canvas, limit.minimum(longest - given), config.min_new_tokens or 0)
        shortest = int(budget.takes(canvas).min())
        if budget.least > shortest:
            raise ValueError(f"min_new_tokens must not exceed what the gaps can take, {shortest}, got {budget.least}")
        return budget

    def takes(self, canvas: Canvas) -> torch.Tensor:
        """Return how many tokens the gaps of each row can take in all, int64 `[R]`."""
        gap_G = torch.arange(self.maxima.shape[1], device=self.maxima.device)
        exists_RG = (canvas.gap_ids[..., None] == gap_G).any(1)
        takes_RG = torch.where(self.maxima < 0, self.limit[:, None], self.maxima)
        return torch.where(exists_RG, takes_RG, 0).sum(1).minimum(self.limit)

    @property
    def remaining(self) -> torch.Tensor:
        """Tokens each row may still write, int64 `[R]`."""
        return self.limit - self.written.sum(1)

    @property
    def deficit(self) -> torch.Tensor:
        """Tokens each gap lacks of its minimum, int64 `[R, G]`."""
        return (self.minima - self.written).clamp_min(0)

    def room(self) -> torch.Tensor:
        """Return how many tokens each gap may still take, int64 `[R, G]`.

        Once the minima need all that a row has left, they get it.
        """
        deficit, remaining = self.deficit, self.remaining[:, None]
        room = torch.where(self.maxima < 0, remaining, self.maxima - self.written)
        return torch.where(remaining <= deficit.sum(1, keepdim=True), deficit, room).minimum(remaining)

    def must_go_on(self) -> torch.Tensor:
        """Return, bool `[R]`, which rows may not stop yet: too few tokens written, or a gap below its minimum."""
        return (self.written.sum(1) < self.least) | (self.deficit > 0).any(1)

    def take(self, gaps: torch.Tensor, counts: torch.Tensor) -> None:
        """Count what each row has written into one of its gaps, `gaps` and `counts` int64 `[R]`."""
        self.written = self.written.scatter_add(1, gaps.clamp_min(0)[:, None], counts[:, None])

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the given rows, in that order; a row may be named several times."""
        for name in ("minima", "maxima", "written", "limit"):
            setattr(self, name, getattr(self, name)[rows])
