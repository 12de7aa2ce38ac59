"""A package so that `python -m examples.serve` finds this folder and no other one of that name."""
