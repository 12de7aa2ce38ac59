"""A file of tokenised texts with their keywords: six arrays, `numpy.load` reads them.

tokens        uint16 [total]      all texts one after the other
offsets       int64 [texts + 1]   text t is tokens[offsets[t] : offsets[t + 1]]
keywords      uint8               packed bits, one for each token: it belongs to a keyword of its text
complete      bool [texts]        the text ends where its author ended it
sources       uint8 [texts]       index into source_names
source_names  str [sources]
"""

import os
from pathlib import Path

import numpy as np


def save_texts(path: Path, texts: list[dict]) -> None:
    """Write texts as `load_texts` returns them, ids below 65,536; the file appears at once or not at all."""
    names = list(dict.fromkeys(text["source"] for text in texts))
    temporary = path.with_name(f"temporary-{path.name}")
    np.savez_compressed(
        temporary,
        tokens=np.concatenate([np.asarray(text["input_ids"], dtype=np.uint16) for text in texts]),
        offsets=np.cumsum([0, *(len(text["input_ids"]) for text in texts)], dtype=np.int64),
        keywords=np.packbits(np.concatenate([np.asarray(text["keywords"], dtype=bool) for text in texts])),
        complete=np.array([text["complete"] for text in texts], dtype=bool),
        sources=np.array([names.index(text["source"]) for text in texts], dtype=np.uint8),
        source_names=np.array(names),
    )
    os.replace(temporary, path)


def load_texts(path: str | Path) -> list[dict]:
    """Read a file of `save_texts`.

    Returns:
        One dict a text: `input_ids` int64 array and `keywords` bool array, both [length] and with `<bos>` in front,
        `complete` bool, `source` str.
    """
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    tokens = arrays["tokens"].astype(np.int64)
    keywords = np.unpackbits(arrays["keywords"], count=len(tokens)).astype(bool)
    names = [str(arrays["source_names"][source]) for source in arrays["sources"]]
    bounds = zip(arrays["offsets"][:-1], arrays["offsets"][1:], strict=True)
    return [
        {"input_ids": tokens[start:end], "keywords": keywords[start:end], "complete": bool(complete), "source": name}
        for (start, end), complete, name in zip(bounds, arrays["complete"], names, strict=True)
    ]
