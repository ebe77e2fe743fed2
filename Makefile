# Everything a new user needs: `make run`, `make test`, `make lab`. Nothing is installed outside .venv.

VENV ?= .venv
ifeq ($(strip $(VENV)),)
$(error VENV is empty: activate the conda environment first, or leave VENV away)
endif
BIN := $(VENV)/bin
NOTEBOOK ?= 04_coral
RATIO ?= 0.1
JOBS ?= 2
NB ?= $(wildcard notebooks/*.ipynb notebooks/solutions/*.ipynb)
# pip's source of torch, e.g. https://download.pytorch.org/whl/cpu for a Linux machine without GPU (200 MB instead of 3 GB)
TORCH_INDEX ?=
# the first Python that is new enough
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup run test unit nbval lab lint notebooks book bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.installed ## make .venv with the tested versions (once)

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or name it: make setup PYTHON=/path/to/python3"; exit 1; }
	@echo "Installing into $(VENV), once. This takes a few minutes."
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@# torch first and alone: no other package may pull a second one
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@# a kernel that talks over localhost warns about it on every start
	@mkdir -p $(VENV)/etc/ipython && echo 'c.IPKernelApp.log_level = 40' > $(VENV)/etc/ipython/ipython_kernel_config.py
	@touch $@

run: setup ## train and evaluate on phantom hearts: make run [NOTEBOOK=04_coral] [RATIO=0.1]
	@mkdir -p runs
	$(BIN)/papermill notebooks/$(NOTEBOOK).ipynb runs/$(NOTEBOOK).ipynb -p ratio $(RATIO) \
		--execution-timeout 3600 </dev/null
	@$(BIN)/python -m medlib summary runs/$(NOTEBOOK).ipynb

test: lint unit nbval ## everything: lint, types, unit tests, every notebook against its committed outputs

unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

nbval: setup
	OMP_NUM_THREADS=1 MEDLIB_SCALE=ci $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --nbval --nbval-current-env \
		--nbval-cell-timeout 600 --nbval-sanitize-with tests/notebooks/sanitize.cfg -p no:cacheprovider notebooks/

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

lab: setup ## JupyterLab on notebooks/
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks

notebooks: setup ## run the committed notebooks again, in place, and tidy them: make notebooks [NB=notebooks/04_coral.ipynb]
	$(BIN)/jupyter execute --inplace --timeout=3600 $(NB)
	$(BIN)/nbstripout --keep-output --keep-count \
		--extra-keys "metadata.widgets metadata.papermill cell.metadata.papermill cell.metadata.execution" $(NB)

book: setup ## all notebooks as they were run, as a static site in site/ that asks no other host for anything
	@$(BIN)/python -m medlib book

bench: setup ## time and memory of each loss beside its slow definition
	@for file in tests/benchmarks/bench_*.py; do \
		OMP_NUM_THREADS=2 $(BIN)/python -m tests.benchmarks.$$(basename $$file .py) || exit 1; done

clean: ## remove .venv, site/, caches and phantom data; runs/ stays
	rm -rf $(VENV) site data/phantoms data/cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
