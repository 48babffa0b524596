# Development commands. `make check` is what has to pass before a change goes in.

PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
BIN := $(dir $(shell $(PYTHON) -c 'import sys; print(sys.executable)'))
CODE := src tests examples runs claims benchmarks
TESTS ?= -n auto

export OMP_NUM_THREADS ?= 1

.PHONY: check format-check lint types layers test format speedrun smoke bench

check: format-check lint types layers test  ## everything

format-check:
	$(PYTHON) -m ruff format --check $(CODE)

lint:
	$(PYTHON) -m ruff check $(CODE)

types:
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

layers:
	PYTHONPATH=src $(BIN)lint-imports

test:
	$(PYTHON) -m pytest $(TESTS)

format:
	$(PYTHON) -m ruff format $(CODE)
	$(PYTHON) -m ruff check --fix $(CODE)

speedrun:  ## one GPU: data, training of every stage, evaluation
	PATH="$(BIN):$$PATH" bash runs/speedrun.sh

smoke:  ## the same path in miniature, on the CPU
	PATH="$(BIN):$$PATH" bash runs/speedrun.sh --smoke

bench:  ## speed of the embedded models on this machine
	for model in tiny/frame-1step tiny/frame-2step tiny/chunk-4step; do \
		$(PYTHON) -m causalreel bench --model $$model || exit 1; \
	done
