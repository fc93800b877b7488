# Everything runs in .venv, which the first target sets up by itself.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: quickstart test test-fast test-all lint format bench readme pretrained \
        quickstart-output test-output clean

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

# Most of the time goes into compiling thousands of small functions, so XLA does so with
# little optimization, and so does TensorFlow (tests/harness/quick.py). What all
# layers share, what serves the exports at the end, and test-all compile as users do.
XLA_QUICK := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
             --xla_cpu_use_fusion_emitters=false
QUICKLY = XLA_FLAGS="$(XLA_QUICK)"
ON_TENSORFLOW = env KERAS_BACKEND=tensorflow $(PY) -m pytest $(PYTEST)
ON_JAX = env KERAS_BACKEND=jax $(PY) -m pytest $(PYTEST)
SHARED := tests/layers/ops

# The suite: on TensorFlow, and on JAX all contracts and what it may make different (the
# KEPT of conftest files). A process keeps one core busy, so two run at a time, each half
# of the work; the output of the second one follows at the end.
test: lint
	@mkdir -p runs
	@echo "Two processes at a time; what the second prints follows at the end."
	@( trap 'kill $$job; exit 143' TERM; failed=0; \
	run() { "$$@" & job=$$!; wait $$job || failed=1; }; \
	export $(QUICKLY); echo "JAX: layers"; \
	run $(ON_JAX) --ignore=$(SHARED) --ignore=tests/optimizers --ignore=tests/zoo; \
	echo "TensorFlow: zoo"; \
	run $(ON_TENSORFLOW) tests/zoo; \
	exit $$failed ) >runs/test-rest.log 2>&1 & rest=$$!; \
	trap 'kill $$rest; exit 130' INT TERM; failed=0; \
	echo "TensorFlow: what layers share"; \
	$(ON_TENSORFLOW) $(SHARED) || failed=1; \
	echo "JAX: what layers share"; $(ON_JAX) $(SHARED) || failed=1; \
	export $(QUICKLY); echo "TensorFlow: layers and optimizers"; \
	$(ON_TENSORFLOW) --ignore=$(SHARED) --ignore=tests/zoo || failed=1; \
	echo "JAX: optimizers and zoo"; \
	$(ON_JAX) tests/optimizers tests/zoo || failed=1; \
	wait $$rest || failed=1; cat runs/test-rest.log; \
	exit $$failed

test-fast: lint
	$(QUICKLY) $(ON_TENSORFLOW) --fast -n 2 --dist loadfile

# All tests on both backends, and the full cross product of dtypes and pairs: takes long.
test-all:
	$(MAKE) test PYTEST=--all XLA_QUICK=

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

# And the lines that count of what this printed.
test-output:
	@mkdir -p runs
	$(MAKE) test > runs/test.log 2>&1 || { tail -n 50 runs/test.log; exit 1; }
	grep -E '^(All checks|[0-9]+ files|Two|JAX:|TensorFlow:|contract:|=+ .*passed)' \
	runs/test.log > docs/test.txt

readme: $(STAMP)
	KERAS_BACKEND=tensorflow $(PY) docs/make_readme.py

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache
