# Everything runs in .venv, which the first target sets up by itself.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: quickstart test test-fast test-all lint format bench readme pretrained \
        quickstart-output clean

quickstart: $(STAMP)
	KERAS_BACKEND=tensorflow $(PY) -m kzoo.zoo.quickstart

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 14) and "kzoo needs Python 3.11 to 3.13; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[test,serve,jax]"
	touch $@

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The whole suite: once on TensorFlow, and what is not TensorFlow's own on JAX. Each
# keeps one core busy, so both run at a time; JAX's output follows at the end.
test: lint
	@mkdir -p runs
	@echo "pytest on TensorFlow, and on JAX into runs/test-jax.log"
	@KERAS_BACKEND=jax $(PY) -m pytest $(PYTEST) >runs/test-jax.log 2>&1 & jax=$$!; \
	trap 'kill $$jax; exit 130' INT TERM; \
	KERAS_BACKEND=tensorflow $(PY) -m pytest $(PYTEST); tensorflow=$$?; \
	wait $$jax; jax=$$?; cat runs/test-jax.log; \
	exit $$((tensorflow || jax))

test-fast: lint
	KERAS_BACKEND=tensorflow $(PY) -m pytest --fast -n 2 --dist loadfile

# The full cross product of dtypes and pairs, which takes long.
test-all:
	$(MAKE) test PYTEST=--all

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(STAMP)
	KERAS_BACKEND=tensorflow $(PY) benchmarks/step_time.py

# Maintainers' commands: they write what is committed.
pretrained: $(STAMP)
	KERAS_BACKEND=tensorflow $(PY) -m kzoo.zoo.pretrained

# README shows what this printed.
quickstart-output: $(STAMP)
	rm -rf runs/quickstart
	KERAS_BACKEND=tensorflow $(PY) -m kzoo.zoo.quickstart > docs/quickstart.txt

readme: $(STAMP)
	KERAS_BACKEND=tensorflow $(PY) docs/make_readme.py

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache
