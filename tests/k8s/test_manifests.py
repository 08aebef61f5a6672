"""The promises of the manifests: which pods get a sidecar, when it starts and stops, and its permissions."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_parts import ROOT
from rendering import K8S, OVERLAYS, container, deployment, pod_spec, render, settings

from sidecar import __version__
from sidecar.settings import PREFIX, load
from sidecar.settings.memory import memory_limit

NATIVE = [overlay for overlay in OVERLAYS if overlay.name != "dashscope-before-1.29"]


@pytest.mark.parametrize("overlay", NATIVE, ids=lambda path: path.name)
def test_the_sidecar_is_native_and_probed_on_its_admin_port(overlay: Path) -> None:
    pod = pod_spec(render(overlay))
    sidecar = container(pod, "vlm-sidecar", "initContainers")
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["ports"] == [{"name": "sidecar-admin", "containerPort": 9464}]
    probes = {name: sidecar[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {probe["path"] for probe in probes.values()} == {"/startupz", "/livez", "/readyz"}
    assert {probe["port"] for probe in probes.values()} == {"sidecar-admin"}


@pytest.mark.parametrize("overlay", NATIVE, ids=lambda path: path.name)
def test_a_native_sidecar_has_no_pre_stop_hook(overlay: Path) -> None:
    """Kubelet runs the hook while the app still sends. A drain in it would refuse the app's last frames."""
    assert "lifecycle" not in container(pod_spec(render(overlay)), "vlm-sidecar", "initContainers")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_the_grace_period_is_longer_than_the_drain(overlay: Path) -> None:
    objects = render(overlay)
    pod = pod_spec(objects)
    hook = container(pod, "vlm-sidecar").get("lifecycle") if not pod.get("initContainers") else None
    hook_seconds = float(hook["preStop"]["exec"]["command"][1]) if hook else 0.0
    assert pod["terminationGracePeriodSeconds"] >= hook_seconds + float(settings(objects)["SIDECAR_DRAIN_TIMEOUT"]) + 5


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_every_container_fits_the_restricted_pod_security_standard(overlay: Path) -> None:
    pod = pod_spec(render(overlay))
    for item in pod["containers"] + pod.get("initContainers", []):
        security = item["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] > 0
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_the_sidecar_understands_its_config_map(overlay: Path, tmp_path: Path) -> None:
    environ = settings(render(overlay))
    settings_read, origins = load({}, environ)
    assert set(origins.values()) == set(environ)
    assert {name.startswith(PREFIX) for name in environ} == {True}
    assert settings_read.host == "127.0.0.1"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_the_config_map_overrides_the_variables_of_a_service_named_sidecar(overlay: Path) -> None:
    """For such a Service, Kubernetes sets SIDECAR_PORT=tcp://…. The values of `envFrom` override it."""
    assert {"SIDECAR_PORT", "SIDECAR_ADMIN_PORT"} <= settings(render(overlay)).keys()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_the_memory_limit_follows_from_the_settings(overlay: Path) -> None:
    objects = render(overlay)
    pod = pod_spec(objects)
    sidecar = container(pod, "vlm-sidecar", "initContainers" if pod.get("initContainers") else "containers")
    unit = {"Mi": 2**20, "Gi": 2**30}
    limit = sidecar["resources"]["limits"]["memory"]
    needed = memory_limit(load({}, settings(objects))[0].queue_bytes)
    found = int(limit[:-2]) * unit[limit[-2:]]
    assert found > needed if "local" in overlay.name else found == needed, "a model needs memory of its own"


def test_without_native_sidecars_it_is_an_ordinary_container_that_stops_after_the_app() -> None:
    pod = pod_spec(render(K8S / "overlays" / "dashscope-before-1.29"))
    assert not pod["initContainers"]
    assert [item["name"] for item in pod["containers"]] == ["vlm-sidecar", "cortex"]
    sidecar = pod["containers"][0]
    assert "restartPolicy" not in sidecar
    assert sidecar["lifecycle"]["preStop"]["exec"]["command"][0] == "sleep"


def test_the_key_is_mounted_as_a_folder_so_that_it_can_be_rotated() -> None:
    objects = render(K8S / "overlays" / "dashscope")
    pod = pod_spec(objects)
    sidecar = container(pod, "vlm-sidecar", "initContainers")
    (mount,) = (mount for mount in sidecar["volumeMounts"] if mount["name"] == "dashscope-key")
    assert "subPath" not in mount
    assert Path(settings(objects)["SIDECAR_DASHSCOPE_API_KEY_FILE"]).parent == Path(mount["mountPath"])
    assert {"name": "dashscope-key", "secret": {"secretName": "dashscope"}} in pod["volumes"]
    assert not [item for item in objects if item["kind"] == "Secret"], "no key is ever rendered"


def test_the_local_gpu_overlay_has_a_gpu_a_model_and_time_to_load_it() -> None:
    pod = pod_spec(render(K8S / "overlays" / "local-gpu"))
    sidecar = container(pod, "vlm-sidecar", "initContainers")
    assert sidecar["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert sidecar["startupProbe"]["failureThreshold"] >= 300
    assert {"name": "vlm-model", "mountPath": "/models/vlm", "readOnly": True} in sidecar["volumeMounts"]


def test_no_service_exposes_the_data_port() -> None:
    for overlay in OVERLAYS:
        assert not [item for item in render(overlay) if item["kind"] == "Service"]


def test_only_prometheus_may_connect_and_only_dns_and_https_may_leave() -> None:
    (policy,) = (item for item in render(K8S / "overlays" / "dashscope") if item["kind"] == "NetworkPolicy")
    spec = policy["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert {port["port"] for rule in spec["ingress"] for port in rule["ports"]} == {9464}
    assert {port["port"] for rule in spec["egress"] for port in rule["ports"]} == {53, 443}
    labels = deployment(render(K8S / "overlays" / "dashscope"))["spec"]["template"]["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_pod_monitor_finds_the_pods_and_the_port() -> None:
    (monitor,) = (item for item in render(K8S / "monitoring") if item["kind"] == "PodMonitor")
    template = deployment(render(K8S / "overlays" / "simulated"))["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (port,) = container(template["spec"], "vlm-sidecar", "initContainers")["ports"]
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == [port["name"]]


def test_only_a_labelled_deployment_gets_a_sidecar_and_keeps_its_own_parts(tmp_path: Path) -> None:
    """A third-party app gets its label from a patch by name in a separate layer, as docs/kubernetes.md shows."""
    template = {
        "metadata": {"labels": {"app": "theirs", "mine": "too"}},
        "spec": {
            "terminationGracePeriodSeconds": 10,
            "initContainers": [{"name": "migrate", "image": "theirs"}],
            "containers": [{"name": "theirs", "image": "theirs"}],
            "volumes": [{"name": "theirs", "emptyDir": {}}],
        },
    }
    app = tmp_path / "app"
    app.mkdir()
    objects = [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {"selector": {"matchLabels": {"app": "theirs"}}, "template": template},
        }
        for name in ("theirs", "other")
    ]
    (app / "app.yaml").write_text(yaml.safe_dump_all(objects))
    label = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "theirs", "labels": {"vlm-sidecar": "inject"}},
    }
    _kustomization(
        app,
        resources=["app.yaml"],
        patches=[{"patch": yaml.safe_dump(label)}],
    )
    top = tmp_path / "top"
    top.mkdir()
    component = "/".join([".."] * len(top.resolve().parts[1:])) + str(K8S.resolve() / "components" / "sidecar")
    _kustomization(top, resources=["../app"], components=[component])

    by_name = {item["metadata"]["name"]: item for item in render(top) if item["kind"] == "Deployment"}
    pod = by_name["theirs"]["spec"]["template"]["spec"]
    assert [item["name"] for item in pod["initContainers"]] == ["vlm-sidecar", "migrate"]
    assert [item["name"] for item in pod["containers"]] == ["theirs"]
    assert {volume["name"] for volume in pod["volumes"]} == {"theirs", "vlm-sidecar-state"}
    assert by_name["theirs"]["spec"]["template"]["metadata"]["labels"] == {
        "app": "theirs",
        "mine": "too",
        "vlm-sidecar": "injected",
    }
    assert by_name["other"]["spec"]["template"] == template


def test_the_kustomizations_in_the_document_add_the_sidecar_to_an_app(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "kubernetes.md").read_text(), re.DOTALL)
    for file in block.split("---\n"):
        name = file.split()[1].rstrip(",")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(file)
    shutil.copytree(K8S, tmp_path / "k8s")
    template = {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    app = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "your-app"},
        "spec": {"selector": {"matchLabels": {"app": "a"}}, "template": template},
    }
    (tmp_path / "app" / "your-app.yaml").write_text(yaml.safe_dump(app))
    objects = render(tmp_path)
    assert (
        container(pod_spec(objects), "vlm-sidecar", "initContainers")["image"] == f"REGISTRY/vlm-sidecar:{__version__}"
    )
    assert settings(objects)["SIDECAR_DEADLINE"] == "30"
    assert settings(objects)["SIDECAR_BACKEND"] == "dashscope"


def _kustomization(folder: Path, **content: Any) -> None:
    header = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(header | content))
