# `make demo` and `make test` need Python 3.11 and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
LOCKED := --no-compile --no-deps --require-hashes
OUTPUT ?= runs/demo
LONG_OUTPUT ?= runs/demo_long
RANKS ?= 2
PORT ?= 29500
UNIT_TESTS := tests/unit tests/test_architecture.py tests/test_repository.py
SLURM_TESTS := tests/slurm

# Modules are compiled where they are first imported, once; an environment that forbids it would pay at every start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install demo demo-long test test-slurm lint lock soak clean

help:
	@echo "make install  a virtual environment in $(VENV) with what requirements.lock names; the others do so too"
	@echo "make demo   install, train the demo, leave pictures in $(OUTPUT)"
	@echo "make demo-long  train a larger one for about an hour, leave pictures in $(LONG_OUTPUT), scores in evaluation/"
	@echo "make test   install, run linters and tests"
	@echo "make test-slurm  the tests of slurm/ alone, in a Slurm of their own; needs root, slurm-wlm and munge"
	@echo "make lint   ruff and mypy alone"
	@echo "make lock   write requirements.lock anew after a change of requirements.txt"
	@echo "make soak   kill a run 100 times at random moments; about half an hour"
	@echo "make clean  remove the virtual environment and $(OUTPUT)"

install: $(VENV)/installed

# The stamp changes with requirements.lock, so an old environment is brought up to date and a finished one is left alone.
# Nothing is installed but files whose hashes stand in the lock. Which build of torch it is, for CUDA or for CPUs alone, the
# registry decides; the libraries of CUDA are left out where nothing asks for them.
$(VENV)/installed: requirements.lock
	$(PYTHON) -m venv $(VENV)
	awk '/^[^ #]/ { part = /^torch==/ ? "torch" : /^(cuda|nvidia|triton)-?/ ? "cuda" : "other" } part { print > "$(VENV)/" part ".lock" }' $<
	$(PIP) download --no-deps --dest $(VENV)/torch --constraint requirements.txt torch
	$(PIP) install $(LOCKED) --no-index --find-links $(VENV)/torch --requirement $(VENV)/torch.lock
	rm -r $(VENV)/torch
	$(PIP) install $(LOCKED) --requirement $(VENV)/other.lock
	$(PIP) check >/dev/null || $(PIP) install $(LOCKED) --requirement $(VENV)/cuda.lock
	$(PIP) check
	touch $@

# torch's build for CPUs has the same version, and stands in another index.
TORCH_CPU := --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --disable-pip-version-check --quiet uv==0.13.9
	$(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command "make lock" --output-file requirements.lock requirements.txt
	sed -i -e '/$(TORCH_CPU)/d' -e 's/^torch==.*/&\n    $(TORCH_CPU) \\/' requirements.lock

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
