# Everything is set up in its own virtual environment (VENV); PYTHON names the interpreter that makes it.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
LOCK   ?= constraints.txt
EXTRAS := triton,demo,test,bench,lint,peft,quant,export,espnet
JOBS   ?= $(shell nproc)
ARGS   ?=
# One thread a process: with one process a core, more threads only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -rs --durations=10

.PHONY: help setup lock matrix data demo asr speaker test test-speed test-slow test-all lint bench gpu clean

help:
	@echo "make setup      virtual environment with the versions of $(LOCK), this package with its C++ op"
	@echo "make data       obtain all models and speech beforehand (the other targets obtain what they need)"
	@echo "make demo       fine-tune the real Whisper tiny.en on child-like speech   (options: ARGS='--help')"
	@echo "make asr        SSVD and its relatives under domain shift, methods x budgets x seeds      (options: ARGS='--help')"
	@echo "make speaker    speaker verification with SpectralFT, SSVD and LoRA                     (options: ARGS='--help')"
	@echo "make test       the test suite, on JOBS=$(JOBS) cores"
	@echo "make test-speed the tests that measure time, one at a time"
	@echo "make test-slow  the slow sweeps; test-all: all three"
	@echo "make matrix     the tests with other versions of torch, transformers and PEFT, and with the lowest ones"
	@echo "make lock       write the newest versions that fit together to $(LOCK)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      microbenchmarks                                           (options: ARGS='--help')"
	@echo "make gpu        on a CUDA machine with its own torch, triton, nvcc, pytest: PART=check, sanitize, bench, model or asr"

setup: $(READY)

# No build isolation: the extension is compiled against the torch that it will run with.
$(READY): pyproject.toml setup.py $(LOCK) $(wildcard csrc/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c $(LOCK) -U pip
	$(PY) -m pip install -q -c $(LOCK) torch --group build
	SSVD_BUILD=$${SSVD_BUILD:-cpu} $(PY) -m pip install -q -c $(LOCK) --no-build-isolation -e ".[$(EXTRAS)]"
	$(PY) -m pip install -q -c $(LOCK) --no-deps --group no-deps
	$(PY) -m ssvd_kernels info
	touch $@

# One file for every Python from 3.10 on, without local versions, so that any index can serve it. TORCH is the version
# that the CPU build is taken of; uv refreshes the rest.
TORCH  ?= 2.13.0
lock:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q uv
	echo "torch==$(TORCH)" | $(PY) -m uv pip compile -q --upgrade --universal --python-version 3.10 --no-annotate \
	    --custom-compile-command "make lock" --all-extras --group build --group no-deps -c - -o $(LOCK) pyproject.toml

matrix: $(READY)
	$(PY) .ci/matrix.py $(ARGS)

data: $(READY)
	$(PY) -m experiments.asr.fetch --all $(ARGS)

demo: $(READY)
	$(PY) -m experiments.asr.demo $(ARGS)

# Goes on where it was stopped; --help tells of the grids and of tuning.
asr: $(READY)
	$(PY) -m experiments.asr.experiment $(ARGS)

speaker: $(READY)
	$(PY) -m experiments.speaker.run $(ARGS)

# Real speech and weights are fetched where there is a network; without them the tests that need them are skipped by name.
test: $(READY)
	-$(PY) -m experiments.asr.fetch --all
	$(PYTEST) -n $(JOBS) --dist loadgroup -m "not slow and not gpu and not timing" $(ARGS)

test-speed: $(READY)
	$(PYTEST) -m "timing and not gpu" $(ARGS)

test-slow: $(READY)
	$(PYTEST) -n $(JOBS) --dist loadgroup -m "slow and not gpu and not timing" $(ARGS)

test-all: test test-speed test-slow

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Draws the figures of what it measured; --list and --help print and stop.
bench: $(READY)
	$(PY) -m bench.run $(ARGS)

# Uses the machine's own Python and nothing from the network. OUT names the folder of logs and CSV files, PART what to
# do: check, sanitize, bench, model or asr (see bench/gpu.sh), each in under 9 minutes.
OUT ?= bench/results
PART ?= check
gpu:
	PART=$(PART) PYTHON=$(PYTHON) OUT=$(OUT) bash bench/gpu.sh

clean:
	rm -rf build dist *.egg-info ssvd_kernels/*.so ssvd_kernels/_build_info.json
