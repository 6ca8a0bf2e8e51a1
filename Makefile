# `make test` and `make demo` need nothing but python3: they make an environment and install into it.

TORCH ?= torch==2.13.0
WORKERS ?= 2
# Each worker begins with a share of the files, so that fixtures are made once, and ends with tests of the other ones.
PARALLEL = -n $(WORKERS) --dist worksteal
PYTHON3 ?= python3

ENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(ENV)/bin/python
INSTALLED := $(ENV)/.seqbuild-installed
DOCS_INSTALLED := $(ENV)/.seqbuild-docs

.DEFAULT_GOAL := test
.PHONY: demo docs test test-all test-oldest test-times bench clients coverage lint style suite types venv

demo: venv
	$(PYTHON) demo/demo.py

# Types are checked beside the tests: mypy uses one core.
test: style
	+$(MAKE) --no-print-directory -j2 types suite

suite: venv
	$(PYTHON) -m pytest $(PARALLEL)

# Sweeps over many architectures, hours on two cores, besides what `make test` runs.
test-all: lint
	$(PYTHON) -m pytest $(PARALLEL) -m ""

# Processor time of the tests of each package, written to docs/architecture.md.
test-times: venv
	$(PYTHON) tests/times.py $(PARALLEL)

# The minimum versions that pyproject.toml declares, in an environment of their own under .oldest (7 GB, made once:
# the oldest torch comes with CUDA's libraries); see docs/versions.md.
test-oldest: .oldest/minimums.txt
	.oldest/bin/python -m pytest $(PARALLEL)

.oldest/minimums.txt: pyproject.toml tests/minimums.py | .oldest/bin/python
	.oldest/bin/python tests/minimums.py > $@.new
	.oldest/bin/python -m pip install --quiet --requirement $@.new
	.oldest/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	.oldest/bin/python -m pip check
	mv $@.new $@

.oldest/bin/python:
	$(PYTHON3) -m venv .oldest

lint: style types

style: venv
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: venv
	$(PYTHON) -m mypy --strict seqbuild runtime

coverage: venv
	$(PYTHON) tests/coverage.py

# The documentation as a site, in site/. A broken link, an unknown anchor or a page without a place is an error.
docs: $(DOCS_INSTALLED)
	$(PYTHON) -m website.links
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet --strict
	$(PYTHON) -m website.built site

bench: venv
	set -e; for script in tests/bench/bench_*.py; do echo "== $$script"; $(PYTHON) $$script; done

# A headless Chromium opens our pages, which must be installed; see docs/report.md.
# llm-compressor runs our pipeline, and other programs read our checkpoints, in environments of their own under .clients (4 GB, made once); see docs/readers.md.
clients: venv
	$(PYTHON) tests/clients/pipelines.py
	$(PYTHON) tests/clients/inputs.py
	$(PYTHON) tests/clients/tasks.py
	$(PYTHON) tests/clients/readers.py --update
	$(PYTHON) tests/clients/browser.py

venv: $(INSTALLED)

# An environment may have been filled from another checkout: then its stamp does not count.
ifneq ($(shell cat '$(INSTALLED)' 2>/dev/null),$(CURDIR))
.PHONY: $(INSTALLED)
endif

# torch goes first and pinned: as a dependency of the rest pip would take the newest build, which brings
# gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m ensurepip --upgrade
	$(PYTHON) -c 'import torch' 2>/dev/null || $(PYTHON) -m pip install --quiet '$(TORCH)'
	$(PYTHON) -m pip install --quiet --editable '.[dev]'
	echo '$(CURDIR)' > $@

$(DOCS_INSTALLED): pyproject.toml $(INSTALLED)
	$(PYTHON) -m pip install --quiet --editable '.[docs]'
	touch $@

$(PYTHON):
	$(PYTHON3) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "python 3.10 or newer is needed")'
	$(PYTHON3) -m venv '$(ENV)'
