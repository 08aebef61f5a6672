"""Run a rendered overlay with podman. Podman has no native sidecars, so the sidecar becomes the first container."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from real_parts import real_part
from rendering import container, deployment, render
from running import samples

BOUND = 60.0


def podman(*arguments: str | Path, **options: Any) -> str:
    environ = os.environ | {"CONTAINERS_CONF": str(Path(__file__).with_name("containers.conf"))}
    done = subprocess.run(
        [real_part("podman"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environ,
        **options,
    )
    assert done.returncode == 0, f"podman {arguments}: {done.stderr}"
    return done.stdout


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until the condition returns a true value, and return it. Fails after `BOUND` seconds."""
    end = time.monotonic() + BOUND
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what} within {BOUND} s"
        time.sleep(0.1)
    return found


def playable(overlay: Path, image: str) -> list[dict[str, Any]]:
    """Return the overlay's objects that podman can run: first the pod, with this image, then its ConfigMaps."""
    objects = render(overlay)
    template = deployment(objects)["spec"]["template"]
    pod = template["spec"]
    sidecar = pod.pop("initContainers")[0]
    del sidecar["restartPolicy"], sidecar["ports"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        del sidecar[probe]  # podman would run curl in the container; the test checks readiness itself
    # As with kubelet, the app starts when the sidecar's startup probe has succeeded.
    started = "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/startupz')"
    cortex = container(pod, "cortex")
    wait_then_start = f'until python -c "{started}" 2>/dev/null; do sleep 0.2; done; exec {" ".join(cortex["command"])}'
    cortex["command"] = ["sh", "-c", wait_then_start]
    pod["containers"] = [sidecar, *pod["containers"]]
    for item in pod["containers"]:
        item["image"] = image
        item["imagePullPolicy"] = "Never"
    maps = [item for item in objects if item["kind"] == "ConfigMap"]
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cortex", **template["metadata"]}, "spec": pod},
        *maps,
    ]


class Pod:
    """A running pod."""

    def inspect(self, name: str) -> dict[str, Any]:
        return json.loads(podman("container", "inspect", f"cortex-{name}"))[0]

    def pid(self, name: str) -> int:
        return self.inspect(name)["State"]["Pid"]

    def get(self, path: str) -> str:
        """Send a GET to the admin port from inside the pod's network; return "" if nobody answers."""
        url = f"http://127.0.0.1:9464{path}"
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid("cortex")), "-n", "curl", "-s", "-m", "2", url],
            capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
        return done.stdout

    def answered(self) -> float:
        """Return the number of cortex's frames that were answered with success."""
        found = samples(self.get("/metrics"))
        return sum(found[name] for name in found if re.match(r'sidecar_requests_total{.*outcome="ok"', name))

    def log(self, name: str) -> str:
        return podman("logs", f"cortex-{name}")

    def stop(self, name: str) -> int:
        """Send SIGTERM to a container and return its exit status."""
        podman("container", "stop", "--time", "40", f"cortex-{name}")
        return self.inspect(name)["State"]["ExitCode"]


@contextlib.contextmanager
def playing(objects: list[dict[str, Any]], folder: Path) -> Iterator[Pod]:
    """Run these objects without a network. Yields the pod when cortex has answers; removes everything at the end."""
    file = folder / "pod.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    podman("kube", "play", "--replace", "--network", "none", file)  # a killed test may have left a pod
    try:
        pod = Pod()
        until(lambda: pod.answered() > 10, "answered frame")
        yield pod
    finally:
        podman("kube", "down", file)
