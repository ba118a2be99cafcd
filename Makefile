# `make demo` and `make test` are all a fresh machine needs: Python and these two words.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROMPT ?= a rocket above a crab on a blue to pink background, moving up
# on a GPU a size at which attention matters there, both sides compiled and as CUDA graphs
LARGE  = --speed balanced --size 512x512 --frames 65 --compile --graphs
GPU    = import torch; print('$(LARGE)' if torch.cuda.is_available() else '--speed balanced')

.PHONY: demo app test test-slow test-browser coverage lint docs bench clean

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[app,dev]"
	touch $@

demo: $(BIN)/.installed
	$(BIN)/dit-accel compare "$(PROMPT)" $$($(BIN)/python -c "$(GPU)") -o out/demo

app: $(BIN)/.installed
	$(BIN)/python app.py

test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(BIN)/.installed
	$(BIN)/pip install -q -c constraints.txt -e ".[ray]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-browser: $(BIN)/.installed
	$(BIN)/pip install -q "selenium>=4"
	npm install --silent --no-save --prefix . axe-core || echo "no axe-core: its test is skipped"
	$(BIN)/python -m pytest -m browser tests/page

coverage: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered --cov-report=html:out/coverage

lint: $(BIN)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(BIN)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(BIN)/.installed
	$(BIN)/dit-accel bench

clean:
	rm -rf $(VENV) build dist out *.egg-info
