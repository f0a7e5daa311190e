# make demo    install and show what graphwright does
# make test    lint, types, tests: what CI runs
# make fuzz    random programs under random pipelines, every rule 50 times, then planted mistakes; FUZZ_FLAGS=, results in out/fuzz
# make docs    the pages of docs/ as HTML in out/docs, without a warning
# make bench   every benchmark; BENCH_FLAGS= for the long ones, JSON in out/bench/
#
# Everything lives in .venv; a second run installs nothing. PYTHON=python3.12 picks the interpreter.

PYTHON ?= python3
BENCH_FLAGS ?= --quick
FUZZ_FLAGS ?= --programs 10000 --seed 1 --jobs 2 --require 50

VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install -c constraints.txt
BENCHES := $(filter-out bench/decoder_peers.py bench/gpu_bars.py bench/gpu_experts.py bench/gpu_kv_cache.py bench/gpu_low_rank.py bench/gpu_rat.py bench/gpu_run.py bench/harness.py bench/low_rank_networks.py bench/picture.py bench/timm_networks.py bench/trained_decoder.py,$(wildcard bench/*.py))

.PHONY: demo test lint fuzz docs bench bench-deps clean

demo: $(VENV)/installed
	$(BIN)/graphwright demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/graphwright
	$(BIN)/mypy

fuzz: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m graphwright.testing.fuzz $(FUZZ_FLAGS) --out out/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m graphwright.testing.mutants --jobs 2 --json out/fuzz/mutants.json

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs out/docs
	@echo "out/docs/index.html"

bench: $(VENV)/installed
	@test -n "$(BENCHES)" || { echo "no benchmark under bench/ yet"; exit 1; }
	mkdir -p out/bench
	set -e; for file in $(BENCHES); do $(BIN)/python $$file $(BENCH_FLAGS) --json out/bench/$$(basename $$file .py).json; done

bench-deps: $(VENV)/installed-bench

clean:
	rm -rf $(VENV) build dist out graphwright.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graphwright needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

# Packages of which models alone are wanted; what else they ask for, a second torch or a torchvision for CUDA among it, is left out.
MODELS.test := rapidocr-onnxruntime silero-vad timm
MODELS.bench := timm

$(VENV)/installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[$*]'
	$(if $(MODELS.$*),$(INSTALL) --no-deps $(MODELS.$*))
	touch $@ $(VENV)/installed
