"""Run the examples with containers, changed only in their ports: the pod with podman, the compose file with
podman-compose.

`make test-pod` runs this. If Prometheus's image cannot be pulled, a substitute is built from Debian's package.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pod import podman, until
from real_parts import ROOT, real_environment, real_part
from running import free_port

EXAMPLES = ROOT / "examples"
PROMETHEUS = "docker.io/prom/prometheus:v3.5.0"
CHAT = {"messages": [{"role": "user", "content": "Say hello."}]}


@pytest.fixture(scope="module", autouse=True)
def prometheus_image() -> None:
    """Provide the image that the examples name, or a substitute that is started in the same way."""
    for command in (["image", "exists", PROMETHEUS], ["pull", "--quiet", PROMETHEUS]):
        with contextlib.suppress(AssertionError):
            podman(*command)
            return
    run = ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
    container = buildah("from", "--pull-never", "python:3.11-slim")
    buildah("copy", "--quiet", container, real_part("prometheus"), "/bin/prometheus")
    buildah("config", "--entrypoint", '["/bin/prometheus"]', "--cmd", " ".join(run), container)
    buildah("commit", "--quiet", "--rm", container, PROMETHEUS)


def buildah(*arguments: str) -> str:
    return subprocess.run(
        ["buildah", *arguments], capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def with_free_ports(text: str, pattern: str) -> tuple[str, dict[int, int]]:
    """Return the text with free host ports in place of the given ones, and the mapping from old to new port."""
    free = {port: free_port() for port in map(int, re.findall(pattern, text))}
    return re.sub(pattern, lambda found: found[0].replace(found[1], str(free[int(found[1])]), 1), text), free


@contextlib.contextmanager
def running_pod(tmp_path: Path) -> Iterator[dict[int, int]]:
    text, ports = with_free_ports((EXAMPLES / "pod" / "pod.yaml").read_text(), r"hostPort: (\d+)")
    file = tmp_path / "pod.yaml"
    file.write_text(text)
    podman("kube", "play", "--replace", file)  # a killed test may have left a pod
    try:
        yield ports
    finally:
        podman("kube", "down", file)


@contextlib.contextmanager
def running_compose(tmp_path: Path) -> Iterator[dict[int, int]]:
    text, ports = with_free_ports((EXAMPLES / "compose" / "compose.yaml").read_text(), r"127\.0\.0\.1:(\d+):")
    (tmp_path / "compose.yaml").write_text(text)
    (tmp_path / "prometheus.yml").write_text((EXAMPLES / "compose" / "prometheus.yml").read_text())

    def compose(*arguments: str) -> None:
        command: list[str | Path] = [
            real_environment(".venv-compose").with_name("podman-compose"),
            "-p",
            "vlm-sidecar-example",
            *arguments,
        ]
        environ = os.environ | {"CONTAINERS_CONF": str(Path(__file__).with_name("containers.conf"))}
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr

    compose("down", "--timeout", "5")  # a killed test may have left containers
    try:
        compose("up", "--detach", "--no-build")  # `make image` has built it
        yield ports
    finally:
        compose("down", "--timeout", "5")


def ask(url: str, body: Any = None) -> Any:
    """Return JSON or text from a URL, or None while nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(url, data, timeout=20) as response:  # noqa: S310  ours, on loopback
            text = response.read().decode()
    except OSError:
        return None
    return json.loads(text) if text.startswith("{") else text


@pytest.mark.parametrize("start", [running_pod, running_compose])
def test_it_answers_and_prometheus_sees_it(start: Any, tmp_path: Path) -> None:
    with start(tmp_path) as ports:
        data, admin, prometheus = (f"http://127.0.0.1:{ports[port]}" for port in (8100, 9464, 9090))
        until(lambda: ask(f"{admin}/readyz") == "ready\n", "readiness")
        answer = until(lambda: ask(f"{data}/v1/chat/completions", CHAT), "answer")
        assert answer["choices"][0]["message"]["content"]
        query = urllib.parse.urlencode({"query": 'sidecar_requests_total{backend="dashscope",outcome="ok"}'})
        found = until(
            lambda: (ask(f"{prometheus}/api/v1/query?{query}") or {}).get("data", {}).get("result"), "scraped sample"
        )
        assert float(found[0]["value"][1]) >= 1
