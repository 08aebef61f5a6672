"""Every rendered object fits the schemas of the supported Kubernetes versions. Unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from real_parts import real_packages
from rendering import K8S, OVERLAYS, deployment, render

real_packages("kubernetes_validate", "cloudcoil", how_to_get_them="`make .venv/.group-k8s` installs them")
import kubernetes_validate  # noqa: E402

NATIVE_SIDECARS_SINCE = 29
VERSIONS = [int(version.split(".")[1]) for version in kubernetes_validate.utils.all_versions()]


@pytest.mark.parametrize("minor", [minor for minor in VERSIONS if minor >= NATIVE_SIDECARS_SINCE])
def test_every_overlay_fits_every_version_with_native_sidecars(minor: int) -> None:
    for item in _distinct(OVERLAYS):
        kubernetes_validate.validate(item, f"1.{minor}", strict=True)


@pytest.mark.parametrize("minor", [minor for minor in VERSIONS if minor < NATIVE_SIDECARS_SINCE])
def test_the_overlay_for_older_clusters_fits_them(minor: int) -> None:
    for item in _distinct([K8S / "overlays" / "dashscope-before-1.29"]):
        kubernetes_validate.validate(item, f"1.{minor}", strict=True)


def _distinct(overlays: list[Path]) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = []
    for overlay in overlays:
        objects += [item for item in render(overlay) if item not in objects]
    return objects


def test_the_schemas_contain_the_promised_versions() -> None:
    assert NATIVE_SIDECARS_SINCE in VERSIONS and max(VERSIONS) >= 37


def test_a_misspelt_key_is_refused() -> None:
    """The strict schemas do find the errors for which the tests above look."""
    misspelt = deployment(render(K8S / "overlays" / "simulated"))
    misspelt["spec"]["template"]["spec"]["initContainers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(misspelt, "1.29", strict=True)


@pytest.mark.parametrize("kind", ["PodMonitor", "PrometheusRule"])
def test_monitoring_fits_the_operators_models(kind: str) -> None:
    """The models ignore unknown keys. So the test compares their output with their input."""
    from cloudcoil.models.prometheus_operator import v1  # noqa: PLC0415  three seconds to import

    (item,) = (item for item in render(K8S / "monitoring") if item["kind"] == kind)
    model = getattr(v1, kind).model_validate(item)
    assert model.model_dump(mode="json", by_alias=True, exclude_unset=True) == item
