# `make repro`, `make test` and the rest set themselves up: the stamp file is newer than the lock once .venv is ready.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# cuda: PyPI's build of torch, held by hashes like all of requirements.lock. cpu: the CPU build of the same version,
# from PyTorch's own index, which the lock has no hashes of; everything else as locked, less the CUDA libraries.
TORCH ?= cuda

export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

# Stages call `python`; DVC finds ours first.
export PATH := $(abspath $(BIN)):$(PATH)

INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python
AUDITOR := $(BIN)/uv tool run pip-audit

.PHONY: setup repro test kills browser test-cluster gpu-check check audit up head status down clean clean-scratch
setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"modelstock needs Python 3.11 to 3.13, got {v[0]}.{v[1]}: run make with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
ifeq ($(TORCH),cpu)
	awk '/^[^ ]/ {kept = !/^(torch|torchvision|triton|nvidia-[^=]+|cuda-[^=]+)==/} kept' requirements.lock > $(VENV)/without-torch.lock
	$(INSTALL) --no-deps --require-hashes -r $(VENV)/without-torch.lock
	$(INSTALL) --torch-backend cpu $$(grep -oE '^(torch|torchvision)==[^ ]+' requirements.lock)
else
	$(INSTALL) --require-hashes -r requirements.lock
endif
	$(INSTALL) --no-deps --editable .
	@touch $@

repro: setup
	@# A source archive is no git checkout, and DVC must be told so.
	@test -e .git || $(BIN)/dvc config --local core.no_scm true
	@$(BIN)/python -m flows.dvc_repro
	@echo "Comparison: reports/comparison.html   Metrics: dvc metrics show   MLflow and Prefect: make up"

up: setup
	@$(BIN)/python -m flows.services up

# The services of the head of several machines: docs/cluster.md has the settings.
head: setup
	@$(BIN)/python -m flows.services up --profile head

# Which of these run, and the state of the schedules.
status: setup
	@$(BIN)/python -m flows.services status

down: setup
	@$(BIN)/python -m flows.services down

test: setup
	$(BIN)/python -m pytest

# The whole job killed in each of its stages, and services killed one by one, for some minutes.
kills: setup
	$(BIN)/python -m pytest -m kill tests/test_kills.py tests/test_services.py

# The pages of MLflow and Prefect in Chromium, driven as a person does: Debian's packages chromium and chromium-driver.
browser: setup
	$(BIN)/python -m pytest -n 0 -rs -m browser tests/test_browser.py

# One experiment on several machines, which are clones on this one: PostgreSQL, OpenSSH's server and Slurm from Debian.
test-cluster: setup
	$(BIN)/python -m pytest -n 3 -rs -m cluster tests/cluster tests/test_head.py

# The tests marked gpu, and images per second, on a machine with a GPU; without one it says so and fails.
gpu-check: setup
	$(BIN)/python benchmarks/gpu.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known holes of the versions in requirements.lock, but for those that .ci/audit-exceptions explains. Asks a database on
# the network, so it is not part of what continuous integration runs.
audit: setup
	$(AUDITOR) --requirement requirements.lock --disable-pip $(shell sed -n 's/^\([A-Z][^ ]*\).*/--ignore-vuln \1/p' .ci/audit-exceptions)

# Caches of scores and heads, and what unfinished runs would go on from.
clean-scratch:
	rm -rf scratch

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
