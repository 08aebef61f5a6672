# The first target is the help: `make` alone lists what there is.
PYTHON ?= python3
UV := .uv/bin/uv
RUN := .venv/bin/
export UV_PYTHON_DOWNLOADS := never

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Set-up: uv comes by pip into an environment of its own, then everything else from the lock file.
$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vlm-sidecar needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check uv

.venv/.ready: pyproject.toml uv.lock | $(UV)
	$(UV) sync --quiet --locked --python $(PYTHON) --extra dev
	@touch $@

.PHONY: setup demo test run lint bench clean
setup: .venv/.ready ## set up .venv from the lock file

demo: .venv/.ready ## show the main job end to end: no key, no GPU, no network service
	@$(RUN)vlm-sidecar demo

test: .venv/.ready ## set up and pass every test
	$(RUN)pytest

run: .venv/.ready ## start the sidecar for real (settings from the environment)
	@$(RUN)vlm-sidecar serve

lint: .venv/.ready ## ruff, strict types, and the arrows of the architecture
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)lint-imports --no-cache

bench: .venv/.ready ## what the sidecar costs beside a bare aiohttp pass-through, as ratios
	$(RUN)python bench/overhead.py

clean: ## remove what the targets above made
	rm -rf .uv .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
