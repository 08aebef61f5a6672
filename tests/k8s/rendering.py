"""Render a folder of k8s/ with `kubectl kustomize`, and find objects in the result."""

from __future__ import annotations

import copy
import functools
import subprocess
from pathlib import Path
from typing import Any

import yaml
from real_parts import ROOT, real_part

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent for path in K8S.glob("overlays/*/kustomization.yaml"))


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the objects that `kubectl apply -k` would send."""
    return copy.deepcopy(_render(folder))


@functools.cache
def _render(folder: Path) -> list[dict[str, Any]]:
    kubectl = real_part("kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def deployment(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the only Deployment."""
    (found,) = (item for item in objects if item["kind"] == "Deployment")
    return found


def pod_spec(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return deployment(objects)["spec"]["template"]["spec"]


def container(pod: dict[str, Any], name: str, kind: str = "containers") -> dict[str, Any]:
    (found,) = (item for item in pod[kind] if item["name"] == name)
    return found


def settings(objects: list[dict[str, Any]]) -> dict[str, str]:
    """Return the data of the sidecar's ConfigMap: the environment variables of its container."""
    (found,) = (o for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["name"].startswith("vlm-sidecar"))
    return found["data"]
