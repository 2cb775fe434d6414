# Two commands do all: `make demo` and `make test`. Neither needs a GPU, a model hub or an account.
# Both install what was tested: the exact versions of locks/dev.txt (tools/install.py).
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
RUN     = tools/compatibility.py run
# Two processes, each with half of the folders, so that what a folder's tests share is made once; who is done helps the other.
TWO     = -n 2 --dist worksteal -q
export HF_HUB_OFFLINE ?= 1
export TORCH_INDEX INSTALLER
# Many containers set this. uv compiles nothing, so each process that a test starts would compile torch and transformers
# anew: 10 CPU seconds more, 12 with vLLM.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-oldest test-newest test-vllm test-lmms test-peers test-gpu bench-gpu gpu-wheels docs release lint lock compatibility docs-figures clean

demo: $(VENV)/.installed
	$(BIN)/keepsight demo

test: $(VENV)/.installed lint
	$(BIN)/python $(RUN) locked $(TWO)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The other end of the supported range: the oldest torch, transformers, PEFT and TRL that pyproject.toml allows. That range
# is the package's promise, so its tests run; those of pages, figures, benchmarks and studies, which are made with the
# locked releases, do not.
test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python $(RUN) oldest $(TWO) --ignore=tests/project --ignore=tests/studies

# No lock and no upper bounds: today's newest of everything. UNLESS="--unless-as locked" does not repeat the same versions.
test-newest:
	$(PYTHON) tools/install.py $(VENV)-newest
	$(VENV)-newest/bin/python $(RUN) newest $(UNLESS) $(TWO)

# The vLLM plugin, in an environment of its own: vLLM pins other versions than ours.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python $(RUN) vllm $(TWO) tests_vllm

# keepsight as a model of lmms-eval, in an environment of its own: lmms-eval needs many things that we do not.
test-lmms: .venv-lmms/.installed
	.venv-lmms/bin/python -m pytest -q tests_lmms

.venv-lmms/.installed: pyproject.toml tests_lmms/requirements.txt
	$(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install --quiet -e ".[lab]" -r tests_lmms/requirements.txt
	touch $@

# transformers', PEFT's and TRL's own tests on models that carry a memory: tests_peers/README.md. A weekly step (canary.yml).
test-peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r tests_peers/requirements.txt
	$(BIN)/python tests_peers/fetch.py
	$(BIN)/python -m pytest -q tests_peers

# The documentation site, every link checked, in site/. SERVE=--serve shows it.
docs: $(VENV)/.installed
	$(BIN)/python tools/site.py $(SERVE)

# The wheel and the source archive in dist/, checked, and the wheel tried in an empty environment. TAG=v1.2.3 must be its version.
release: $(VENV)/.installed
	$(BIN)/python tools/release.py $(if $(TAG),--tag $(TAG))

# On a machine with a GPU, in whatever environment GPU_PYTHON is: torch, transformers and keepsight's requirements.
# Two tiers, bfloat16 first since it is the shorter one; DEVICE=cpu rehearses them.
GPU_PYTHON ?= python3
DEVICE ?= cuda
TEST_GPU = PYTHONPATH=src:$$PYTHONPATH $(GPU_PYTHON) -m pytest --device $(DEVICE) -q -p no:benchmark \
	tests/pvm tests/vismem tests/diagnose tests/common/test_peft_method.py tests/train/test_four_bit.py \
	tests/distributed/test_pvm_distributed.py
test-gpu:
	@$(TEST_GPU) -m bfloat16; half=$$?; $(TEST_GPU) -m "not bfloat16" && exit $$half

bench-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PYTHON) benchmarks/gpu.py

# What a machine with torch, torchvision and transformers lacks (a test compares), in the lock's versions, to be carried there:
# pip install --no-index --no-deps --find-links wheels $(GPU_WHEELS). Run it with the same Python as there, 3.11 or newer.
GPU_WHEELS = accelerate antlr4-python3-runtime bitsandbytes datasets dill iniconfig latex2sympy2-extended math-verify \
	multiprocess pandas peft pluggy psutil pyarrow pytest python-dateutil trl tzdata xxhash
gpu-wheels:
	mkdir -p wheels
	sed -n 's/^\([a-z0-9.-]*==[^ ;]*\).*/\1/p' locks/dev.txt > wheels/versions.txt
	$(PYTHON) -m pip download --only-binary :all: --no-deps -d wheels -c wheels/versions.txt $(GPU_WHEELS)

$(VENV)/.installed: pyproject.toml locks/dev.txt tools/install.py
	$(PYTHON) tools/install.py $(VENV) --lock locks/dev.txt
	touch $@

$(VENV)-oldest/.installed: pyproject.toml locks/oldest.txt tools/install.py
	$(PYTHON) tools/install.py $(VENV)-oldest --lock locks/oldest.txt
	touch $@

.venv-vllm/.installed: pyproject.toml $(wildcard tests_vllm/requirements*.txt) tests_vllm/make_env.py tools/install.py
	$(PYTHON) tests_vllm/make_env.py .venv-vllm
	touch $@

# Renews the locks within pyproject.toml's ranges.
lock:
	$(PYTHON) tools/lock.py $(VENV)-lock

# Writes the results of the runs above into docs/compatibility.md.
compatibility:
	$(PYTHON) tools/compatibility.py write

# Writes the figures of README and docs anew, from the committed raw results.
docs-figures:
	$(PYTHON) tools/figures.py

clean:
	rm -rf site dist $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-lock .venv-vllm .venv-lmms .results keepsight-demo
