"""Texts whose number is not known, read again and again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from torch.utils.data import IterableDataset


class Passes(IterableDataset):
    """A stream of texts without end: the data again and again, each text with the `pass_number` that it is read in.

    `InsertionCollator` draws other orders in every pass. Only the text can say which one it belongs to: workers are
    ahead of the training. So that it resumes, the stream is one: batches reach over the end of a pass, and what was
    trained on is skipped from its beginning. Data with `set_epoch`, as a shuffled stream of `datasets` has, is told
    the pass.

    Args:
        data: Mappings; iterated anew for every pass, so it must be no generator.
        num_texts: Texts of the whole training, for the field `progress` of each: 0 at the first, 1 behind the last.

    Raises:
        ValueError: If `num_texts` is below 1. On iteration, if a later pass has nothing to read, as of a generator.
    """

    def __init__(self, data: Iterable[Mapping], num_texts: int | None = None):
        if num_texts is not None and num_texts < 1:
            raise ValueError(f"num_texts must be at least 1, got {num_texts}")
        self.data, self.num_texts = data, num_texts

    def __iter__(self) -> Iterator[dict]:
        number = rows = 0
        while True:
            if hasattr(self.data, "set_epoch"):
                self.data.set_epoch(number)
            before = rows
            for row in self.data:
                progress = {} if self.num_texts is None else {"progress": min(rows / self.num_texts, 1.0)}
                yield {**row, "pass_number": number, **progress}
                rows += 1
            if rows == before:
                if number:
                    raise ValueError(f"data must be there to be read again, got nothing in pass {number}")
                return
            number += 1


class Shuffled:
    """Texts in another order in every pass, a function of the seed and the pass."""

    def __init__(self, data: Sequence[Mapping], seed: int):
        self.data, self.seed, self._epoch = data, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[Mapping]:
        for index in np.random.default_rng([self.seed, self._epoch]).permutation(len(self.data)):
            yield self.data[int(index)]
