# Two commands do all: `make demo` and `make test`. Neither needs a GPU, a model hub or an account.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-oldest test-vllm lint clean

demo: $(VENV)/.installed
	$(BIN)/keepsight demo

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 -q

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The other end of the supported range: the oldest torch and transformers that pyproject.toml allows.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 2 -q

# The vLLM plugin, in an environment of its own: vLLM's CPU build pins other versions than ours.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -q tests_vllm

.venv-vllm/.installed: pyproject.toml tests_vllm/requirements.txt tests_vllm/make_env.sh
	PYTHON=$(PYTHON) tests_vllm/make_env.sh .venv-vllm
	touch $@

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet -e ".[dev]" "torch==2.11.*" "transformers==5.17.*"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-vllm keepsight-demo
