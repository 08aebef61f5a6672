"""Plays a rendered overlay with podman, which knows no native sidecars: the sidecar becomes the first container."""

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
    """Wait, within a bound, until the condition gives something true."""
    end = time.monotonic() + BOUND
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what} within {BOUND} s"
        time.sleep(0.1)
    return found


def playable(overlay: Path, image: str) -> list[dict[str, Any]]:
    """The overlay's objects that podman plays: the pod, on this image, first, and its ConfigMaps."""
    objects = render(overlay)
    template = deployment(objects)["spec"]["template"]
    pod = template["spec"]
    sidecar = pod.pop("initContainers")[0]
    del sidecar["restartPolicy"], sidecar["ports"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        del sidecar[probe]  # podman would run curl in the container; the test asks itself
    # As kubelet does: the app starts once the sidecar's startup probe has succeeded.
    started = "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/startupz')"
    cortex = container(pod, "cortex")
    waits = f'until python -c "{started}" 2>/dev/null; do sleep 0.2; done; exec {" ".join(cortex["command"])}'
    cortex["command"] = ["sh", "-c", waits]
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
    """The pod that is being played."""

    def inspect(self, name: str) -> dict[str, Any]:
        return json.loads(podman("container", "inspect", f"cortex-{name}"))[0]

    def pid(self, name: str) -> int:
        return self.inspect(name)["State"]["Pid"]

    def get(self, path: str) -> str:
        """Ask the admin port from within the pod's network; empty if nobody answers."""
        asked = f"http://127.0.0.1:9464{path}"
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid("cortex")), "-n", "curl", "-s", "-m", "2", asked],
            capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
        return done.stdout

    def answered(self) -> float:
        """Frames of cortex that a model has described."""
        found = samples(self.get("/metrics"))
        return sum(found[name] for name in found if re.match(r'sidecar_requests_total{.*outcome="ok"', name))

    def log(self, name: str) -> str:
        return podman("logs", f"cortex-{name}")

    def stop(self, name: str) -> int:
        """SIGTERM; returns the exit status."""
        podman("container", "stop", "--time", "40", f"cortex-{name}")
        return self.inspect(name)["State"]["ExitCode"]


@contextlib.contextmanager
def playing(objects: list[dict[str, Any]], folder: Path) -> Iterator[Pod]:
    """Play these objects, without a network, until cortex has answers; nothing of it is left afterwards."""
    played = folder / "pod.yaml"
    played.write_text(yaml.safe_dump_all(objects))
    podman("kube", "play", "--replace", "--network", "none", played)  # one of a test that was killed may be there
    try:
        pod = Pod()
        until(lambda: pod.answered() > 10, "answered frame")
        yield pod
    finally:
        podman("kube", "down", played)
