# make demo | test | bench | lint | sanitize | gate | clean: each creates what it needs, once.

PYTHON ?= python3
VENV   ?= .venv
BUILD  ?= auto
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= runs/demo

.PHONY: demo test test-slow torture bench lint sanitize gate gpu clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py --out $(OUT)

# Side by side on the cores, one OpenMP thread each: threads that spin against each other cost more than they give.
test: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --durations=5 -n auto --maxprocesses 8 --dist worksteal

# Kills, errors, power cuts, rot, signals and hostile files by the thousand; rewrites bench/results/reliability.md after
# each job, and goes on where it was when it was interrupted. PEERS_PYTHON: an interpreter that has Lightning.
torture: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture/jobs.py --out bench/results/reliability.md

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow -rP

bench: $(STAMP)
	FASTTRAIN_BENCH_OUT=$$($(BIN)/python -m bench.common) $(BIN)/python -m pytest bench -q --benchmark-columns=median,iqr,rounds

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The C++ built with the address and undefined-behaviour sanitizers, aside, and the tests of ops and decoder on it.
# pytest's own script: under `python -m pytest` this folder, with the usual build, would come before PYTHONPATH.
sanitize: $(STAMP)
	FASTTRAIN_SANITIZE=1 FASTTRAIN_BUILD=require $(BIN)/python setup.py -q build --build-base build/sanitize
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	PYTHONPATH=$$(echo build/sanitize/lib.*):. $(BIN)/pytest -q -p no:cacheprovider --capture=sys tests/ops \
	tests/test_native_decoding.py tests/test_sampler.py tests/test_generation.py -k "not triton and not graph_break and not memory"

# What can be known about the GPU kernels without a GPU: bytes counted, machine code read, time modelled.
gate: $(STAMP)
	$(BIN)/python -m bench.triton_gate_table --out bench/results/triton_gate.md

# On a CUDA machine: the GPU tests and every benchmark, into a results file named after the GPU.
gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu
	FASTTRAIN_BENCH_OUT=$$($(BIN)/python -m bench.common) $(BIN)/python -m pytest bench -q

clean:
	rm -rf $(VENV) build dist *.egg-info fasttrain/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

# pip only when the pins, the metadata or the C++ changed.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch numpy setuptools wheel ninja pybind11
	FASTTRAIN_BUILD=$(BUILD) $(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@
