# Everything needs Python 3.11, git and make, nothing else. `make help` lists the targets.
#
# Your own choices, for example on a CUDA machine:
#   make .venv TORCH=torch==2.12.1 CONSTRAINTS=    another torch, and what fits it instead of the tested versions
#   make .venv PIP_FLAGS="--extra-index-url ..."   another build of the same torch
# The first that runs and is new enough (a name on the PATH may be a shim without an interpreter behind it).
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
CONSTRAINTS ?= -c constraints.txt
PYTEST_FLAGS ?=
# Of `make faults`. More processes than cores: a night mostly waits.
SEEDS ?= 20
SEED ?=
ACKS_LATE ?= 1
FAULT_PROCESSES ?= 6
# Of `make soak`.
MINUTES ?= 30
JOBS ?= 10000

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) $(CONSTRAINTS)
CHECKED := jobs sd_engine worker migrations tests benchmarks

# No test and no command of ours may ask a model hub for anything.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-slow faults faults-mutations soak bench figures parity audit check format train-mini clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: $(STAMP)  ## the environment, made when missing or stale

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "1/3 making $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "2/3 installing $(TORCH)"
	@$(INSTALL) "$(TORCH)"
	@echo "3/3 installing nightshift with its extras"
	@$(INSTALL) -e ".[worker,s3,postgres,test]"
	@touch $@

demo: $(STAMP)  ## the main job: submit, render together, store, contact sheet
	@$(BIN)/nightshift demo

test: $(STAMP)  ## the tests, without the slow ones
	@$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

test-slow: $(STAMP)  ## the slow tests only
	@$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

faults: $(STAMP)  ## every fault of the table, SEEDS=20 times each; ACKS_LATE=0: bells acked early; SEED=7: one again
	@$(BIN)/python -m pytest -q -n $(FAULT_PROCESSES) --dist load --maxschedchunk 2 tests/faults --acks-late $(ACKS_LATE) \
		$(if $(SEED),--seed $(SEED),--seeds $(SEEDS)) $(PYTEST_FLAGS)

faults-mutations: $(STAMP)  ## break our own code in one way after the other, and see which rows notice
	@$(BIN)/python -m tests.faults.mutate --report benchmarks/results/fault_mutations.json

soak: $(STAMP)  ## row 53 at length: MINUTES=30 JOBS=10000 SEED=1
	@SOAK_MINUTES=$(MINUTES) SOAK_JOBS=$(JOBS) SOAK_REPORT=benchmarks/results/soak.json \
		$(BIN)/python -m pytest -q -s tests/faults/test_soak.py --seed $(or $(SEED),1)

BENCHMARKS := unet pipeline mixed urgent service submit scale cold memory choices

bench: $(STAMP)  ## every benchmark of speed, one after the other: two hours and a half on two cores
	@$(INSTALL) -e ".[bench]" || echo "OpenVINO could not be installed: it is left out" >&2
	@failed=; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || failed="$$failed $$name"; \
		done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

figures: $(STAMP)  ## how fast the queue is, how soon it notices a dead worker, what its promise costs
	@$(BIN)/python -m benchmarks.queue_figures

parity: $(STAMP)  ## full-size SD 1.5 and 2.1 models beside the reference's: a table of differences
	@$(BIN)/python -m benchmarks.parity

# In an environment of its own, whose packages are not ours to pin. Strict: what could not be asked about is a failure.
audit: .audit/bin/pip-audit  ## published advisories on the versions in constraints.txt (asks PyPI)
	@.audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

.audit/bin/pip-audit:
	@$(PYTHON) -m venv .audit
	@.audit/bin/python -m pip --disable-pip-version-check install --quiet "pip-audit>=2.10"

check: $(STAMP)  ## ruff, mypy --strict and the import rule
	@$(BIN)/ruff format --check $(wildcard $(CHECKED))
	@$(BIN)/ruff check $(wildcard $(CHECKED))
	@$(BIN)/mypy --strict
	@$(BIN)/python -m pytest -q tests/test_imports.py

format: $(STAMP)  ## write the formatting that check asks for
	@$(BIN)/ruff format $(wildcard $(CHECKED))
	@$(BIN)/ruff check --fix $(wildcard $(CHECKED))

train-mini: $(STAMP)  ## train the shipped model anew (hours on two cores, resumable)
	@$(BIN)/nightshift train-mini

clean:  ## remove what was made here: environment, caches, build products
	rm -rf $(VENV) .audit build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
