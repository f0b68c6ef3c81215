# `make demo` and `make test` need Python 3.11 and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= runs/demo
LONG_OUTPUT ?= runs/demo_long
RANKS ?= 2
PORT ?= 29500
UNIT_TESTS := tests/unit tests/test_architecture.py tests/test_repository.py
SLURM_TESTS := tests/slurm

# Modules are compiled where they are first imported, once; an environment that forbids it would pay at every start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo demo-long test test-slurm lint soak clean

help:
	@echo "make demo   install, train the demo, leave pictures in $(OUTPUT)"
	@echo "make demo-long  train a larger one for about an hour, leave pictures in $(LONG_OUTPUT), scores in evaluation/"
	@echo "make test   install, run linters and tests"
	@echo "make test-slurm  the tests of slurm/ alone, in a Slurm of their own; needs root, slurm-wlm and munge"
	@echo "make lint   ruff and mypy alone"
	@echo "make soak   kill a run 100 times at random moments; about half an hour"
	@echo "make clean  remove the virtual environment and $(OUTPUT)"

# The stamp changes with requirements.txt, so an old environment is brought up to date and a finished one is left alone.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -r requirements.txt
	touch $@

demo: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(RANKS) --master_port $(PORT) ecdit_ds/train.py --deepspeed ds_configs/zero2.json --output $(OUTPUT)
	$(BIN)/python tools/sample.py --checkpoint $(OUTPUT) --output $(OUTPUT) --overwrite

demo-long: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(RANKS) --master_port $(PORT) ecdit_ds/train.py --config demo_long --output $(LONG_OUTPUT)
	$(BIN)/python tools/sample.py --checkpoint $(LONG_OUTPUT) --output $(LONG_OUTPUT) --overwrite
	$(BIN)/python tools/evaluate.py scenes --checkpoint $(LONG_OUTPUT) --batch-size 50

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Tests of single functions share the cores file by file; jobs wait for clocks most of the time, so that their files go
# side by side; launches of several ranks have the cores to themselves.
test: lint
	failed=0; \
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile $(UNIT_TESTS) || failed=1; \
	$(MAKE) --no-print-directory test-slurm || failed=1; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(UNIT_TESTS) $(SLURM_TESTS)) || failed=1; \
	exit $$failed

test-slurm: $(VENV)/installed
	$(BIN)/python -m pytest -rs --numprocesses 3 --dist loadfile $(SLURM_TESTS)

soak: $(VENV)/installed
	$(BIN)/python tests/resume/soak.py --kills 100 --output runs/soak

clean:
	rm -rf $(VENV) $(OUTPUT)
