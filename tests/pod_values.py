"""What k8s/ ships for the sidecar's container, read from its files without kubectl."""

from __future__ import annotations

import yaml
from real_parts import ROOT

_FOLDER = ROOT / "k8s" / "components" / "sidecar"


def shipped() -> tuple[dict[str, str], int]:
    """Return the settings as environment variables, and the memory limit in bytes."""
    lines = [line for line in (_FOLDER / "settings.env").read_text().splitlines() if not line.startswith("#")]
    [sidecar] = yaml.safe_load((_FOLDER / "sidecar.yaml").read_text())["spec"]["template"]["spec"]["initContainers"]
    limit = sidecar["resources"]["limits"]["memory"]
    return dict(line.split("=", 1) for line in lines), int(limit.removesuffix("Mi")) * 2**20
