# `make demo` and `make test` do everything on a fresh machine with Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test soak setup proto base-model benchmark clean

demo: $(READY)
	$(BIN)/fedpruner demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

setup: $(READY)

# constraints.txt pins versions that are known to work together, CPU build of torch included.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "FedPruner needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

proto: $(READY)
	$(BIN)/python proto/generate.py

base-model: $(READY)
	$(BIN)/python tools/make_base_model.py

# Every way to fail, 200 rounds of it, twice: rounds that drop what is late, and that take it.
soak: $(READY)
	PYTHONPATH=tests $(BIN)/python -m soak --rounds 200 --seed 1
	PYTHONPATH=tests $(BIN)/python -m soak --rounds 200 --seed 2 --late

benchmark: $(READY)
	$(BIN)/python -m benchmarks.memory

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache
