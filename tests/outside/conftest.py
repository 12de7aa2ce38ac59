"""Files here need packages that `make test` does not install; a file is left out where its package is absent."""

from importlib.util import find_spec


NEEDS = {"test_trl.py": "trl"}

collect_ignore = [file for file, package in NEEDS.items() if find_spec(package) is None]
