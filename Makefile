# The commands of this repository; `make` lists them. Everything happens in .venv, which is created when first needed.
#   PYTHON=python3.12 make venv        another interpreter (3.11 or newer)
#   TORCH_INDEX=URL make venv          take torch from this package index, e.g. one of CPU-only wheels
#   make demo ARGS=--keep              options for the command, or for pytest: make fast ARGS="-k shards"

PYTHON ?= python3
WORKERS ?= 2
TORCH := torch==2.13.0
STAMP := .venv/.installed
USUAL := not chaos and not gpu and not backends and not release
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Threads that wait must sleep: spinning ones make everything that shares their cores slow.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

.PHONY: help venv demo test fast check chaos chaos-full gpu backends release reference sbom audit clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## create .venv with everything pinned; instant when nothing changed

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cellplane needs Python 3.11 or newer; found: $$($(PYTHON) --version 2>&1 | head -n 1). Name one: make venv PYTHON=python3.11"; exit 1; }
	@rm -f $(STAMP)
	@echo "making .venv: three steps, five to fifteen minutes by network and disk; pip says nothing meanwhile unless something is wrong"
	@$(PYTHON) -m venv .venv
	@echo "[1/3] $$(date +%T) installing $(TORCH) (the largest part; TORCH_INDEX=URL takes it from another index)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") $(TORCH)
	@echo "[2/3] $$(date +%T) installing the $$(grep -c == requirements.lock) packages of requirements.lock"
	@$(PIP) -r requirements.lock
	@echo "[3/3] $$(date +%T) installing cellplane itself"
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $(STAMP)
	@echo "      $$(date +%T) done; put its commands on the path: source .venv/bin/activate"

demo: venv  ## the whole way once, from real cells to a served answer
	@$(BIN)/cellplane demo $(ARGS)

test: venv  ## every test but those with a target of their own, in two processes (WORKERS=0: in one)
	@$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder -m "$(USUAL)" $(ARGS)

fast: venv  ## tests that need no Ray cluster
	@$(BIN)/python -m pytest -m "$(USUAL) and not cluster" $(ARGS)

check: venv  ## lint, types, and the rules of the house
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/house $(ARGS)

chaos: venv  ## tests that kill processes on purpose
	@$(BIN)/python -m pytest -m "chaos and not full and not gpu" $(ARGS)

chaos-full: venv  ## every combination of who is killed when
	@$(BIN)/python -m pytest -m "chaos and not gpu" $(ARGS)

gpu: venv  ## tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu $(ARGS)

backends: venv .venv/.backends  ## tests with real PostgreSQL, S3 and Redis servers; Debian: apt-get install postgresql redis-server iproute2
	@$(BIN)/python -m pytest -m backends tests/backends $(ARGS)

.venv/.backends: requirements-backends.lock $(STAMP)
	@$(PIP) -r requirements-backends.lock
	@touch .venv/.backends

release: venv  ## sdist, wheel, and an environment with the wheel alone in which every verb runs; needs a package index
	@$(BIN)/python -m pytest -m release $(ARGS)

reference: venv  ## docs/reference/ anew, from the code
	@$(BIN)/python -m cellplane.cli.reference docs/reference

sbom: venv  ## what is installed, as CycloneDX JSON: build/sbom.json
	@$(BIN)/cellplane inventory --out build/sbom.json

audit: venv  ## known vulnerabilities of the locked packages; needs a network, and an environment of its own in build/
	@$(PYTHON) -m venv build/audit
	@build/audit/bin/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.9,<3"
	@build/audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip $(ARGS)

clean:  ## remove builds and caches; .venv and .cellplane stay
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
