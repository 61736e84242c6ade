# Two commands matter: `make book` and `make test`. Both set the environment up first; `make` alone explains the rest.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help book test test-slow lint bench lab setup clean distclean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
# One thread a test process: equal sums on any machine, and two processes do not fight over two cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# A Python that will do: 3.11 to 3.13 with venv and pip. `make PYTHON=/path/to/python` chooses one.
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# pip's own output goes to $(LOG); people see a line for every large download and every 25 packages, and all errors.
SHORT := awk '/^ERROR|^error/ { print; fflush() } \
	/^Collecting / { if (++n % 25 == 0) { print "    " n " packages looked up"; fflush() } } \
	/^ *Downloading .*\([0-9.]+ [MG]B\)/ { size = $$(NF-1); sub(/\(/, "", size); \
		if (size + 0 >= 20 || $$NF ~ /GB/) { print "    fetching " $$2 " " $$(NF-1) " " $$NF; fflush() } } \
	/^Installing collected packages/ { print "    unpacking " NF - 3 " packages"; fflush() }'

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

book: $(STAMP)  ## run the study on built-in data and build the book; a second call only checks
	@$(BIN)/dpkit study --profile quick
	@$(BIN)/dpkit book

test: $(STAMP)  ## the linter, then all quick tests
	@$(BIN)/ruff check
	@$(ONE_THREAD) $(BIN)/python -m pytest -n 2

test-slow: $(STAMP)  ## calibrations of the built-in data and other tests of minutes
	@$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m slow

lint: $(STAMP)  ## the linter alone
	@$(BIN)/ruff check

bench: $(STAMP)  ## speed on this machine: ours against references, and against its ceilings (half an hour)
	@$(BIN)/python -c 'import curvlinops, pyhessian' 2>/dev/null || $(PIP) -q -e '.[study,test,peers]' || \
		echo "PyHessian and curvlinops could not be installed; their rows will say so" >&2
	@$(BIN)/dpkit bench

lab: $(STAMP)  ## JupyterLab in the same environment
	@$(BIN)/jupyter lab notebooks

setup: $(STAMP)  ## the environment in .venv, nothing else
	@echo "ready: $(BIN)/dpkit --help"

clean:  ## remove results, the built book and caches; keep the environment and data
	@rm -rf results _build build dist book/runs .snakemake .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -path ./.git -prune -o -path ./data -prune -o -type d \
		\( -name __pycache__ -o -name .ipynb_checkpoints -o -name '*.egg-info' \) -prune -exec rm -rf {} +

distclean: clean  ## remove the environment as well
	@rm -rf $(VENV)

# The stamp is written last, so an installation that was interrupted is taken up again. An environment that cannot run pip,
# or of another Python, is made anew.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import pip; $(SUITABLE)' >/dev/null 2>&1; then \
		found=""; \
		for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
			if "$$candidate" -c '$(SUITABLE)' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "dpkit needs Python 3.11, 3.12 or 3.13 with venv and pip; none of" \
				"$(or $(PYTHON),python3 python3.13 python3.12 python3.11) is one. Install it, or: make PYTHON=/path/to/python" >&2; \
			exit 1; \
		fi; \
		echo "[1/3] environment in $(VENV), $$("$$found" --version)"; \
		rm -rf $(VENV); \
		"$$found" -m venv $(VENV); \
	else \
		echo "[1/3] environment in $(VENV), $$($(BIN)/python --version)"; \
	fi
	@: > $(LOG)
	@echo "[2/3] torch (large; the download may take minutes)"
	@$(PIP) torch 2>&1 | tee -a $(LOG) | $(SHORT) || { echo "installing torch failed: see $(LOG)" >&2; exit 1; }
	@echo "[3/3] everything else (about a minute)"
	@$(PIP) -e '.[study,test]' 2>&1 | tee -a $(LOG) | $(SHORT) || { echo "installing failed: see $(LOG)" >&2; exit 1; }
	@touch $(STAMP)
