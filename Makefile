# Everything runs from a fresh clone: the first target that needs it makes .venv.
PYTHON ?= python3
VENV ?= .venv
# Where torch comes from. Empty: the default index, whose Linux build brings CUDA (about 3 GB). For a CPU build (about
# 200 MB): make run TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ARGS ?=
BIN := $(VENV)/bin
APT := DEBIAN_FRONTEND=noninteractive apt-get -y -o Acquire::http::Timeout=30
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run test test-all check docs vllm clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

run: $(VENV)/.run  ## Compare LARK's choice with a random one on the embedded task (ARGS="baseline=rsr seed=1" for others)
	$(BIN)/python -m lark.run $(ARGS)

test: $(VENV)/.dev  ## Run the tests of what a change can break (8 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(VENV)/.dev $(VENV)/.browser  ## Run the others: real processes, ranks, interruptions, a browser, wheels
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

check: $(VENV)/.dev  ## Lint, format, layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

vllm: .vllm/.done  ## Install vLLM into .vllm, an environment of its own, for evaluation.engine=vllm

.vllm/.done:
	$(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip --disable-pip-version-check install --quiet 'vllm>=0.33'
	@touch $@

docs: $(VENV)/.dev  ## Build the documentation into site/, which is read from the disk; a broken link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## Remove the virtual environment, caches and build output (logs/ stays)
	rm -rf $(VENV) .vllm build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, $(PYTHON) is older; set PYTHON=python3.11, say"; exit 1; }
	@echo "Setting up $(VENV): torch first (200 MB for the CPU build, 3 GB with CUDA; see TORCH_INDEX), then about 500 MB"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) -e .
	@touch $@

# Chromium, in which the pages are tested, is in no Python index: on Debian, root gets it from apt. Elsewhere it is for
# the user to install, and without one those tests are skipped by name.
$(VENV)/.browser: $(VENV)/.run
	@if PYTHONPATH=tests/helpers $(BIN)/python -c 'import sys, browser; sys.exit(browser.chromium() is None)'; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && grep -qs '^ID=debian' /etc/os-release; then \
		echo "Installing Chromium from Debian, in which the pages are tested"; \
		($(APT) update && $(APT) install --no-install-recommends chromium fonts-dejavu-core) >$(VENV)/browser.log 2>&1 \
			&& touch $@ || echo "It could not be installed, see $(VENV)/browser.log"; \
	fi

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	@touch $@
