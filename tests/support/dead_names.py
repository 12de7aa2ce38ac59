"""Names of ours that nobody uses: `python -m tests.support.dead_names`.

vulture counts a name as used where any file mentions it. The files of the libraries that call our overrides are read
beside our own, so that no list of exceptions is needed; tests are readers as well, and not reported on. Parameters and
fields are left out, as signatures follow a caller and records are filled or unpacked without their names; metrics too,
which `evaluate` loads by path.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from vulture import Vulture


ROOT = Path(__file__).parents[2]
EXAMPLES = ["examples/scripts", "examples/studies", "examples/checkpoints", "examples/serve"]
OURS = ["modeling_insnext", "kernels", "conversion", *EXAMPLES]
LIBRARY = Path(find_spec("transformers").origin).parent
CALLERS = [
    *LIBRARY.glob("*.py"),
    *(LIBRARY / "generation").rglob("*.py"),
    *(LIBRARY / "pipelines").glob("*.py"),
    *(LIBRARY / "integrations").glob("*.py"),
    Path(find_spec("tokenizers").origin).with_name("__init__.pyi"),
]


def dead_names(ours: list[Path], readers: list[Path]) -> list[str]:
    """Return `file:line: what` for every name defined in `ours` that neither `ours` nor `readers` mention."""
    # a server calls its routes and handlers by what decorates them
    finder = Vulture(ignore_decorators=["@router.*", "@app.*"])
    finder.scavenge([str(path) for path in (*ours, *readers)])
    found = [item for item in finder.get_unused_code() if any(Path(item.filename).is_relative_to(p) for p in ours)]
    return [f"{item.filename}:{item.first_lineno}: {item.message}" for item in found if not is_field(item)]


def is_field(item) -> bool:
    """Say whether a variable stands inside a class or a signature."""
    line = Path(item.filename).read_text(encoding="utf-8").splitlines()[item.first_lineno - 1]
    return item.typ == "variable" and line[:1].isspace()


def main() -> int:
    found = dead_names([ROOT / name for name in OURS], [ROOT / "tests", *CALLERS])
    print("\n".join(found))
    return len(found) > 0


if __name__ == "__main__":
    sys.exit(main())
