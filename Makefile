# Everything is installed in a separate virtual environment (VENV), created by the interpreter PYTHON.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
LOCK   ?= constraints.txt
EXTRAS := triton,demo,serve,test,bench,lint,peft,quant,export,espnet
JOBS   ?= $(shell nproc)
ARGS   ?=
# One thread a process: with one process a core, more threads only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -rs --durations=10

.PHONY: help setup lock matrix data demo asr speaker test test-speed test-slow test-all lint bench gpu clean

help:
	@echo "make setup      create a virtual environment with the versions in $(LOCK) and build this package with its C++ op"
	@echo "make data       download all models and speech in advance (other targets download what they need)"
	@echo "make demo       fine-tune the real Whisper tiny.en on child-like speech (options: ARGS='--help')"
	@echo "make asr        compare SSVD with related methods under domain shift (options: ARGS='--help')"
	@echo "make speaker    speaker verification with SpectralFT, SSVD and LoRA (options: ARGS='--help')"
	@echo "make test       run the test suite on JOBS=$(JOBS) cores"
	@echo "make test-speed run the timing tests, one at a time"
	@echo "make test-slow  run what takes long: builds, new processes, sweeps"
	@echo "make test-all   run all three"
	@echo "make matrix     run the tests with other versions of torch, transformers and PEFT, and with the lowest supported"
	@echo "make lock       write the newest compatible versions to $(LOCK)"
	@echo "make lint       run ruff and mypy"
	@echo "make bench      run the microbenchmarks (options: ARGS='--help')"
	@echo "make gpu        on a CUDA machine with torch, triton, nvcc and pytest: PART=check, sanitize, bench, model or asr"

setup: $(READY)

# No build isolation: the extension must be compiled against the torch that it will run with.
$(READY): pyproject.toml setup.py $(LOCK) $(wildcard csrc/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c $(LOCK) -U pip
	$(PY) -m pip install -q -c $(LOCK) torch --group build
	SSVD_BUILD=$${SSVD_BUILD:-cpu} $(PY) -m pip install -q -c $(LOCK) --no-build-isolation -e ".[$(EXTRAS)]"
	$(PY) -m pip install -q -c $(LOCK) --no-deps --group no-deps
	$(PY) -m ssvd_kernels info
	touch $@

# One file for every Python from 3.10 on, without local versions, so that any index can serve it. TORCH pins the version
# of the CPU build; uv updates the rest.
TORCH  ?= 2.13.0
lock:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q uv
	echo "torch==$(TORCH)" | $(PY) -m uv pip compile -q --upgrade --universal --python-version 3.10 --no-annotate \
	    --custom-compile-command "make lock" --all-extras --group build --group no-deps -c - -o $(LOCK) pyproject.toml

matrix: $(READY)
	$(PY) -m pip install -q uv
	$(PY) .ci/matrix.py $(ARGS)

data: $(READY)
	$(PY) -m experiments.asr.fetch --all $(ARGS)

demo: $(READY)
	$(PY) -m experiments.asr.demo $(ARGS)

# Resumes where it was stopped; --help describes the grids and the tuning.
asr: $(READY)
	$(PY) -m experiments.asr.experiment $(ARGS)

speaker: $(READY)
	$(PY) -m experiments.speaker.run $(ARGS)

# Downloads real speech and weights if there is a network; without them, the tests that need them are reported as skipped.
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

# Also draws the figures; --list and --help only print.
bench: $(READY)
	$(PY) -m bench.run $(ARGS)

# Uses the machine's own Python and no network. OUT is the folder for logs and CSV files. PART is the step to run: check,
# sanitize, bench, model or asr (see bench/gpu.sh); each takes less than 9 minutes.
OUT ?= bench/results
PART ?= check
gpu:
	PART=$(PART) PYTHON=$(PYTHON) OUT=$(OUT) bash bench/gpu.sh

clean:
	rm -rf build dist *.egg-info ssvd_kernels/*.so ssvd_kernels/_build_info.json
