# Every target sets up what it needs: a virtual environment in .venv with PyTorch, Triton and this package, compiled.
# Variables: PYTHON (the interpreter that makes .venv), VENV (its folder), RUN (where the demo writes), TORCH (what pip
# installs as PyTorch: the version that all of this was tried with; the package itself takes any from 2.11 on).

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
SOURCES = $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: help demo test bench gpu-check lint cuda-check sanitize format install clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

demo: install  ## train a three-stage model on handwritten digits and sample from it (CPU, under six minutes)
	$(BIN)/msd demo --out $(RUN)

test: install lint cuda-check  ## style, CUDA compilation where there is nvcc, all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

bench: install  ## all CPU benchmarks, ours and peers in one run; results in benchmarks/results/
	$(BIN)/python -m pytest benchmarks --benchmark-json=benchmarks/results/cpu.local.json

gpu-check:  ## build, test and measure on this machine's GPU with the interpreter PYTHON; installs nothing
	$(PYTHON) benchmarks/gpu_check.py

lint: install  ## ruff and clang-format, as CI checks them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: install  ## apply ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format -i

cuda-check: install  ## compile the CUDA sources for sm_80, sm_90a and sm_100, where nvcc is found
	$(BIN)/python scripts/compile_cuda.py

sanitize: install  ## build the CPU kernels with AddressSanitizer and UBSan in build/sanitize and run the ops' tests on them
	$(BIN)/python scripts/sanitize.py

install: $(VENV)/.installed  ## the environment, without doing anything with it

# PyTorch comes first and the build sees it: the extension must match the PyTorch that it runs with.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade "setuptools>=77" wheel
	$(BIN)/python -m pip install "$(TORCH)" "numpy>=1.26,<3" "ninja>=1.11,<2" "pybind11>=2.13,<4"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation --editable ".[test,triton]"
	touch $@

clean:  ## remove what was built, not the runs
	rm -rf $(VENV) build *.egg-info msd_kernels/*.so msd_kernels/_build_report.json
