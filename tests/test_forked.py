"""Processes of the tests that are forked instead of started do what `python ARGUMENTS` does."""

import os
import subprocess
import sys

import pytest

from tests.support import forked


SAY = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['WORD'], __name__); print('told', file=sys.stderr)"
ENDS = {"": 0, "sys.exit(3)": 3, "sys.exit('no')": 1, "1 / 0": 1, "import os; os.kill(os.getpid(), 9)": -9}


@pytest.mark.parametrize("kind", ["code", "file", "module"])
def test_a_forked_process_has_the_arguments_the_folder_and_the_environment_of_a_started_one(kind, tmp_path):
    (tmp_path / "said.py").write_text(SAY)
    front = {"code": ["-c", SAY], "file": [str(tmp_path / "said.py")], "module": ["-m", "said"]}[kind]
    command, env = [sys.executable, *front, "a b", "c"], {**os.environ, "WORD": "w"}
    started = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    done = forked.run(command, tmp_path, env)
    assert (done.returncode, done.stdout, done.stderr) == (0, started.stdout, started.stderr)
    assert f"['a b', 'c'] {tmp_path} w __main__" in done.stdout and done.stderr == "told\n"


@pytest.mark.parametrize(("code", "status"), ENDS.items())
def test_a_forked_process_ends_as_it_would(code, status, tmp_path):
    done = forked.run([sys.executable, "-c", f"import sys; {code}"], tmp_path, dict(os.environ))
    assert done.returncode == status
    assert ("ZeroDivisionError" in done.stderr) == ("/" in code) and ("no" in done.stderr) == ("no" in code)


def test_a_clean_process_begins_without_hugging_face_and_without_this_package(tmp_path):
    code = "import sys; print({name.split('.')[0] for name in sys.modules})"
    modules = forked.run([sys.executable, "-I", "-c", code], tmp_path, dict(os.environ)).stdout
    absent = ("transformers", "huggingface_hub", "datasets", "peft", "modeling_insnext", "insnext_kernels", "tests")
    assert "'torch'" in modules and not [name for name in absent if f"'{name}'" in modules]
    # what one imports is not there for the next
    forked.run([sys.executable, "-c", "import transformers"], tmp_path, dict(os.environ))
    assert forked.run([sys.executable, "-I", "-c", code], tmp_path, dict(os.environ)).stdout.count("transformers") == 0
