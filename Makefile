# `make demo` and `make test` make their own environment in .venv; run again, they find it there.
PYTHON ?= python3
VENV ?= .venv
# The torch build: PyPI's is for CUDA on Linux. For the CPU build give its wheel index, as shown on pytorch.org under
# "Get Started" (compute platform CPU):  make demo TORCH_ARGS="--index-url <that address>"
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
# Processes that share the tests; each starts ranks of its own where a test needs some, and many tests wait: for a
# time-out, for a signal, for the last of the ranks.
TEST_PROCESSES ?= 3

BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := $(VENV)/.extras
TRITON := $(VENV)/triton

.PHONY: help install demo ablation test test-triton test-fuzz test-faults test-cluster lint lint-python lint-scripts format clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(READY)  ## make the environment in .venv

$(READY): requirements.txt pyproject.toml
	@echo "==> making the environment in $(VENV) (pinned in requirements.txt; downloads the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(TORCH_ARGS)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(EXTRAS): $(READY) requirements-extras.txt
	@echo "==> adding DeepSpeed and timm (pinned in requirements-extras.txt)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-extras.txt
	@touch $@

$(TRITON)/triton: $(READY)
	@echo "==> adding Triton beside the environment (its kernels are for GPUs, its interpreter runs them anywhere)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON) triton==3.9.0

demo: $(READY)  ## synthetic domains -> shards -> training with and without the method -> table and pictures
	@$(BIN)/python -m ecn_dist.demo --output_dir runs/demo

ablation: $(READY)  ## every row of the demo's table over 3 seeds; writes docs/ablation.md
	@$(BIN)/python -m ecn_dist.demo --ablation --output_dir runs/ablation --table docs/ablation.md

test: $(READY) $(EXTRAS)  ## all tests
	@echo "==> tests"
	@$(BIN)/python -m pytest tests --ignore tests/cluster --numprocesses $(TEST_PROCESSES) --dist worksteal

test-triton: $(TRITON)/triton  ## the memory's GPU kernels in Triton's interpreter
	@PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/unit/memory/test_rows_pass_triton.py

test-fuzz: $(READY)  ## 20,000 damaged and hostile inputs to every reader
	@echo "==> damaged and hostile input"
	@$(BIN)/python -m tests.fuzz --cases 20000

test-faults: $(READY)  ## training through twenty SIGKILLs, twice; takes minutes
	@echo "==> training through kills"
	@ECN_FAULTS=1 $(BIN)/python -m pytest tests/integration/test_faults.py -k twenty --durations 0

test-cluster: $(READY)  ## tests on real hosts, SLURM and containers: as root, with ECN_BENCHES (see docs/cluster.md)
	@echo "==> tests on real hosts"
	@$(BIN)/python -m pytest tests/cluster --durations 0

lint: lint-python lint-scripts  ## ruff, mypy, shellcheck and hadolint

lint-python: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lint-scripts: $(READY)
	@command -v shellcheck >/dev/null || { echo "shellcheck is not installed: apt-get install shellcheck"; exit 1; }
	@shellcheck --external-sources launch/*.sh launch/slurm.sbatch docker/entrypoint.sh .ci/run
	@$(BIN)/hadolint docker/Dockerfile

format: $(READY)  ## let ruff put the code in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove the environment and everything the demo made
	rm -rf $(VENV) runs data shards
