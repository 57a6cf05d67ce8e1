# make demo    install, make scenes, train from the committed warm start, evaluate, predict, write runs/demo/report.html
# make test    install, lint, type-check, test
# make test-all the same with the tests that take minutes
# make fuzz    damaged files of every kind with every command: MINUTES=30; failing cases are kept in runs/fuzz
# make mutants whether tests notice small changes: ROOM=losses (a list: python -m tests.mutants --help), SAMPLE=40,
#              SEED=0, JOBS=1, MINUTES=5; it resumes where it was stopped
# make recipe  the whole tiny recipe from random weights: writes the warm start, then trains the paper's stages
# make stages  the paper's five stages at tiny size, each from the one before
# make docs    the site of the documents and the Python API, in build/site
# make notebooks runs the notebooks of examples/ and stores their outputs; make picture draws that of the README
# make install the environment, which the others install first; EXTRA=tpu, cuda12 or cuda13 adds JAX for that device
# make lock    write constraints/ again after a change of setup.cfg; UPGRADE=--upgrade takes newer versions (network)
# make audit   query known vulnerabilities of all packages in constraints/ (network)
PYTHON ?= python3
BIN := .venv/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check
COMMA := ,
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 3

# All versions with the hashes of their files, if there is a list for this Python. `make CONSTRAINTS=` installs the
# newest versions that setup.cfg allows instead.
TAG := py$(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
CONSTRAINTS := $(wildcard constraints/$(TAG).txt)
EXTRA :=
INSTALLED := .venv/installed$(addprefix -,$(EXTRA))
LISTS := constraints/build.txt $(CONSTRAINTS) $(if $(EXTRA),constraints/$(TAG)-$(EXTRA).txt)

.PHONY: demo install test test-all fuzz mutants recipe stages lint docs notebooks picture lock audit clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml $(if $(CONSTRAINTS),$(LISTS))
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
ifneq ($(CONSTRAINTS),)
# An editable project has no hash, so it comes last: first the build packages, then all others, and nothing else.
	$(PIP) --require-hashes -r constraints/build.txt
	$(PIP) --require-hashes --no-build-isolation $(addprefix -r ,$(LISTS))
	$(PIP) --no-deps --no-build-isolation -e .
else
	@echo 'warning: no list of versions is used; the newest ones are installed, and no hash is compared' >&2
	$(PIP) -e '.[dev$(addprefix $(COMMA),$(EXTRA))]'
endif
	touch $@

.venv/tools/installed: constraints/uv.txt constraints/audit.txt
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/pip install --quiet --disable-pip-version-check --require-hashes -r constraints/uv.txt -r constraints/audit.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m crab_jax.demo $(if $(FROM_SCRATCH),--from-scratch)

recipe: $(INSTALLED)
	$(BIN)/python -m crab_jax.recipe
	$(BIN)/python -m crab_jax.stages --start runs/recipe/warmup

stages: $(INSTALLED)
	$(BIN)/python -m crab_jax.stages

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch_tpu.sh launch_slurm.sh .ci/run

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m ""

MINUTES := 10
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.programs.fuzz --minutes $(MINUTES) --rounds 100000 --seed $(or $(SEED),$(shell date +%s))

mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants $(or $(ROOM),$(error ROOM is missing: make mutants ROOM=losses)) \
	    --seed $(or $(SEED),0) --jobs $(or $(JOBS),1) $(addprefix --sample ,$(SAMPLE)) \
	    $(if $(filter command line,$(origin MINUTES)),--minutes $(MINUTES))

docs:
	$(MAKE) install EXTRA=docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks:
	$(MAKE) install EXTRA=docs
	$(BIN)/python examples/execute.py

picture: $(INSTALLED)
	$(BIN)/python docs/images/draw.py

# The lists of a device and of the documents have the packages that they add, with versions equal to those of the list
# of their Python.
DOCS = $(PYTHON) -c 'import configparser as c; p = c.ConfigParser(); p.read("setup.cfg"); \
    print(p["options.extras_require"]["docs"])'
COMPILE = .venv/tools/bin/uv pip compile --quiet --generate-hashes --no-annotate $(UPGRADE) \
    --custom-compile-command 'make lock   (newer versions: make lock UPGRADE=--upgrade)'
lock: .venv/tools/installed
	echo setuptools | $(COMPILE) - --python-version 3.11 -o constraints/build.txt
	echo uv | $(COMPILE) - --python-version 3.9 -o constraints/uv.txt
	echo pip-audit | $(COMPILE) - --python-version 3.11 -o constraints/audit.txt
	set -e; for version in 3.11 3.12 3.13; do \
	    list=constraints/py$$(echo $$version | tr -d .); \
	    $(COMPILE) setup.cfg --extra dev --python-version $$version -o $$list.txt; \
	    for extra in tpu cuda12 cuda13; do \
	        echo "jax[$$extra]" | $(COMPILE) - -c $$list.txt --no-strip-extras --python-version $$version \
	            --python-platform x86_64-manylinux_2_31 -o $$list-$$extra.txt; \
	    done; \
	    $(DOCS) | $(COMPILE) - -c $$list.txt --no-strip-extras --python-version $$version -o $$list-docs.txt; \
	done

# Without --strict, pip-audit reports unknown packages as free of vulnerabilities.
audit: .venv/tools/installed
	@failed=0; for list in constraints/*.txt; do \
	    echo "$$list"; \
	    found=$$(.venv/tools/bin/pip-audit --strict --progress-spinner off --disable-pip --require-hashes -r $$list \
	        2>.venv/tools/errors) && continue; \
	    failed=1; \
	    if [ -n "$$found" ]; then echo "$$found"; continue; fi; \
	    echo "error: $$list: cannot be audited ($$(tail -n 1 .venv/tools/errors | cut -c 1-200));" \
	        "make audit needs a network and an index that has advisories" >&2; \
	    exit 1; \
	done; exit $$failed

clean:
	rm -rf .venv runs
