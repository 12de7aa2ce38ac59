"""The order in which a program's lines are inserted so that it parses after every step.

A step is the least that has to come together: a statement, the headers around it that are not there yet, and for each
header, and for each clause that must not be empty, one statement inside. So a step is mostly one line, and a `for`
comes with one line of its body:

    1                                  print("done")
    2      total = 0                   print("done")
    3      total = 0
           for x in numbers:
               total += x              print("done")

Which statement comes next is drawn uniformly. LintSeq (arXiv:2410.02749) deletes lines at random until a linter is
content and reads that backwards; here the grammar says what must go together, so nothing is tried and nothing parsed
twice. Names may be used before the line that defines them: that is no matter of the grammar.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np


CLAUSES = ("body", "handlers", "cases", "orelse", "finalbody")


@dataclass(eq=False)
class Part:
    """A statement without what is inside, or a clause of one: lines that come together, and what must be there too.

    Attributes:
        lines: Its own lines, from 0; a clause without a line of its own, as a function's body, has none.
        needs: Parts that must be there as well.
        one_of: Sets of parts of each of which one must be there.
    """

    lines: list[int]
    needs: list["Part"] = field(default_factory=list)
    one_of: list[list["Part"]] = field(default_factory=list)


def insertion_steps(source: str, rng: np.random.Generator, tied: Iterable[Iterable[int]] = ()) -> list[list[int]]:
    """Draw in which order the lines of a program are inserted.

    Args:
        source: A Python program.
        rng: Draws.
        tied: Sets of lines that must come in one step.

    Returns:
        The lines of each step, from 0 and ascending; every line is in one of them. What stands after each step,
        in the order of the program, parses.

    Raises:
        ValueError: If it is no Python, or its lines end otherwise than with a line feed.
    """
    if "\r" in source:
        raise ValueError("the lines of a program must end with a line feed, got a carriage return")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the order of a program's lines needs Python, got {source[:40]!r}: {error}") from error
    num_lines = source.count("\n") + 1
    parts = list(_parts_of(tree.body, None))
    # a comment or an empty line between statements needs nobody
    free = sorted(set(range(num_lines)) - {line for part in parts for line in part.lines})
    parts += [Part([line]) for line in free]
    return _drawn(parts, _together(num_lines, [*tied, *_joined(source.split("\n"))]), rng)


def _joined(lines: list[str]) -> Iterator[range]:
    """Yield the lines that a backslash joins: to the next one that is not empty, since none may end the text."""
    for line, text in enumerate(lines):
        if text.endswith("\\"):
            yield range(line, next((n for n in range(line + 1, len(lines)) if lines[n].strip()), len(lines) - 1) + 1)


def _drawn(parts: list[Part], together: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    parts_on = defaultdict(list)
    for part in parts:
        for line in part.lines:
            parts_on[line].append(part)
    present, steps = set(), []
    for place in rng.permutation(len(parts)):
        lines, waiting = set(), [parts[place]]
        while waiting:
            part = waiting.pop()
            if part in present:
                continue
            present.add(part)
            waiting += part.needs
            for choices in part.one_of:
                if not any(choice in present or choice in waiting for choice in choices):
                    waiting.append(choices[rng.integers(len(choices))])
            new = {other for line in part.lines for other in together[line]} - lines
            lines |= new
            waiting += [other for line in new for other in parts_on[line]]
        if lines:
            steps.append(sorted(lines))
    return steps


def _parts_of(statements: list[ast.stmt], clause: Part | None) -> Iterator[Part]:
    """Yield the parts of the statements of a clause, itself not; last of each statement comes its own."""
    for statement in statements:
        part = Part([], [] if clause is None else [clause])
        begin, own_end, clauses, previous = _first_line(statement), statement.end_lineno - 1, defaultdict(list), None
        for name, members in _bodies(statement):
            # `else` and `finally` stand between two bodies, the other clauses begin where they say
            named = name in ("orelse", "finalbody")
            head = previous + 1 if named else _first_line(members[0] if name == "body" else members)
            members = members if isinstance(members, list) else members.body
            if previous is None:
                own_end = head - 1
            inner = Part(list(range(head, _first_line(members[0]))), [part])
            yield from _inside(inner, members)
            yield inner
            clauses[name].append(inner)
            previous = members[-1].end_lineno - 1
        part.lines = list(range(begin, max(own_end, begin) + 1))
        _require(part, clauses)
        yield part


def _bodies(statement: ast.stmt) -> Iterator[tuple[str, list[ast.stmt] | ast.AST]]:
    """Yield the clauses of a statement in the order of the text: lists of statements, handlers, cases."""
    for name in CLAUSES:
        members = getattr(statement, name, None) or []
        if name in ("handlers", "cases"):
            yield from ((name, member) for member in members)
        elif isinstance(members, list) and members:
            yield name, members


def _inside(clause: Part, members: list[ast.stmt]) -> Iterator[Part]:
    """Yield all parts in a clause, of which one statement must be there."""
    own = []
    for member in members:
        parts = list(_parts_of([member], clause))
        own.append(parts[-1])
        yield from parts
    clause.one_of = [own]


def _require(part: Part, clauses: dict[str, list[Part]]) -> None:
    """Say which clauses a statement cannot be without: its body, a case, a handler or `finally`."""
    part.needs += clauses["body"]
    part.one_of += [choices for choices in (clauses["cases"], clauses["handlers"] + clauses["finalbody"]) if choices]
    if clauses["handlers"]:
        for otherwise in clauses["orelse"]:
            otherwise.one_of.append(clauses["handlers"])


def _first_line(node: ast.AST) -> int:
    decorators = getattr(node, "decorator_list", [])
    first = node.pattern.lineno if isinstance(node, ast.match_case) else node.lineno
    return min([first, *(decorator.lineno for decorator in decorators)]) - 1


def _together(num_lines: int, tied: Iterable[Iterable[int]]) -> list[list[int]]:
    """Return for each line the lines that come with it."""
    groups = [[line] for line in range(num_lines)]
    for lines in tied:
        merged = sorted({other for line in lines for other in groups[line]})
        for line in merged:
            groups[line] = merged
    return groups


def unit_lines(text) -> tuple[str, list[list[int]]]:
    """Return the program that a `UnitText` with `pieces` is, and the lines that each unit has a part in.

    A line feed belongs to the line that it begins, and so does white space before it: a token of an empty line and of
    the indentation of the next one is the next one's.
    """
    source, lines, line = b"".join(text.pieces), [[] for _ in range(text.num_units)], 0
    for piece, unit in zip(text.pieces, text.unit_of, strict=True):
        mine = {line + piece[:place].count(b"\n") for place, byte in enumerate(piece) if not bytes([byte]).isspace()}
        line += piece.count(b"\n")
        lines[unit] = sorted({*lines[unit], *mine, line})
    # a tokenizer may put one space before every text
    return source.decode("utf-8", errors="replace").removeprefix(" "), lines


def draw_lines(text, given_units: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the order `program_lines`: the missing units of each step from left to right, step after step.

    Raises:
        ValueError: If the text has no pieces, or is no program.
    """
    if text.pieces is None:
        raise ValueError("program_lines needs what each token says, got a text without (set pieces)")
    source, lines = unit_lines(text)
    steps = insertion_steps(source, rng, tied=[own for own in lines if len(own) > 1])
    step_of = {line: number for number, step in enumerate(steps) for line in step}
    missing = np.flatnonzero(~given_units)
    turns = np.array([step_of[lines[unit][0]] for unit in missing], dtype=np.int64)
    return missing[np.argsort(turns, kind="stable")]
