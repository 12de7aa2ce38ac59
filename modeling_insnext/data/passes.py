"""Texts whose number is not known, read again and again."""

from collections.abc import Iterable, Iterator, Mapping

from torch.utils.data import IterableDataset


class Passes(IterableDataset):
    """A stream of texts without end: the data again and again, each text with the `pass_number` that it is read in.

    `InsertionCollator` draws other orders in every pass. Only the text can say which one it belongs to: workers are
    ahead of the training. So that it resumes, the stream is one: batches reach over the end of a pass, and what was
    trained on is skipped from its beginning. Data with `set_epoch`, as a shuffled stream of `datasets` has, is told
    the pass.

    Args:
        data: Mappings; iterated anew for every pass, so it must be no generator.

    Raises:
        ValueError: On iteration, if a later pass has nothing to read, as of a generator.
    """

    def __init__(self, data: Iterable[Mapping]):
        self.data = data

    def __iter__(self) -> Iterator[dict]:
        number = rows = 0
        while True:
            if hasattr(self.data, "set_epoch"):
                self.data.set_epoch(number)
            before = rows
            for row in self.data:
                yield {**row, "pass_number": number}
                rows += 1
            if rows == before:
                if number:
                    raise ValueError(f"data must be there to be read again, got nothing in pass {number}")
                return
            number += 1
