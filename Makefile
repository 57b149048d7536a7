# `make demo` and `make test` need Linux, Python >= 3.10 and a C++ compiler; the rest is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without the constraints pip would be free to fetch another build of torch, of several GB.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc')
INSTALLED_FROM := pyproject.toml setup.py constraints.txt $(CPP)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format bench clean

help:
	@echo 'make demo       train ResNet-20 on handwritten digits and prune it on the way'
	@echo 'make test       linters, type checker and the quick tests'
	@echo 'make test-slow  the tests that take longer'
	@echo 'make format     apply what the linters can apply'
	@echo 'make bench      the benchmarks against Torch-Pruning; ARGS="--quick --small" for a glance'
	@echo 'make clean      remove .venv and everything that was built; runs/ stays'

# Beside other work on the cores, OpenMP threads that wait at full speed slow each other tenfold: short spins.
demo test test-slow: export GOMP_SPINCOUNT ?= 1000

demo: $(VENV)/.demo
	@$(BIN)/pat-fast train examples/digits.json

test: lint
	@$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(VENV)/.test
	@$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(VENV)/.test
	@$(BIN)/ruff check --quiet .
	@$(BIN)/clang-format --dry-run -Werror $(CPP)
	@$(BIN)/mypy --no-error-summary

format: $(VENV)/.test
	@$(BIN)/ruff check --fix .
	@$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.test
	@$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info pat_fast/_C*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"expected Python >= 3.10, got {sys.version.split()[0]}; name another: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Editable, so that Python sources need no new installation; C++ sources are compiled anew when they change.
$(VENV)/.demo: $(VENV)/.created $(INSTALLED_FROM)
	@echo 'Installing into $(VENV); the first time this takes a few minutes.'
	@$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.created $(INSTALLED_FROM)
	@echo 'Installing into $(VENV), with what the tests need; the first time this takes a few minutes.'
	@$(INSTALL) --editable '.[demo,test]'
	@touch $(VENV)/.demo $@
