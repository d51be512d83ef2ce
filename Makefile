# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Options for pip, for example an index with CPU or CUDA wheels of torch (README, "Choosing a torch wheel").
PIP_FLAGS ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)
# Only as source: built against the torch of .venv, its operators when they are first used.
DEEPSPEED := DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
# One thread per process: two processes on two cores would otherwise fight for them.
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED = 1

.PHONY: demo test test-all test-slice test-system test-gpu check bench deepspeed clean help

help:
	@echo "make demo      data, training in 2 processes, evaluation, ONNX bundle, report (7 to 14 minutes on 2 cores)"
	@echo "make test      the tests (minutes)"
	@echo "make test-all  the tests and the slow full matrices"
	@echo "make test-system  Slurm and pods for real (root on Debian; installs what it needs by apt)"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make check     format, lint, types"
	@echo "make bench     every benchmark, quick form"
	@echo "make deepspeed add DeepSpeed to .venv"

.venv/demo.stamp: pyproject.toml constraints.txt
	@echo "installing nestling into .venv (once; torch is most of it)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --editable ".[demo]"
	@$(BIN)/nestling config schema > run.schema.json
	@touch $@

.venv/dev.stamp: .venv/demo.stamp
	@echo "installing the tools for tests and checks into .venv (once)"
	@$(PIP) --editable ".[dev]"
	@$(DEEPSPEED)
	@touch $@

data/demo/card.json: | .venv/demo.stamp
	@echo "data: docstring -> function pairs from the Python packages of this machine"
	$(BIN)/nestling data run configs/data/demo.yaml

demo: .venv/demo.stamp data/demo/card.json
	@rm -rf runs/demo
	@echo "training, evaluation, bundle: two processes; a run of its own writes everything into runs/demo"
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml train.py configs/demo.yaml
	@echo "next, on your own pairs (JSONL rows with anchor and positive):"
	@echo "  .venv/bin/accelerate launch --config_file configs/accelerate/cpu.yaml train.py configs/demo.yaml \\"
	@echo "    train.run_dir=runs/mine data.sources.0.path=PAIRS.jsonl evaluate.sources.0.path=HELD_OUT.jsonl"

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not system" --durations=10

test-all: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not system" --durations=20

test-slice: .venv/dev.stamp
	$(BIN)/python -m tests.slice

test-system: .venv/dev.stamp
	$(BIN)/python -m pytest -m system --durations=10 tests/system

test-gpu: .venv/dev.stamp
	$(BIN)/python -m pytest -m gpu

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error
	$(BIN)/hadolint Dockerfile

bench: .venv/dev.stamp
	@for name in $(basename $(notdir $(filter-out %/__init__.py %/common.py,$(wildcard benchmarks/*.py)))); do \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick || exit 1; done

deepspeed: .venv/demo.stamp
	@echo "installing DeepSpeed against the torch of .venv"
	@$(DEEPSPEED)

clean:
	rm -rf .venv data/demo runs/demo cache run.schema.json
