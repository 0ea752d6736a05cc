# make demo    train, evaluate and sample a small CALM from a clean checkout
# make test    lint, compile the CUDA sources, run all tests
# make gpu-check OUT=folder    on a machine with an NVIDIA GPU: build for it, test, measure
#
# The environment is pinned here, one variable each; a CUDA build of torch is chosen with, say,
#   make demo TORCH=torch==2.11.0
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
NUMPY ?= numpy<2.4
VENV ?= .venv
JOBS ?= 2
OUT ?= build/gpu-check
# What the environment here builds: the CUDA library only where a GPU can run it. (check-cuda compiles
# the CUDA sources everywhere; a plain `pip install .` builds them wherever there is a toolkit.)
BUILD ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo auto || echo cpu)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)
NVCC := $(shell command -v nvcc 2>/dev/null)

.PHONY: demo test lint format check-cuda pytest gpu-check clean help

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

$(VENV)/.base: Makefile
	$(PYTHON) -m venv $(VENV)
	printf '%s\n' '$(TORCH)' '$(TRITON)' '$(NUMPY)' > $(VENV)/constraints.txt
	$(PIP) install --quiet '$(TORCH)' '$(TRITON)' '$(NUMPY)' 'setuptools>=77' ninja
	touch $@

$(VENV)/.demo: $(VENV)/.base $(NATIVE)
	CALM_KERNELS_BUILD=$(BUILD) $(PIP) install --quiet --no-build-isolation -c $(VENV)/constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.base $(NATIVE)
	CALM_KERNELS_BUILD=$(BUILD) $(PIP) install --quiet --no-build-isolation -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/calm-kernels demo --output runs/demo

# pytest comes last, so that its summary ends the output.
test: lint check-cuda pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

ifeq ($(NVCC),)
check-cuda:
	@echo 'check-cuda: no nvcc on PATH, the CUDA sources were not compiled'
else
check-cuda: $(VENV)/.dev
	@mkdir -p build
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCALM_CUDA=ON \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  > build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }
	$(BIN)/cmake --build build/cuda
endif

pytest: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -q

# No environment of its own: the machine's Python with its torch, triton and nvcc.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --output $(OUT)

clean:
	rm -rf build runs *.egg-info .pytest_cache .mypy_cache .ruff_cache calm_kernels/*.so
