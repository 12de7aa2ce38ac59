"""Folders that appear whole or not at all, and the small files in them."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase


# what Transformers notes of where a tokenizer was loaded from, and code that is not taken along
OF_THE_SOURCE = ("auto_map", "is_local", "local_files_only")


@contextmanager
def refusing(rule: str) -> Iterator[None]:
    """Raise a `ValueError` that names the rule in the place of whatever a library raises about what it was given."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{rule}, got {type(error).__name__}: {' '.join(str(error).split())}") from error


def read_json(path: str | os.PathLike):
    """Return what a JSON file holds.

    Raises:
        ValueError: If it holds something else.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, got {error}") from None


def read_fields(path: str | os.PathLike) -> dict:
    """Return the fields in a JSON file, none if there is no such file.

    Raises:
        ValueError: If it holds something else.
    """
    fields = read_json(path) if Path(path).is_file() else {}
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold an object of JSON, got {type(fields).__name__}")
    return fields


def write_fields(path: str | os.PathLike, fields: dict) -> None:
    Path(path).write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def new_folder(folder: str | os.PathLike) -> Path:
    """Return where a new folder will be, links followed.

    Raises:
        ValueError: If something is there, but for an empty folder, or there can be no folder.
    """
    try:
        place = Path(folder).resolve()
    except RuntimeError as error:
        raise ValueError(f"{folder} must be a new or an empty folder, got {error}") from None
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{folder} must be a new or an empty folder, got one that holds something")
    if place == Path.cwd():
        raise ValueError(f"{str(folder)!r} must be another folder than the working directory, which it would replace")
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{folder} must be inside a folder, got the file {above}")
    return place


@contextmanager
def appearing(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` in the end, or vanishes if something is raised.

    Raises:
        ValueError: If something is there.
    """
    place = new_folder(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as temporary:
        made = Path(temporary, place.name)
        made.mkdir()
        yield made
        if place.exists():
            place.rmdir()
        made.replace(place)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer as one that stands by itself."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    write_fields(path, {name: value for name, value in read_fields(path).items() if name not in OF_THE_SOURCE})
