# Every verb sets itself up: .venv, pinned versions (constraints.txt), nothing else to install by hand.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo evidence test test-all lint docs bench clean clean-demo

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt constraints-nodeps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; cure: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing into .venv: several GB with torch's CUDA libraries, about two minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[offline,dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-nodeps.txt
	@touch $(READY)

demo: $(READY) ## real footage -> prompts; a world -> training -> judged videos; one HTML page; 8 to 14 minutes, resumable
	@$(BIN)/python -m cli.demo $(ARGS)

evidence: $(READY) ## claims measured in a controlled world, with errors and a page; ARGS=--full for all of them
	@$(BIN)/python -m cli.evidence $(ARGS)

lint: $(READY) ## ruff, pyright, import floors, links of the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q --no-header --durations=0 tests/cli/test_docs.py -p no:xdist

docs: $(READY) ## write docs/config.md, the reference of all config fields, from their docstrings
	@$(BIN)/python -m cli.reference

test: lint ## lint, then every test that is not slow
	@echo "Every test that is not slow; the slow ones too: make test-all"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: lint ## also the slow ones: kill sweeps, learning, long laws
	@echo "Every test, the slow ones too: this takes long"
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

bench: $(READY) ## the benchmarks of tests/bench, one after the other, as tables; some ask for arguments
	@for file in tests/bench/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || echo "not run: $$?"; done

clean-demo: ## delete the demo's output
	rm -rf demo

clean: clean-demo ## delete the demo's output, caches and .venv
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
