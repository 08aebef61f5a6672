# By default the image contains no model. For the in-process model: --build-arg EXTRAS="--extra local" (torch for CUDA).
# For another build of torch, with uv's options:
#   --build-arg EXTRAS="--extra crops --group local" --build-arg TORCH="--index-url URL torch"
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS build
RUN python3 -m venv /uv && /uv/bin/pip install --no-cache-dir uv==0.13.9
ENV UV_PROJECT_ENVIRONMENT=/opt/vlm-sidecar UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
WORKDIR /src
COPY pyproject.toml uv.lock README.md ./
ARG EXTRAS="--extra crops --extra otel"
# Install the dependencies first: this layer is cached until the lock file changes.
# hadolint ignore=SC2086
RUN /uv/bin/uv sync --no-cache --locked --no-default-groups --no-install-project ${EXTRAS}
ARG TORCH=""
# hadolint ignore=SC2086
RUN test -z "${TORCH}" || /uv/bin/uv pip install --no-cache --python /opt/vlm-sidecar ${TORCH}
COPY backends backends
COPY sidecar sidecar
# hadolint ignore=SC2086
RUN /uv/bin/uv sync --no-cache --locked --inexact --no-default-groups --no-editable ${EXTRAS}

FROM ${PYTHON}
# The running container installs no packages, so pip is removed.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip
COPY --from=build /opt/vlm-sidecar /opt/vlm-sidecar
ENV PATH=/opt/vlm-sidecar/bin:${PATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="vlm-sidecar" \
      org.opencontainers.image.description="A localhost proxy that learns how much a vision-model provider allows, and queues fairly for it" \
      org.opencontainers.image.version="0.1.0"
USER 10001:10001
EXPOSE 9464
# SIGTERM starts a drain: accepted requests are finished.
STOPSIGNAL SIGTERM
ENTRYPOINT ["vlm-sidecar"]
CMD ["serve"]
