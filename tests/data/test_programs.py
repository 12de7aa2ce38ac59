"""The order of a program's lines: what stands after every step parses, and in the end all of it stands."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_insnext.data import ORDERS, InsertionCollator, cut_text, insertion_steps, piece_table, word_start_table
from modeling_insnext.data.programs import unit_lines
from tests.support.tokenizers import tiny_tokenizer


MODULES = (
    "bisect",
    "colorsys",
    "copyreg",
    "fnmatch",
    "genericpath",
    "linecache",
    "quopri",
    "reprlib",
    "sched",
    "this",
)

# every clause there is, and whatever shares a line or a statement with another
PROGRAM = '''\
# a comment
import sys; import os
TEXT = """one

    two"""
@first
@second(
    1,
)
class A(
    object,
): pass
async def f(
    a, b=(1,
          2),
    # who
):
    """Say."""

    if a: return b; c = 1
    elif b:
        # nothing yet
        x = 1; y = [
            2]
    elif \\
            a == b:
        pass
    # otherwise
    else:
        for i in a:
            continue
        # and then
        else: x = 2
        while a:
            break
        else:
            x = 3
            async with a as b, b: pass
    try:
        x = 4
    except ValueError: pass
    # the others
    except (
        TypeError,
        KeyError,
    ) as error:
        raise
    else:
        x = 5

    finally:
        x = 6
    try: x = 7
    finally: x = 8
    match a:
        # many
        case 1 | 2: pass
        case {
            "a": 1,
        } if b:
            x = 9
        case _:
            x = 10
    with a: x = 1 \\

    return lambda: (yield)
'''


def parses(lines, chosen):
    try:
        ast.parse("\n".join(lines[line] for line in sorted(chosen)))
    except SyntaxError:
        return False
    return True


def check(source, seed):
    """Check that every prefix parses and that all lines are there; return the steps."""
    steps, lines, present = insertion_steps(source, np.random.default_rng(seed)), source.split("\n"), set()
    for step in steps:
        assert step == sorted(step) and not present & set(step)
        present |= set(step)
        assert parses(lines, present), "\n".join(lines[line] for line in sorted(present))
    assert present == set(range(len(lines)))
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_every_prefix_of_every_clause_parses(seed):
    assert len(check(PROGRAM, seed)) > 15


@pytest.mark.parametrize("name", MODULES)
def test_every_prefix_of_the_standard_library_parses(name):
    check((Path(ast.__file__).parent / f"{name}.py").read_text(encoding="utf-8"), seed=0)


def test_control_lines_in_any_order_do_not_parse():
    lines, rng = PROGRAM.split("\n"), np.random.default_rng(0)
    order = rng.permutation(len(lines)).tolist()
    assert not all(parses(lines, order[: end + 1]) for end in range(len(lines)))


def test_simple_statements_come_alone_and_a_header_with_one_line_of_its_body():
    assert all(len(step) == 1 for step in check("a = 1\nb = 2\n# c\n\nd = 3", 0))
    for seed in range(10):
        steps = check("for i in a:\n    x = 1\n    y = 2", seed)
        assert sorted(map(len, steps)) == [1, 2] and 0 in steps[0] and len(steps[0]) == 2
    assert len({tuple(map(tuple, check("a = 1\nb = 2\nc = 3", seed))) for seed in range(100)}) == 6


def test_lines_that_are_tied_come_in_one_step():
    steps = insertion_steps("a = 1\nb = 2\nc = 3", np.random.default_rng(0), tied=[[0, 2]])
    assert sorted(steps, key=len) == [[1], [0, 2]]


def code_tokenizer(**options):
    return tiny_tokenizer(vocab_size=330, texts=[PROGRAM] * 3, all_bytes=True, **options)


def program_text(tokenizer, source=PROGRAM):
    ids = np.array(tokenizer(source)["input_ids"])
    return cut_text(ids, word_start_table(tokenizer), pieces=piece_table(tokenizer))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_every_step_of_the_order_parses_as_tokens_too(add_prefix_space, seed):
    text = program_text(code_tokenizer(add_prefix_space=add_prefix_space))
    units = ORDERS["program_lines"](text, text.given_units, np.random.default_rng(seed))
    source, lines = unit_lines(text)
    assert source == PROGRAM
    steps = insertion_steps(source, np.random.default_rng(seed), tied=[own for own in lines if len(own) > 1])
    step_of = {line: number for number, step in enumerate(steps) for line in step}
    turns = [step_of[lines[unit][0]] for unit in units]
    assert turns == sorted(turns)
    for turn in range(len(steps)):
        present = [place for place, unit in enumerate(text.unit_of) if unit and step_of[lines[unit][0]] <= turn]
        ast.parse(b"".join(text.pieces[place] for place in present).decode().removeprefix(" "))


def test_the_collator_writes_a_program_by_its_lines():
    tokenizer = code_tokenizer()
    ids = tokenizer("a = 1\nfor i in a:\n    x = 1\n    y = 2\n")["input_ids"]
    options = {"pad_token_id": 0, "order": "program_lines", "pieces": piece_table(tokenizer)}
    batch = InsertionCollator(**options, word_starts=word_start_table(tokenizer))([{"input_ids": ids}])
    assert sorted(batch["positions"][0].tolist()) == list(range(len(ids)))
    assert torch.equal(torch.tensor(ids)[batch["positions"][0]], batch["input_ids"][0])
    with pytest.raises(ValueError, match="set pieces"):
        InsertionCollator(pad_token_id=0, order="program_lines")([{"input_ids": ids}])


@pytest.mark.parametrize(("source", "message"), [("if a:", "needs Python"), ("a\r\nb", "carriage return")])
def test_what_is_no_program_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        insertion_steps(source, np.random.default_rng(0))


def test_pieces_joined_are_the_text():
    tokenizer = code_tokenizer(add_prefix_space=False)
    table = piece_table(tokenizer)
    for text in (PROGRAM, "é 中\n\t x"):
        assert b"".join(table[index] for index in tokenizer(text)["input_ids"]).decode() == text
    assert table[tokenizer.bos_token_id] == b""
