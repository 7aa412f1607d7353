# Two commands for a newcomer: `make train` and `make test`. Both set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: train test lint types docs gpu faults clean

train: $(VENV)/.train
	$(BIN)/python train.py --config starter/train.json

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

docs: $(VENV)/.train
	$(BIN)/python -m utils.option_docs
	$(BIN)/python -m utils.file_tree

gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python -m tests.bench.gpu

faults: $(VENV)/.test
	$(BIN)/python -m tests.faults

$(VENV)/.train: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.test: requirements.txt requirements-dev.txt $(VENV)/.train
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
