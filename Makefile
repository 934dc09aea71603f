# `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
# Two worker processes with one thread each. All tests of a file run in one worker, which makes the file's fixtures once.
PYTEST := -m pytest -n 2 --dist loadfile
OWN := --ignore tests/neighbours
# TRF057 asks for @auto_docstring of transformers, which prints errors outside the source tree of transformers.
MLINTER_EXCEPT := TRF057

.PHONY: help quickstart test test-oldest test-neighbours check format clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv/installed: pyproject.toml constraints.txt
.venv/installed: EXTRA := dev
.venv-oldest/installed: pyproject.toml constraints-oldest.txt
.venv-oldest/installed: EXTRA := test
.venv-neighbours/installed: pyproject.toml constraints.txt
.venv-neighbours/installed: EXTRA := neighbours
.venv/installed .venv-oldest/installed .venv-neighbours/installed:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "supershaper-hf needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(filter constraints%,$^) --editable '.[$(EXTRA)]'
	touch $@

quickstart: .venv/installed ## Install into .venv, go the whole way once on text, then cut a sentence encoder (outputs/quickstart)
	rm -rf outputs/quickstart
	$(BIN)/python examples/quickstart.py --output_dir outputs/quickstart
	$(BIN)/python examples/embed_sentences.py --output_dir outputs/quickstart/encoder

test test-oldest test-neighbours: export OMP_NUM_THREADS = 1

test: .venv/installed ## Install into .venv, then run the tests on two cores
	$(BIN)/python $(PYTEST) $(OWN)

test-oldest: .venv-oldest/installed ## Run the tests with the oldest versions that pyproject.toml admits (.venv-oldest)
	.venv-oldest/bin/python $(PYTEST) $(OWN)

# fastembed asks for an older huggingface-hub than transformers, but works with the newer one.
.venv-neighbours/fastembed: .venv-neighbours/installed
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps fastembed==0.9.1 loguru==0.7.3 mmh3==5.3.1 py-rust-stemmers==0.1.8
	touch $@

# Its scripts after the installation would download what graphics cards need.
JAVASCRIPT := tests/neighbours/javascript
$(JAVASCRIPT)/node_modules: $(JAVASCRIPT)/package-lock.json
	if command -v npm > /dev/null; then npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund && touch $@; fi

test-neighbours: .venv-neighbours/installed .venv-neighbours/fastembed $(JAVASCRIPT)/node_modules
test-neighbours: ## Run the tests with the libraries of docs/clients.md (.venv-neighbours)
	.venv-neighbours/bin/python $(PYTEST) tests/neighbours

check: .venv/installed ## Check format, lint, types, spelling, and the modeling conventions of transformers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/typos
	@rm -f .venv/mlinter.json
	@$(BIN)/mlinter --no-cache --output-json .venv/mlinter.json src/supershaper_hf/model > .venv/mlinter.log 2>&1 || true
	@$(BIN)/python -c 'import json; found = [f for f in json.load(open(".venv/mlinter.json"))["findings"] if f["rule"] != "$(MLINTER_EXCEPT)"]; print("mlinter:", found or "clean"); raise SystemExit(bool(found))'

format: .venv/installed ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove what the other targets created
	rm -rf .venv .venv-oldest .venv-neighbours $(JAVASCRIPT)/node_modules outputs
