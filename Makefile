# Two commands: `make demo` and `make test`. Everything they need goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
OUT ?= out/gpu
DEMO_FLAGS := $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.PHONY: demo test lint format bench gpu peft-suite wheel clean help

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/ -/'

demo: $(VENV)/train.stamp ## fine-tune SmolLM2-135M with PEFT and with fastft, side by side
	$(BIN)/fastft demo $(DEMO_FLAGS)

test: $(VENV)/test.stamp ## all tests (no GPU needed)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/test.stamp ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/test.stamp ## rewrite to the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/test.stamp ## every benchmark that runs here
	$(BIN)/python -m bench all

gpu: ## on a CUDA machine with torch, no network: build, test, measure, write OUT
	$(PYTHON) -m bench.gpu "$(OUT)"

peft-suite: $(VENV)/test.stamp ## PEFT's own tests with fused layers
	$(PIP) install -q -c constraints.txt -e '.[peft-suite]'
	$(BIN)/python -m tests.peft_suite

wheel: $(VENV)/test.stamp ## a wheel for this machine's compiler and CUDA, in dist/
	$(BIN)/python -m build --wheel

clean: ## builds and outputs, not .venv
	rm -rf build dist out fastft/*.so *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: an open range would fetch another build of it.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/bin/python
	$(PIP) install -q --upgrade pip
	$(PIP) install -q "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@touch $@

$(VENV)/train.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) install -q -c constraints.txt -e '.[train]'
	@touch $@

# What tests need includes what training needs: one build serves both.
$(VENV)/test.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) install -q -c constraints.txt -e '.[train,test,lint]'
	@touch $(VENV)/train.stamp $@
