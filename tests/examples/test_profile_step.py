"""What a cached step asks of the device and makes: as much in a long text as in a short one."""

import pytest
from profile_step import ASKS, Operators
from step_clock import StepClock, write

from tests.support.insnext import shipped_model


# rows that run, the width of the texts, rows that write (twice), tokens that are barred, tokens to encode
QUESTIONS = {"alibi": 6, "rotary": 7}


@pytest.mark.parametrize("encoding", QUESTIONS)
def test_a_step_makes_as_many_operators_and_questions_in_a_long_text_as_in_a_short_one(encoding):
    model = shipped_model(position_encoding=encoding, num_key_value_heads=2)
    found = []
    for tokens in (8, 48):
        with StepClock(model) as clock, Operators(clock) as operators:
            write(model, tokens, 6)
        found.append(operators.a_step()[0])
    short, long = ({name: round(count, 6) for name, count in counts.items()} for counts in found)
    assert short == long and sum(short[name] for name in ASKS if name in short) <= QUESTIONS[encoding]
