# make demo, demo-translation, test, test-all: each makes .venv, installs what it needs and runs. PYTHON=python3.12 chooses one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The environment of test-oldest, with the lowest Python and the lowest versions that are supported.
OLDEST ?= .venv-oldest
OLDEST_PYTHON ?= python3.10

.NOTPARALLEL:
.PHONY: demo demo-translation test test-all test-oldest crash-test lint results reference docs dist build check-tag clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo_digits.py

demo-translation: $(VENV)/.translation
	$(BIN)/hf-selfkd train translation

# Files in the order of tests/conftest.py. One thread a process: two processes of two threads each would fight for two cores.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# With those that start processes of their own: several processes, crashes, uploads, whole commands.
test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-oldest: $(OLDEST)/.oldest
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

# Kills small trainings at random moments and compares how they end; TRIES=100 PROCESSES=2 TEACHER=uploads and more in docs/reliability.md.
TRIES ?= 100
PROCESSES ?= 1
TEACHER ?= all
crash-test: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m crash --tries $(TRIES) --processes $(PROCESSES) --teacher "$(TEACHER)"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tables of docs/results.md, from the runs that are logged in docs/results.
results: $(VENV)/.dev
	$(BIN)/python benchmarks/results.py

# The pages of docs/reference, from docstrings, dataclasses and commands.
reference: $(VENV)/.dev
	$(BIN)/python docs/generate_reference.py

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# What is released: source and wheel in dist/, from nothing that an earlier build left behind.
dist: $(VENV)/.release
	rm -rf build dist *.egg-info
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	! tar -tzf dist/*.tar.gz | grep /tests/

# And the wheel at work in an empty environment: some gigabytes, for minutes.
build: dist
	PYTHON=$(PYTHON) .ci/check_wheel dist/*.whl

# Whether TAG (v0.1.0) is the version of the package, the citation and the changelog.
check-tag:
	.ci/check_tag "$(TAG)"

# One stamp an extra, so that each command works alone and in any order. venv writes pip last: without it, it was stopped.
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing hf_selfkd[$*] into $(VENV): the first time this takes minutes, most of them for PyTorch."
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

$(OLDEST)/.oldest: pyproject.toml requirements/oldest.txt
	test -x $(OLDEST)/bin/pip || $(OLDEST_PYTHON) -m venv $(OLDEST)
	@echo "Installing the oldest supported versions into $(OLDEST): a PyTorch of its own, some gigabytes."
	$(OLDEST)/bin/python -m pip install --quiet --constraint requirements/oldest.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist site *.egg-info .pytest_cache .ruff_cache
