# make demo    install, make scenes, train from the committed warm start, evaluate, predict, write runs/demo/report.html
# make test    install, lint, type-check, test
# make test-all the tests of minutes too
# make recipe  the whole tiny recipe from nothing: writes the warm start, then trains the paper's stages
# make stages  the paper's five stages at tiny size, each from the one before
PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 3

# Tested versions, where there is a list for this Python; else the newest ones.
CONSTRAINTS := $(wildcard constraints/py$(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])').txt)

.PHONY: demo test test-all recipe stages lint clean

.venv/installed: setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m crab_jax.demo $(if $(FROM_SCRATCH),--from-scratch)

recipe: .venv/installed
	$(BIN)/python -m crab_jax.recipe
	$(BIN)/python -m crab_jax.stages --start runs/recipe/warmup

stages: .venv/installed
	$(BIN)/python -m crab_jax.stages

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m ""

clean:
	rm -rf .venv runs
