# Everything from nothing: each target sets up .venv first when it must.
PYTHON ?= python3
BIN := .venv/bin
# Outside the clone, so that a fresh clone need not build again what did not change.
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sdrpc-dev
export SDRPC_DEV_CACHE := $(CACHE)
# A suite starts hundreds of processes that import torch: they find it compiled, also where the environment says that no
# bytecode is to be written.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup test steady lint docs ray fuzz faults native interop interop-all operations accepted families parity comfyui demo serve newcomer soak bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	# what is never imported, two thirds of it, need not be compiled
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	# without torchvision, which spandrel asks for and we don't: the registry's does not load beside a CPU's torch
	$(BIN)/pip install --quiet -c constraints.txt --no-deps spandrel einops
	touch $@

# Many tests end, stop and cut off real processes, at moments that a busy machine moves about. One that fails is run
# once more; one that passes then is reported as RERUN, and is to be mended. `make steady` gives no second chance.
AGAIN := --reruns 1 --rerun-show-tracebacks -raR

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --num-workers 2

test: setup
	$(BIN)/pytest @tests/suite.txt $(AGAIN)

# ROUNDS of the suite beside two processes that use all that they get: what failed, and how often. What pytest prints is
# in build/steady.
steady: setup
	$(BIN)/python -m tools.steady $(or $(ROUNDS),10)

docs: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

# The two newest versions of the protocol, whatever else is in the cache.
native: setup
	$(BIN)/python tools/native_ggml.py

interop: native
	$(BIN)/pytest -m 'interop and not older' -n 2 --dist worksteal $(AGAIN) tests/interop

interop-all: setup
	$(BIN)/python tools/native_ggml.py --all
	$(BIN)/pytest -m interop -n 2 --dist worksteal $(AGAIN) tests/interop

operations: native
	$(BIN)/python -m tests.interop.table

accepted: native
	$(BIN)/python -m tests.interop.accepted

families: native
	$(BIN)/python -m tests.interop.families_table

fuzz: setup
	$(BIN)/python -m tests.fuzz --processes 2 --minutes $(or $(MINUTES),5) $(SEED:%=--seed %)

# Every fault at every phase of a picture, with a key and without: ten minutes, most of them waiting.
faults: setup
	$(BIN)/python -m tests.faults

parity: setup
	$(BIN)/pytest -m parity tests/parity

comfyui: setup
	$(BIN)/python tools/comfyui.py
	$(BIN)/pytest -m parity tests/parity/test_comfyui.py

demo: setup
	$(BIN)/python tools/demo.py

serve: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[server]'
	$(BIN)/sd-server

newcomer: setup
	$(BIN)/python -m tools.newcomer

# Ray's wheel is 80 MB, and a cluster takes a minute of computing: neither is part of make test.
ray: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/pytest tests/cluster
	$(BIN)/python -m bench cluster

MINUTES ?= 20
soak: setup
	$(BIN)/python -m tests.soak $(MINUTES)

bench: setup
	$(BIN)/python -m bench

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
