# Every target sets up what it needs: Python 3.11, make and git are enough to start from.
#
#   make demo                 train the miniature for a few minutes and show the gain
#   make demo SEED=7          the same with another seed; ARGS="--set key=value" passes anything else on
#   make crossval             search settings, cross-validate, fit, test, report (goes on where it was ended)
#   make test                 the tests of every day (TESTS="tests/trainer -k ratio" narrows them)
#   make test-all             the slow ones too: training, clusters, kills, browsers
#   make check                lint, format, types and layers
#   make parity               our scores against the references' own code (PARITY=--quick takes a minute)

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PARITY_VENV  := .parity
PARITY_STAMP := $(PARITY_VENV)/.installed
CONFIG ?= configs/miniature.yaml
WORKERS ?= 2
TESTS  ?= tests

.DEFAULT_GOAL := help
.PHONY: help venv demo crossval test test-all test-docker kill-test check docs parity format lock compose-test clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 18

venv: $(STAMP)  ## create .venv from the lock (done by every target that needs it)

# pip obeys the machine's own settings (mirrors, certificates); the lock decides every version and hash.
$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or set make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing the locked packages into $(VENV): about 5 GB, some minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## train on the miniature, print the gain, save images and LoRA
	$(BIN)/reward-trainer demo --config $(CONFIG) $(if $(SEED),--seed $(SEED)) $(ARGS)

crossval: $(STAMP)  ## search, three folds, a final fit and the test prompts on the miniature; report.html
	$(BIN)/reward-trainer crossval --config $(CONFIG) --judge --search $(if $(SEED),--seed $(SEED)) $(ARGS)

# worksteal: a worker that is done takes tests from the other one's queue.
PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(STAMP)  ## run the tests, except slow ones and those that need a container engine
	$(PYTEST) -m "not docker and not slow" $(TESTS)

test-all: $(STAMP)  ## run all tests that need no container engine
	$(PYTEST) -m "not docker" $(TESTS)

test-docker: $(STAMP)  ## build the images and run the composition in the engine at hand
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m docker -v $(TESTS)

compose-test: test-docker  ## the same as test-docker

kill-test: $(STAMP)  ## kill the trainer 25 times at random moments and compare with the uninterrupted run
	$(BIN)/python -m tests.support.trainer.kill_driver $(or $(KILL_FOLDER),$(shell mktemp -d)) $(ARGS)

check: $(STAMP) docs  ## lint, format, types, layers, links of the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The variable silences an advertisement for the theme's successor; --strict refuses every warning of ours.
docs: $(STAMP)  ## build the documentation into site/; every link has to lead somewhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# hpsv2 and OpenAI's clip live in an environment of their own, which sees the locked one.
$(PARITY_STAMP): $(STAMP) benchmarks/parity/requirements.txt benchmarks/parity/environment.py
	$(BIN)/python -m benchmarks.parity.environment $(PARITY_VENV)
	@touch $@

parity: $(PARITY_STAMP)  ## prove the scores against the references' own code, on random full-size weights
	$(PARITY_VENV)/bin/python -m benchmarks.parity $(PARITY)

format: $(STAMP)  ## reformat and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

COMPILE = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate $(LOCKFLAGS)

# One resolution decides; the smaller locks are cuts of it. LOCKFLAGS=--upgrade takes the newest versions.
lock:  ## resolve the dependencies anew into the locks and environment.yml
	@test -x $(BIN)/uv || { echo "make: $(BIN)/uv not found; run make venv first" >&2; exit 1; }
	$(COMPILE) --all-extras -o requirements.lock
	$(COMPILE) -c requirements.lock -o requirements/light.lock
	for extra in torch service ray trainer; do \
	  $(COMPILE) -c requirements.lock --extra $$extra -o requirements/$$extra.lock || exit 1; done
	$(BIN)/python tools/environment.py --write

clean:  ## remove the environment and every cache; runs/ stays
	rm -rf $(VENV) $(PARITY_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
