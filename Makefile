# `make demo` and `make test` need Linux, Python >= 3.10 and a C++ compiler; the rest is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without the constraints pip would be free to fetch another build of torch, of several GB.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
INSTALLED_FROM := pyproject.toml setup.py constraints.txt $(CPP)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu lint format sanitize check-neon bench gpu bench-gpu clean

help:
	@echo 'make demo       train ResNet-20 on handwritten digits and prune it on the way'
	@echo 'make test       linters, type checker and the quick tests'
	@echo 'make test-slow  the tests that take longer'
	@echo 'make sanitize   the C++ kernels and the blocks of the CUDA kernels, fuzzed under two sanitizers'
	@echo 'make check-neon the C++ kernels as an emulated aarch64 runs them; needs $(CROSS) and $(EMULATOR)'
	@echo 'make test-gpu   everything that needs a GPU, with PYTHON and its packages, offline; results in $(OUT)'
	@echo 'make bench-gpu  the GPU backends against the bandwidth of a copy; ARGS as for pat-fast bench'
	@echo 'make format     apply what the linters can apply'
	@echo 'make bench      the benchmarks against Torch-Pruning; ARGS="--quick --small" for a glance'
	@echo 'make clean      remove .venv and everything that was built; runs/ stays'

# Beside other work on the cores, OpenMP threads that wait at full speed slow each other tenfold: short spins.
demo test test-slow sanitize: export GOMP_SPINCOUNT ?= 1000

demo: $(VENV)/.demo
	@$(BIN)/pat-fast train examples/digits.json

# A process a core; threads of their own would only be in one another's way.
test test-slow: export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: lint
	@$(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/.test
	@$(PYTEST) -m "slow and not gpu"

lint: $(VENV)/.test
	@$(BIN)/ruff check --quiet .
	@$(BIN)/clang-format --dry-run -Werror $(CPP)
	@$(BIN)/mypy --no-error-summary

format: $(VENV)/.test
	@$(BIN)/ruff check --fix .
	@$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.test
	@$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

# A copy of the sources, so that the instrumented extension never takes the place of the real one. Python itself
# is not instrumented: the runtime must be loaded first, and what Python leaves allocated at exit is no leak.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZED := build/sanitize
FUZZ ?= 20000
sanitize: $(VENV)/.test
	@mkdir -p $(SANITIZED)
	@cp -r csrc pat_fast tests benchmarks setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	@rm -f $(SANITIZED)/pat_fast/*.so
	@cd $(SANITIZED) && CXX='$(CXX) $(SANITIZE)' CXXFLAGS='-O1 -g1' PAT_FAST_BUILD=cpu $(abspath $(BIN))/python setup.py -q build_ext --inplace
	@cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 CXXFLAGS='$(SANITIZE)' \
		PAT_FAST_BACKEND=cpu PAT_FAST_FUZZ=$(FUZZ) $(abspath $(BIN))/python -m pytest \
		tests/backends/test_fuzz.py tests/backends/test_cpu.py tests/backends/test_cuda.py tests/ops/test_known.py \
		tests/ops/test_grouped.py -k 'not forked'

# Without PyTorch, which would have to be there for the other processor, and without threads.
CROSS ?= aarch64-linux-gnu-g++
EMULATOR ?= qemu-aarch64
ALONE := build/kernels_alone
check-neon:
	@if ! command -v $(CROSS) >/dev/null; then echo 'check-neon: skipped: no $(CROSS) (Debian has it in g++-aarch64-linux-gnu)'; else \
		mkdir -p build && $(CROSS) -static -std=c++17 -O3 -Wall -Wno-unknown-pragmas -fno-math-errno -fno-trapping-math \
			-fopenmp-simd tests/backends/kernels_alone.cpp $(filter-out %avx2.cpp %avx512.cpp,$(wildcard csrc/cpu/*.cpp)) -o $(ALONE) && \
		if command -v $(EMULATOR) >/dev/null; then $(EMULATOR) $(ALONE); \
		else echo 'check-neon: compiled, not run: no $(EMULATOR) (Debian has it in qemu-user)'; fi; fi

# On a machine with a GPU and no network: the Python that has PyTorch, and its packages. WHEELS names a folder with
# those that are missing.
OUT ?= results
gpu:
	@mkdir -p $(OUT)
	@if [ -n '$(WHEELS)' ]; then $(PYTHON) -m pip install -q --disable-pip-version-check --no-index --no-deps $(WHEELS)/*.whl; fi
	@PAT_FAST_BUILD=cuda $(PYTHON) setup.py -q build_ext --inplace

test-gpu: gpu
	@$(PYTHON) -m pytest -m gpu -n 8 --dist worksteal --json=$(OUT)/test-gpu.json

bench-gpu: gpu
	@$(PYTHON) -m pat_fast bench --device cuda --ops all --layouts contiguous,channels_last \
		--json $(OUT)/bench-gpu.json $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info pat_fast/*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
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
