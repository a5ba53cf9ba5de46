# make demo      check, run and report the whole CT-CLIP study, 8 arms x 3 seeds, on made volumes
# make test      lint, type-check, then every test: most in two processes, then those that need the machine alone
# make test-all  on every supported Python found here, each in an environment of its own, with all cases, and with
#                programs that are compiled as a user's are
# make faults    the fault table of README.md at length: hundreds of kills, of full disks, of faults under SLURM
# make lint      ruff and pyright        make format   rewrite with ruff
# make install   .venv with everything   make clean    remove environments, caches, builds
#
# PYTHON chooses the interpreter, VENV the environment, PYTEST_ARGS what pytest gets:
#   make test PYTHON=python3.12 VENV=.venv-3.12 PYTEST_ARGS="-m 'not slow' -x"
# FAULTS_ARGS is for `make faults`: "--scale=0.05 --rows=1,6" is a short one.
# EXTRAS=dev,compile adds the tests that compile kernels for GPUs (another gigabyte).

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
FAULTS_ARGS ?=
EXTRAS ?= dev
DEMO_DIR ?= runs/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --prefer-binary --constraint constraints.txt
PYTHONS := python3.11 python3.12 python3.13

.PHONY: demo test test-all faults lint format install clean
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime
	@test -e $(DEMO_DIR)/ctclip/study.json || $(BIN)/jaxablate check configs/ctclip.py
	$(BIN)/jaxablate run configs/ctclip.py --workdir=$(DEMO_DIR)
	$(BIN)/jaxablate report configs/ctclip.py --workdir=$(DEMO_DIR)

# XLA would start two collectives at once, which over eight devices that share two cores can take every thread of its
# pool and wait for each other until XLA ends the process.
test: lint
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --alone=without $(PYTEST_ARGS)
	XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false $(BIN)/python -m pytest --alone=only $(PYTEST_ARGS)

test-all:
	@found=; for python in $(PYTHONS); do \
	  $$python -c '' 2>/dev/null || continue; found=yes; \
	  JAXABLATE_TESTS_COMPILE=fully JAXABLATE_CASES=300 $(MAKE) test PYTHON=$$python VENV=.venv-$${python#python} || exit 1; \
	done; test -n "$$found" || { echo "none of $(PYTHONS) is here" >&2; exit 1; }

faults: $(VENV)/.dev
	$(BIN)/python -m tests.faults.long --out=build/faults.json $(FAULTS_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.dev

# A stamp newer than its inputs skips the install. The demo leaves byte-compiling to the first import:
# it imports a third of what pip would compile.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) --no-compile --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $(VENV)/.runtime $@

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here; give one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jaxablate needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())'); give another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -not -path './.git/*' -exec rm -rf {} +
