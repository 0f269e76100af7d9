# make train   fresh machine: environment, torch, build, install, then the main training job
# make train-small-ram   the main job under a hard limit of a quarter of its model's state, beside the job in memory (9 min)
# make test    the same set-up with what the tests need, then the whole suite, against the installed package
# make gpu     on a machine with an NVIDIA GPU: build, test, tune, bench and train with the Python that is there, nothing
#              downloaded if it has torch; DRY=1 rehearses it without a GPU; make gpu-test and so on for one phase
# make gpu-prepare, gpu-lease, gpu-again   for a GPU that is there for minutes: DEVELOPERS.md says in which order
# make aot     compile every Triton kernel for every architecture, check it, write build/aot.md (ARGS="--dtypes fp16")
# make fuzz    random models, losses and trainers against plain PyTorch (FUZZ_SECONDS=60, FUZZ_SEED=0, FUZZ_ARGS="--processes 2")
# make fresh   the readme's install in a fresh environment: minutes, and the big download
# make bench-ranks   several processes beside torch's own ways, on loopback and shaped links; killed runs (an hour)
# make lint    ruff, mypy on the installed package, clang-format; make bench (ARGS="-k goals": the closing table alone), make wheel, make clean
#
# TEST_WORKERS=  run the suite in one process
# PYTHON=...     the interpreter to build the environment from (3.10 or later; by default the first one found)
# ARGS="..."     more arguments for `spu train` or pytest
# SPU_BUILD=0    install without compiling anything

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
GPU_PHASES := gpu-build gpu-test gpu-tune gpu-bench gpu-train gpu-stream
.PHONY: fresh train train-small-ram test lint bench fuzz wheel setup clean aot gpu $(GPU_PHASES)

# Processes that share the test files. A module's fixtures, some of which compile, are made once: a file stays whole.
# They take them in the order of tests/conftest.py, the long ones first.
TEST_WORKERS ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11 python3.10; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
# Where there is a compiler a failing build must not pass unseen; where there is none the package runs without.
SPU_BUILD ?= $(if $(shell command -v $(CXX) g++ clang++ c++),1,0)
export SPU_BUILD
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The packages are installed without bytecode: unwritten, each of the tests' processes would compile what it imports, 10 s of it.
unexport PYTHONDONTWRITEBYTECODE

# torch is there first and pinned, so the package builds against it without an isolated second copy.
# --no-compile: bytecode is written by the first import, for the modules that are imported, not for all of them.
PIP := $(BIN)/python -m pip install --quiet --no-compile
INSTALL := $(PIP) --no-build-isolation
SOURCES := setup.py pyproject.toml MANIFEST.in $(wildcard README.md) $(shell find build_backend csrc kernels python -type f \
    \( -name '*.py' -o -name '*.pyi' -o -name 'py.typed' -o -name '*.json' -o -name '*.cpp' -o -name '*.h' \
    -o -name '*.cu' \) 2>/dev/null)

train: $(VENV)/.train
	$(BIN)/spu train $(ARGS)

train-small-ram: $(VENV)/.train
	$(BIN)/python benchmarks/small_ram.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/pytest $(TEST_WORKERS) $(ARGS)

# Also what make aot-cuda, make gpu-test or other cases of the suite repeat (tests/thorough.py).
.PHONY: test-all
test-all:
	SPU_TEST_ALL=1 $(MAKE) test

bench: $(VENV)/.bench
	$(BIN)/pytest benchmarks $(ARGS)

# Processes beside one another on this machine, at work for some minutes each; shaped links need root. A missed target is printed.
.PHONY: bench-ranks
bench-ranks: $(VENV)/.bench
	-$(BIN)/python benchmarks/distributed/pipeline.py $(ARGS)
	-$(BIN)/python benchmarks/distributed/pipeline.py --job thin --schedule 1f1b --transfer int8
	-$(BIN)/python benchmarks/distributed/pipeline.py --job wire --schedule 1f1b --transfer int8
	-$(BIN)/python benchmarks/distributed/pipeline.py --job bulk --schedule 1f1b --transfer int8
	-$(BIN)/python benchmarks/distributed/data_parallel.py
	-$(BIN)/python benchmarks/distributed/same_losses.py
	-$(BIN)/python benchmarks/distributed/kills.py

FUZZ_SECONDS ?= 60
FUZZ_SEED ?= 0
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz.py --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) $(FUZZ_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p spu
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs -r $(BIN)/clang-format --dry-run --Werror

# One phase after another, each with its own time limit; a failed one does not keep the next from leaving its results.
gpu:
	@failed=""; for phase in $(GPU_PHASES); do $(MAKE) --no-print-directory $$phase || failed="$$failed $$phase"; done; \
	    test -z "$$failed" || { echo "failed:$$failed (logs in build/gpu-logs)"; exit 1; }

# With the Python that is there; one that has no torch (as in a fresh clone) gets the environment of `make test`.
HAS_TORCH := -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("triton")))'
$(GPU_PHASES):
	@if $(PYTHON) $(HAS_TORCH); then python=$(PYTHON); else $(MAKE) --no-print-directory $(VENV)/.test; python=$(BIN)/python; fi; \
	    $$python benchmarks/gpu/phases.py $(@:gpu-%=%) $(if $(DRY),--dry)

# A GPU for minutes: what can be made at home is made there, one command asks everything, another what is left.
# LEASE_PYTHON: an interpreter with the other machine's torch and Triton, in place of one that is made (gigabytes).
.PHONY: gpu-prepare gpu-lease gpu-again
gpu-prepare:
	@mkdir -p build/gpu-prepare
	$(PYTHON) benchmarks/gpu/prepare.py $(ARGS) $(if $(DRY),--dry)

gpu-lease gpu-again:
	@if $(PYTHON) $(HAS_TORCH); then python=$(PYTHON); else $(MAKE) --no-print-directory $(VENV)/.test; python=$(BIN)/python; fi; \
	    $$python benchmarks/gpu/lease.py $(if $(filter gpu-again,$@),--again) $(ARGS) $(if $(DRY),--dry)

# Half an hour on two cores; what was compiled is remembered, so that a second run takes a minute.
aot: $(VENV)/.test
	@mkdir -p build
	$(BIN)/python benchmarks/aot/aot_triton.py --jobs $$(nproc) $(ARGS) --cache build/aot-cache --markdown build/aot.md > build/aot.jsonl

# The readme's own commands in a fresh environment: they must give the kernels.
fresh:
	rm -rf build/fresh && $(PYTHON) -m venv build/fresh
	. build/fresh/bin/activate && unset SPU_BUILD && sed -n '/^## Install/,/^## What/{/^pip install/p}' README.md | bash -eux
	cd build && fresh/bin/python -c 'import torch, spu._C, spu._host' && fresh/bin/spu doctor

wheel: $(VENV)/.torch
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

setup: $(VENV)/.train

clean:
	rm -rf $(VENV) build dist python/*.egg-info python/spu/*.so

$(VENV)/.torch: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or later found: install one or say PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and build tools into $(VENV) (once; the big download)"
	$(PIP) torch==2.13.0 'setuptools>=77' wheel 'pybind11>=3.0,<4' 'ninja>=1.11'
	@touch $@

$(VENV)/.train: $(VENV)/.torch $(SOURCES)
	$(INSTALL) '.[train]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(INSTALL) '.[test]'
	@touch $(VENV)/.train $@

$(VENV)/.bench: $(VENV)/.torch $(SOURCES)
	$(INSTALL) '.[bench]'
	@touch $(VENV)/.train $@

$(VENV)/.lint: $(VENV)/.torch $(SOURCES)
	$(INSTALL) '.[train,lint]'
	@touch $(VENV)/.train $@

# What .ci/run needs, in one: the kernels are compiled while pip fetches the rest, and then only found.
$(VENV)/.ci: $(VENV)/.torch $(SOURCES)
	@mkdir -p build
	if test "$$SPU_BUILD" = 1; then $(BIN)/python setup.py -q build_ext --build-lib build/early >build/early.log 2>&1; fi & early=$$!; \
	    SPU_BUILD=0 $(INSTALL) '.[test,lint]' || { kill $$early; exit 1; }; wait $$early || true; $(INSTALL) --no-deps .
	@touch $(VENV)/.train $(VENV)/.lint $(VENV)/.test $@

# Every CUDA C++ kernel for every architecture, without a GPU: a table of registers, spills and tensor-core
# instructions (build/aot-cuda.md), and an error where a limit is broken. Half an hour on two cores; SPU_CUDA_ARCHS="80 90a" narrows it.
.PHONY: aot-cuda
aot-cuda: $(VENV)/.test $(VENV)/.cutlass
	@mkdir -p build
	$(BIN)/python benchmarks/aot/aot_cuda.py --markdown build/aot-cuda.md

# Headers only; what else the package requires is for its code generator.
$(VENV)/.cutlass: $(VENV)/.torch
	$(PIP) --no-deps nvidia-cutlass==4.2.0.0
	@touch $@

# With nvcc here, the tests compile one of the matrix products.
ifneq ($(shell command -v nvcc),)
$(VENV)/.test $(VENV)/.ci: $(VENV)/.cutlass
endif
