"""Clean loads are forked here, but for the ones of a test that asks for `real_processes`."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from conversion.publishing import verification
from tests.support import forked


@pytest.fixture(autouse=True)
def forked_loads(request, monkeypatch):
    def run(command, cwd: Path, env: dict[str, str], **_):
        return forked.run(command, cwd, env, forked.READING)

    if "real_processes" not in request.fixturenames:
        monkeypatch.setattr(verification, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def real_processes():
    """Start an interpreter of its own for each clean load, as users do."""


@pytest.fixture
def run_python():
    """Return a function that runs `python ARGUMENTS` in a folder, forked, and returns the completed process."""
    return lambda *arguments, cwd: forked.run(["python", *arguments], cwd, dict(os.environ), forked.READING)
