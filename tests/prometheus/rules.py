"""The rules of k8s/monitoring/prometheus-rule.yaml in the form that Prometheus itself reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from real_parts import ROOT


def spec() -> dict[str, Any]:
    """Return the rules as the operator passes them to Prometheus."""
    return yaml.safe_load((ROOT / "k8s" / "monitoring" / "prometheus-rule.yaml").read_text())["spec"]


def write_rules(folder: Path) -> Path:
    """Write a rule file and return its path."""
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(spec()))
    return path


def alerts() -> dict[str, dict[str, Any]]:
    """Return every alert by name."""
    return {rule["alert"]: rule for group in spec()["groups"] for rule in group["rules"] if "alert" in rule}
