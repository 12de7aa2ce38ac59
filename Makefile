# Needs Python 3.10 to 3.13 and nothing else: `make demo` and `make test` set up $(VENV) by themselves.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: venv demo test lint format slow gpu clean

venv: $(STAMP)

# torch first: the resolver then takes the installed build, a CPU one for example, as given
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[train,test]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST)

slow: $(STAMP)
	$(PYTEST) -m slow

# on a machine with a GPU, PyTorch, Triton, Transformers and pytest: tests and benchmarks, nothing is installed
gpu:
	$(PYTHON) kernels/benchmarks/run.py $(if $(OUT),--out "$(OUT)")

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
