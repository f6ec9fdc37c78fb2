# Every target sets up what it needs: a virtual environment in .venv with PyTorch, Triton and this package, compiled.
# Variables: PYTHON (the interpreter that makes .venv, and on a machine with a GPU the one that has PyTorch), VENV (its
# folder), RUN (where the demo writes), TORCH (what pip installs as PyTorch: the version that all of this was tried with;
# the package itself takes any from 2.11 on). For the kernels of gpu-cache, what the machine with the GPU has: GPU_ARCH
# (its compute capability without the point), GPU_PYTHON (a Python of the same minor version, with its headers),
# GPU_TORCH, GPU_TRITON, GPU_NUMPY (versions), GPU_VENV (the folder that holds them here).

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
GPU_ARCH ?= 90
GPU_PYTHON ?= python3.12
GPU_TORCH ?= 2.11.0
GPU_TRITON ?= 3.6.0
GPU_NUMPY ?= 2.5.*
GPU_VENV ?= build/gpu-venv
SOURCES = $(shell find csrc -type f) $(wildcard build_support/*.py) setup.py pyproject.toml

.PHONY: help demo test test-full test-ecosystem bench bench-models report gpu-cache gpu-smoke gpu-check lint cuda-check sanitize format install clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

demo: install  ## train a three-stage model on handwritten digits and sample from it (CPU, under six minutes)
	$(BIN)/python examples/digits/demo.py --out $(RUN)

test: install lint cuda-check  ## style, CUDA compilation where there is nvcc, all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-full: install  ## what is too long for make test: published widths (10 GB of memory), compiled networks, all GPUs
	$(BIN)/python -m pytest -m full

test-ecosystem: $(VENV)/.ecosystem  ## with the tools that people train with: accelerate, peft, FSDP2, export and the like
	$(BIN)/python -m pytest -m "not full" -n auto --maxprocesses 2 --dist loadfile tests/ecosystem

bench: install  ## all CPU benchmarks, ours and peers in one run (under 25 minutes); results in benchmarks/results/
	$(BIN)/python -m pytest benchmarks --benchmark-json=benchmarks/results/cpu.local.json

report: install  ## the same, and from it the committed results, the plot and the README's tables; on a quiet machine
	$(BIN)/python benchmarks/report.py --measure

bench-models: $(VENV)/.ecosystem  ## whole models of other people, as they are and with our norms and convolutions (CPU)
	$(BIN)/python benchmarks/whole_models.py

gpu-cache: $(GPU_VENV)/.installed  ## compile the kernels of gpu-smoke and gpu-check, without a GPU, into build/gpu-cache
	$(GPU_VENV)/bin/python benchmarks/gpu_cache.py --arch $(GPU_ARCH)

gpu-smoke:  ## under 200 s: does everything work on this machine's GPU; without one, a rehearsal
	@$(call on_gpu,benchmarks/gpu_smoke.py)

gpu-check:  ## under 400 s: measure on this machine's GPU; without one, a rehearsal
	@$(call on_gpu,benchmarks/gpu_check.py)

# With PYTHON, which installs nothing, where it sees a GPU; else with the environment of gpu-cache.
on_gpu = python=$(PYTHON); \
	$$python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null || python=$(GPU_VENV)/bin/python; \
	command -v $$python >/dev/null || { echo "$@: $(PYTHON) sees no GPU, and a rehearsal needs what make gpu-cache makes"; exit 1; }; \
	$$python $(1)

$(GPU_VENV)/.installed:
	@command -v $(GPU_PYTHON) >/dev/null || { echo "gpu-cache: needs the Python of the machine with the GPU, and gcc: there is no $(GPU_PYTHON); set GPU_PYTHON"; exit 1; }
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install "torch==$(GPU_TORCH)" "triton==$(GPU_TRITON)" "numpy==$(GPU_NUMPY)" setuptools pytest
	touch $@

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

# Without the package itself, which is installed, and beside the PyTorch that is there: another would take gigabytes.
extra = $$($(BIN)/python -c 'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("msd-kernels") if r.endswith("\"$(1)\"")))')

$(VENV)/.ecosystem: $(VENV)/.installed
	$(BIN)/python -m pip install "$(TORCH)" $(call extra,ecosystem)
	touch $@

clean:  ## remove what was built, not the runs
	rm -rf $(VENV) build *.egg-info msd_kernels/*.so msd_kernels/_build_report.json
