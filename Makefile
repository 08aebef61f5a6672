# The first target is the help: `make` alone lists what there is.
PYTHON ?= python3
UV := .uv/bin/uv
RUN := .venv/bin/
export UV_PYTHON_DOWNLOADS := never
# The local backend's tests run a real model. torch comes by pip and not from the lock file: what uv resolves for Linux is
# gigabytes of CUDA. TORCH_INDEX names the index to take it from, such as PyTorch's own of CPU builds; else pip's.
TORCH := torch==2.13.0
TORCH_INDEX ?=
SBOM ?= dist/sbom.json

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Set-up: uv comes by pip into an environment of its own, then everything else from the lock file.
$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vlm-sidecar needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check uv

.venv/.ready: pyproject.toml uv.lock | $(UV)
	$(UV) sync --quiet --locked --inexact --python $(PYTHON) --extra dev
	@touch $@

.venv/.torch: .venv/.ready Makefile
	@echo "installing $(TORCH) into .venv for the tests of the in-process model: once, and a minute or more"
	$(UV) sync --quiet --locked --inexact --python $(PYTHON) --extra dev --group local
	@.uv/bin/pip --quiet --quiet --disable-pip-version-check --python .venv/bin/python install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) || \
		{ echo "no $(TORCH) for $$(.venv/bin/python -V): try make test TORCH_INDEX=URL or PYTHON=/path/to/python3.11; .venv/bin/pytest goes without, and says what it skips"; exit 1; }
	@touch $@

# The official clients and trio-core have environments of their own: never in the lock file.
.venv-sdk/.ready: Makefile | $(UV)
	@$(UV) venv --quiet --clear --python $(PYTHON) .venv-sdk
	@$(UV) pip install --quiet --python .venv-sdk/bin/python dashscope==2.0.2
	@touch $@

.venv-compose/.ready: Makefile | $(UV)
	@$(UV) venv --quiet --clear --python $(PYTHON) .venv-compose
	@$(UV) pip install --quiet --python .venv-compose/bin/python podman-compose==1.6.0
	@touch $@

.venv-trio/.ready: Makefile | $(UV)
	@$(UV) venv --quiet --clear --python $(PYTHON) .venv-trio
	@$(UV) pip install --quiet --python .venv-trio/bin/python --no-deps trio-core==1.1.5
	@$(UV) pip install --quiet --python .venv-trio/bin/python \
		fastapi numpy onnxruntime openai opencv-python-headless pillow pydantic-settings uvicorn
	@touch $@

.venv-spy/.ready: Makefile | $(UV)
	@$(UV) venv --quiet --clear --python $(PYTHON) .venv-spy
	@$(UV) pip install --quiet --python .venv-spy/bin/python py-spy==0.4.3
	@touch $@

.PHONY: aiohttp-rows audit dashboard image-local test-pod-local soak sbom setup demo demo-local test run lint parity bench bench-check flame scenarios live docs image test-pod clean
setup: .venv/.ready ## set up .venv from the lock file

demo: .venv/.ready ## show the main job end to end: no key, no GPU, no network service
	@$(RUN)vlm-sidecar demo

demo-local: .venv/.torch ## show a model in the sidecar's own process: a tiny one of random weights, made here in seconds
	@$(RUN)python -m backends.local.tiny idefics3 .tiny-model
	@$(RUN)python examples/local.py .tiny-model

test: .venv/.torch .venv-sdk/.ready ## set up and pass every test, those of the in-process model with a real torch among them
	@.ci/parts
	$(RUN)pytest

run: .venv/.ready ## start the sidecar for real (settings from the environment)
	@$(RUN)vlm-sidecar serve

lint: .venv/.ready ## ruff, strict types, the arrows of the architecture, and the Dockerfile
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)lint-imports --no-cache
	$(RUN)python .ci/rooms.py
	$(RUN)hadolint Dockerfile

parity: .venv/.ready .venv-trio/.ready ## ask trio-core 1.1.5 itself, record its answers, print what is different here
	$(RUN)python tests/parity/record.py .venv-trio/bin/python

bench: .venv/.ready ## what the sidecar costs beside other proxies, into docs/performance.md: 5 minutes (PEERS="bare litellm": only these)
	$(RUN)python -m bench.cost $(PEERS)

bench-check: .venv/.ready ## measure again, compare with the ratios that are committed, fail if something got worse
	$(RUN)python -m bench.cost --check $(PEERS)

flame: .venv/.ready .venv-spy/.ready ## flame graphs of small requests, frames and streams, and where the time goes
	@$(RUN)python -m bench.cost.flame

scenarios: .venv/.ready ## how well the limits are learned, in virtual time, beside an oracle
	$(RUN)python bench/scenarios.py

live: .venv/.ready ## seven of the scenarios over real sockets, shortened: a minute and a half
	$(RUN)python bench/live.py

docs: | $(UV) ## build the documentation site into site/, every link checked
	@UV_PROJECT_ENVIRONMENT=.venv-docs $(UV) sync --quiet --locked --only-group docs --python $(PYTHON)
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict && echo "see site/index.html"

IMAGE := vlm-sidecar:0.1.0
image: sbom ## build the container image with buildah, or with docker: see docs/kubernetes.md
	@if command -v buildah >/dev/null; then buildah build --isolation chroot --network host --tag $(IMAGE) $(IMAGE_OPTIONS) .; else docker build --tag $(IMAGE) $(IMAGE_OPTIONS) .; fi

image-local: ## build the image with a model's libraries, torch for CUDA among them: several GB
	@$(MAKE) --no-print-directory image IMAGE=$(IMAGE)-local IMAGE_OPTIONS='--build-arg EXTRAS="--extra local --extra otel" $(IMAGE_OPTIONS)'

test-pod: .venv/.ready .venv-compose/.ready ## build the image and play the rendered pod with podman: needs Debian and root
	.ci/pod-parts
	$(MAKE) image IMAGE_OPTIONS="--quiet --pull=never"
	$(RUN)pytest tests/k8s/pod.py tests/k8s/example_pod.py

test-pod-local: .venv/.ready ## the same with a tiny model in the sidecar, on the build of torch that pip brings
	.ci/pod-parts
	rm -rf .wheels
	.uv/bin/pip download --quiet --no-deps --dest .wheels $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(MAKE) image IMAGE=$(IMAGE)-local IMAGE_OPTIONS='--quiet --pull=never --volume $(CURDIR)/.wheels:/wheels:ro \
		--build-arg EXTRAS="--extra crops --extra otel --group local" --build-arg TORCH="--find-links /wheels $(TORCH)"'
	$(RUN)pytest tests/k8s/pod_local.py

soak: .venv/.ready ## three minutes under everything at once; what grows fails it (SECONDS=3600: an hour)
	@PYTHONPATH=tests $(RUN)python bench/soak.py --seconds $(or $(SECONDS),180)

aiohttp-rows: | $(UV) ## run the tests of HTTP with the lowest, the newest and the newest pre-release of aiohttp
	@.ci/aiohttp-rows

sbom: .venv/.ready ## dist/sbom.json: what is shipped, from the lock file with its hashes, as CycloneDX
	@mkdir -p $(dir $(SBOM))
	@$(UV) export --quiet --locked --no-dev --format cyclonedx1.5 --output-file $(SBOM) >/dev/null

audit: | $(UV) ## compare the lock file with known vulnerabilities, where their list can be reached
	@.ci/audit

dashboard: .venv/.ready ## build the Grafana dashboard, k8s/monitoring/dashboard.json
	$(RUN)python k8s/monitoring/dashboard.py

clean: ## remove what the targets above made
	rm -rf site .uv .venv .venv-docs .tiny-model .venv-sdk .venv-trio .venv-compose .venv-spy .venv-rows .peers .parts .wheels .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
