# Bare `make` lists the targets. Each of them first makes .venv, once, with the exact versions of constraints.txt.
PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=
JOBS ?= $(shell nproc)

.DEFAULT_GOAL := help
.PHONY: help demo lab test quick notebooks check-notebooks browser figures profiles bench triton lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# One pip call that sees the constraints: a second call, or an open torch range, would fetch another torch and its gigabytes of CUDA.
.venv/.ready: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON) here. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dstack_lab needs Python 3.11 or newer and $(PYTHON) is %d.%d. Name a newer one: make PYTHON=python3.12" % sys.version_info[:2])'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(PY) -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

demo: .venv/.ready ## measure networks on this machine, plan, compare two schedulers, draw
	$(PY) -m dstack_lab demo $(ARGS)

lab: .venv/.ready ## open JupyterLab on the first notebook
	$(PY) -m jupyterlab notebooks/00_tour.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

# A process for each core; JOBS=0 runs all in one, where a debugger works.
test: .venv/.ready ## run every test, the notebooks too (ARGS="-k name" selects)
	$(PY) -m pytest -n $(JOBS) --maxprocesses 8 --no-loadscope-reorder $(ARGS)

quick: .venv/.ready ## run the tests that start no process
	$(PY) -m pytest -m "not slow" $(ARGS)

notebooks: .venv/.ready ## run the notebooks and save their outputs in place (ARGS=path for one)
	$(PY) notebooks/build.py $(ARGS)

check-notebooks: .venv/.ready ## run the notebooks and compare with their saved outputs
	$(PY) -m pytest tests/test_notebooks_guard.py tests/test_notebooks.py $(ARGS)

browser: .venv/.ready ## use every panel in JupyterLab in Chromium; pictures go to build/browser
	$(PY) -m pytest tests/test_browser.py -rs $(ARGS)

figures: .venv/.ready ## draw the pictures of README.md and of figures/README.md
	$(PY) -m dstack_lab figures $(ARGS)

profiles: .venv/.ready ## compute the simulated profiles of data/profiles/ anew
	$(PY) -m dstack_lab.kernel_model $(ARGS)

bench: .venv/.ready ## time the simulator beside the same system in SimPy
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev,bench]"
	$(PY) benchmarks/engine.py $(ARGS)

triton: .venv/.ready ## race a real Triton server (60 MB to fetch) beside D-STACK on this machine
	test -d build/triton/pytriton || $(PY) -m pip install --quiet -c constraints.txt --no-deps --target build/triton nvidia-pytriton
	$(PY) benchmarks/triton_server.py --server build/triton $(ARGS)

lint: .venv/.ready ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean: ## remove .venv, caches and built packages; keep figures and recorded data
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
