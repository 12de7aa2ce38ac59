"""Long texts as token ids, to hide needles in: books, essays, code, or a few sentences over and over. Needs numpy."""

import gzip
import json
from pathlib import Path

import numpy as np


# the noise of RULER (arXiv:2404.06654)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
# columns of JSON lines that hold a text
COLUMNS = ("text", "code")


def read_haystack(source: str | Path, tokenizer, limit: int | None = None) -> np.ndarray:
    """Return token ids, `[N]`.

    Args:
        source: A file, `.npy` of ids (mapped, not read), `.txt`, or `.jsonl`, the two also as `.gz`: lines with a text
            in the column `text` or `code`, one after the other with an empty line between; or `"noise"`: `FILLER`.
        tokenizer: Anything with `encode(text, add_special_tokens=False)`.
        limit: Tokens after which reading stops, at the end of a text.

    Raises:
        ValueError: If the file is none of these, a line has no text, or there are no tokens.
    """
    source = Path(source)
    if str(source) == "noise":
        return np.array(tokenizer.encode(FILLER, add_special_tokens=False))
    if source.suffix == ".npy":
        return np.load(source, mmap_mode="r")
    parts, total = [], 0
    for text in _texts(source):
        parts.append(np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64))
        total += len(parts[-1])
        if limit is not None and total >= limit:
            break
    if not total:
        raise ValueError(f"{source} must hold texts, got 0 tokens")
    return np.concatenate(parts)


def _texts(source: Path):
    """Yield texts, each with an empty line behind it but a plain file's."""
    suffixes = [suffix for suffix in source.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"a haystack must be noise, .npy, .txt or .jsonl (or these as .gz), got {source}")
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8", newline="\n") as lines:
        if kind == ".txt":
            yield lines.read()
            return
        for line in lines:
            row = json.loads(line)
            text = next((row[name] for name in COLUMNS if isinstance(row.get(name), str)), None)
            if text is None:
                raise ValueError(
                    f"every line of {source} must have a text in {' or '.join(COLUMNS)}, got {line[:80]!r}"
                )
            yield f"{text}\n\n"
