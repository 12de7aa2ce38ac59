"""Where chunks begin and end: tokens count without landmarks, positions with them."""

from dataclasses import dataclass


# no NamedTuple: Dynamo of torch 2.9 does not trace its properties
@dataclass(frozen=True)
class ChunkGrid:
    """Chunks of `chunk_size` tokens; with `has_landmarks` one position more, the last, for the landmark."""

    chunk_size: int
    has_landmarks: bool

    @property
    def length(self) -> int:
        """Positions P that a chunk takes."""
        return self.chunk_size + self.has_landmarks

    def positions(self, tokens: int) -> int:
        """Return how many positions the first tokens of a text take, landmarks of complete chunks included."""
        return tokens + tokens // self.chunk_size if self.has_landmarks else tokens

    def tokens(self, positions: int) -> int:
        """Return how many tokens stand before a position: the inverse of :meth:`positions`."""
        return positions - positions // self.length if self.has_landmarks else positions


__all__ = ["ChunkGrid"]
