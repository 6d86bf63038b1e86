# Everything is set up in its own virtual environment (VENV); PYTHON names the interpreter that makes it.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= 2.13.0
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
NEIGHBOURS := peft,quant,export,espnet
# These ask for old versions of other packages, or for a torchaudio that needs CUDA.
PINNING := espnet speechbrain hyperpyyaml "ruamel.yaml<0.19" ruamel.yaml.clib faster-whisper
ARGS   ?=

.PHONY: help setup data demo asr speaker test test-all lint bench gpu clean

help:
	@echo "make setup     virtual environment, CPU build of torch $(TORCH), this package with its C++ op"
	@echo "make data      obtain all models and speech beforehand (the other targets obtain what they need)"
	@echo "make demo      fine-tune the real Whisper tiny.en on child-like speech   (options: ARGS='--help')"
	@echo "make asr       SSVD and its relatives under domain shift, methods x budgets x seeds      (options: ARGS='--help')"
	@echo "make speaker   speaker verification with SpectralFT, SSVD and LoRA                     (options: ARGS='--help')"
	@echo "make test      the test suite; test-all adds the slow sweeps"
	@echo "make lint      ruff and mypy"
	@echo "make bench     microbenchmarks                                           (options: ARGS='--help')"
	@echo "make gpu       on a CUDA machine with its own torch, triton, nvcc, pytest: PART=check, sanitize, bench, model or asr"

setup: $(READY)

# The local version +cpu names the CPU build where an index has one; elsewhere the default build of the same version.
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -U pip
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install "torch==$(TORCH)+cpu" || $(PY) -m pip install "torch==$(TORCH)"
	$(PY) -m pip install -q "setuptools>=77" wheel packaging ninja pybind11
	SSVD_BUILD=$${SSVD_BUILD:-cpu} $(PY) -m pip install -q --no-build-isolation -e ".[triton,demo,test,bench,lint,$(NEIGHBOURS)]"
	$(PY) -m pip install -q --no-deps $(PINNING)
	$(PY) -m ssvd_kernels info
	touch $@

data: $(READY)
	$(PY) -m bench.asr.fetch --all $(ARGS)

demo: $(READY)
	$(PY) -m bench.asr.demo $(ARGS)

# Goes on where it was stopped; --help tells of the grids and of tuning.
asr: $(READY)
	$(PY) -m bench.asr.experiment $(ARGS)

speaker: $(READY)
	$(PY) -m bench.speaker.run $(ARGS)

test: $(READY)
	$(PY) -m pytest -m "not slow and not gpu" --durations=10 $(ARGS)

test-all: $(READY)
	$(PY) -m pytest -m "not gpu" --durations=20 $(ARGS)

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
