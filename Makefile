# The two commands are `make serve` and `make test`; each does the whole set-up by itself, once (deploy/setup.sh).
#
#   make serve [MODEL=directory-or-hub-id] [HOST=127.0.0.1] [PORT=8000] [ARGS='more options of vllm serve']
#   make test  [ARGS='more options of pytest']

PYTHON ?= python3.11
VLLM ?=
VENV ?= $(CURDIR)/.venv$(if $(VLLM),-vllm-$(VLLM))
HOST = 127.0.0.1
PORT ?= 8000
MODEL ?=
TEST_PROCESSES ?= 2
ARGS =

export PYTHON VENV VLLM HOST PORT

.PHONY: help serve test test-slow bench bench-step bench-growth bench-kernels support-table layout-table lint setup setup-test env clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 4
	@echo
	@echo '  make test-slow   the tests that take long        make lint    ruff'
	@echo '  make setup       the set-up alone                make env     versions and problems, for a bug report'
	@echo '  make bench       beside vLLM'"'"'s CPU backend    make bench-kernels  the kernels beside the machine'
	@echo '  make bench-step  where a step'"'"'s time goes      make bench-growth   with batch, context and layers'
	@echo '  make clean       remove the environment and everything built'

setup:
	@deploy/setup.sh

setup-test:
	@deploy/setup.sh test

serve: setup
	@exec deploy/serve.sh '$(MODEL)' $(ARGS)

test: setup-test
	@$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(ARGS)

test-slow: setup-test
	@$(VENV)/bin/python -m pytest -m 'slow or soak' $(ARGS)

SHAPES ?= qwen3-0.6b dsv3-mini qwen3moe-mini

bench: setup-test
	@for shape in $(SHAPES); do \
	  $(VENV)/bin/python -m tests.bench.compare $$shape $(ARGS) || exit 1; \
	  $(VENV)/bin/python -m tests.bench.serve $$shape || exit 1; done

bench-step: setup-test
	@for shape in $(SHAPES); do $(VENV)/bin/python -m tests.bench.step $$shape $(ARGS) || exit 1; done

bench-growth: setup-test
	@for what in batch context layers; do \
	  $(VENV)/bin/python -m tests.bench.growth qwen3-0.6b $$what --figure docs/figures/$$what.svg || exit 1; done

bench-kernels: setup-test
	@$(VENV)/bin/python -m tests.bench.kernels $(ARGS)
	@$(VENV)/bin/python -m tests.bench.sampling

support-table: setup-test
	@VLLM_MS_SUPPORT_TABLE=README.md $(VENV)/bin/python -m pytest -m '' tests/models/test_parity.py $(ARGS)

layout-table: setup-test
	@VLLM_MS_LAYOUT_TABLE=docs/parallelism.md $(VENV)/bin/python -m pytest -m '' tests/distributed -k 'tokens_equal_the_reference or tokens_of_one_process' $(ARGS)

lint: setup-test
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

env: setup
	@$(VENV)/bin/vllm-mindspore env

clean:
	rm -rf .venv .venv-vllm-* build vllm_mindspore.egg-info vllm_mindspore/ops/lib
