# make help lists the targets. Each creates what it needs, .venv, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
# TRF057 asks for transformers' @auto_docstring, which prints errors outside the transformers tree.
MLINTER_EXCEPT := TRF057

.PHONY: help quickstart test check format clean

help: ## Show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "supershaper-hf needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: .venv/installed ## Install, then go the whole way once: text to published-ready subnet (outputs/quickstart)
	rm -rf outputs/quickstart
	$(BIN)/python examples/quickstart.py --output_dir outputs/quickstart

test: .venv/installed ## Install, then run the tests
	$(BIN)/python -m pytest

check: .venv/installed ## Format, lint, types, and the modeling conventions of transformers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(BIN)/mlinter --no-cache --output-json .venv/mlinter.json src/supershaper_hf/model > .venv/mlinter.log 2>&1 || true
	@$(BIN)/python -c 'import json; found = [f for f in json.load(open(".venv/mlinter.json"))["findings"] if f["rule"] != "$(MLINTER_EXCEPT)"]; print("mlinter:", found or "clean"); raise SystemExit(bool(found))'

format: .venv/installed ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove what the other targets created
	rm -rf .venv outputs
