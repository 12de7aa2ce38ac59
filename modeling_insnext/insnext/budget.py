"""What may still be written: into every gap, and in all. Lengths are resolved here, once, before any work.

Shape suffixes: R rows, G gaps of the row with most gaps.
"""

import torch

from .canvas import Canvas
from .pending import owed_tokens


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
        homes: bool `[R, G]`, gaps at whose right edge a keyword may stand, whatever else is written into them.
        owed: int64 `[R]`, tokens that keywords which are left to be written take at least; None without any.
        is_bounded: Whether a gap has bounds of its own or keywords are owed; else each has room for all that its row
            may write.
    """

    def __init__(self, canvas: Canvas, limit: torch.Tensor, least: int = 0):
        self.minima, self.maxima, self.limit, self.least = canvas.min_gap_tokens, canvas.max_gap_tokens, limit, least
        self.written = torch.zeros_like(self.minima)
        self.homes, self.owed = _homes(canvas), None
        if canvas.pending_ids is not None:
            lengths_RKF = (canvas.pending_ids >= 0).sum(3)
            self.owed = owed_tokens(lengths_RKF, (lengths_RKF > 0).any(2))[0]
        self.is_bounded = self.owed is not None or bool(((self.minima > 0) | (self.maxima >= 0)).any())

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
            ValueError: If the canvas breaks a rule, the given tokens or minima leave no room, pending keywords have
                none, or `min_new_tokens` exceeds what the gaps can take.
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
        budget.check_pending()
        shortest = int(budget.takes(canvas).min())
        if budget.least > shortest:
            raise ValueError(f"min_new_tokens must not exceed what the gaps can take, {shortest}, got {budget.least}")
        return budget

    def takes(self, canvas: Canvas) -> torch.Tensor:
        """Return how many tokens the gaps of each row can take in all, int64 `[R]`."""
        gap_G = torch.arange(self.maxima.shape[1], device=self.maxima.device)
        exists_RG = (canvas.gap_ids[..., None] == gap_G).any(1)
        return torch.where(exists_RG, self.bounds, 0).sum(1).minimum(self.limit)

    @property
    def bounds(self) -> torch.Tensor:
        """Largest number of tokens of each gap, all that its row may write where it has none, int64 `[R, G]`."""
        return torch.where(self.maxima < 0, self.limit[:, None], self.maxima)

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

        Once the minima need all that a row has left, they get it. While keywords are owed, a gap has room if they
        still fit when a token more stands in it.
        """
        deficit, remaining = self.deficit, self.remaining[:, None]
        room = torch.where(self.maxima < 0, remaining, self.maxima - self.written)
        room = torch.where(remaining <= deficit.sum(1, keepdim=True), deficit, room).minimum(remaining)
        if self.owed is None:
            return room
        one_R1 = torch.ones_like(self.limit)[:, None]
        return torch.where(self.fits(one_R1, self.owed[:, None])[..., 0], room, 0)

    def fits(self, lengths: torch.Tensor, owed: torch.Tensor) -> torch.Tensor:
        """Return whether runs of tokens may be written into each gap, bool `[R, G, N]`.

        They may if what is owed then fits into one gap, whichever, beside the minima of all gaps. So it is never
        spread over gaps that are too small for all of it.

        Args:
            lengths: int64 `[R, N]`, tokens of each run.
            owed: int64 `[R, N]`, tokens that keywords take at least once the run is written.
        """
        G = self.minima.shape[1]
        # [R, N, gap of the run, gap of what is owed]
        run_RNGH = lengths[..., None, None] * torch.eye(G, dtype=lengths.dtype, device=lengths.device)
        capacity_RNGH = (self.bounds - self.written)[:, None, None] - run_RNGH
        deficit_RNGH = ((self.minima - self.written)[:, None, None] - run_RNGH).clamp_min(0)
        owed_RN11, remaining_RN = owed[..., None, None], self.remaining[:, None] - lengths
        needed_RNGH = deficit_RNGH.sum(3, keepdim=True) + (owed_RN11 - deficit_RNGH).clamp_min(0)
        is_home_RNGH = (self.homes[:, None, None] & (capacity_RNGH >= owed_RN11)) | (owed_RN11 == 0)
        fits_RNG = (is_home_RNGH & (needed_RNGH <= remaining_RN[..., None, None])).any(3)
        return (fits_RNG & (capacity_RNGH.diagonal(dim1=2, dim2=3) >= 0)).transpose(1, 2)

    def check_pending(self) -> None:
        """Check that all pending keywords can be written.

        Raises:
            ValueError: If no gap has room for them, or not beside the minima; the message names row and numbers.
        """
        if self.owed is None:
            return
        widest_R = torch.where(self.homes, self.bounds, 0).amax(1)
        for row, (owed, widest) in enumerate(zip(self.owed.tolist(), widest_R.tolist(), strict=True)):
            if owed > widest:
                raise ValueError(
                    f"one gap must have room for all pending keywords: those of row {row} take at least {owed} "
                    f"tokens, the widest gap whole words may stand in takes {widest} (max_new_tokens, max_length and "
                    "max_gap_tokens count)"
                )
        nothing_R1 = torch.zeros_like(self.limit)[:, None]
        fits_R = self.fits(nothing_R1, self.owed[:, None]).flatten(1).any(1)
        if not bool(fits_R.all()):
            row = int((~fits_R).nonzero()[0])
            raise ValueError(
                f"pending keywords and the minima of the gaps must fit together: row {row} may write "
                f"{int(self.limit[row])} tokens, its keywords take at least {int(self.owed[row])}, its minima are "
                f"{self.minima[row].tolist()}"
            )

    def must_go_on(self) -> torch.Tensor:
        """Return, bool `[R]`, which rows may not stop yet: too few tokens written, or a gap below its minimum."""
        too_few = self.written.sum(1) < self.least
        return too_few | (self.deficit > 0).any(1) if self.is_bounded else too_few

    def take(self, gaps: torch.Tensor, counts: torch.Tensor) -> None:
        """Count what each row has written into one of its gaps, `gaps` and `counts` int64 `[R]`."""
        self.written = self.written.scatter_add(1, gaps.clamp_min(0)[:, None], counts[:, None])

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the given rows, in that order; a row may be named several times."""
        for name in ("minima", "maxima", "written", "limit", "homes"):
            setattr(self, name, getattr(self, name)[rows])
        self.owed = None if self.owed is None else self.owed[rows]


def _homes(canvas: Canvas) -> torch.Tensor:
    """Return the gaps with a slot whose right neighbour never glues: the edge of the text, or a given word's start."""
    glues_BT = torch.zeros_like(canvas.slot_mask)
    if canvas.continuation_mask is not None:
        glues_BT = canvas.continuation_mask[canvas.input_ids] & canvas.attention_mask.bool()
    glued_BT = torch.nn.functional.pad(glues_BT[:, 1:], (0, 1))
    gap_G = torch.arange(canvas.min_gap_tokens.shape[1], device=glued_BT.device)
    return ((canvas.gap_ids[..., None] == gap_G) & ~glued_BT[..., None]).any(1)
