"""Every alert fires when it should, and only then: promtool evaluates the rules on artificial series."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_parts import ROOT, real_part
from rules import alerts, spec, write_rules

BACKEND = {"namespace": "cams", "backend": "dashscope"}
SERIES = '{namespace="cams",backend="dashscope",pod="cortex-1"%s}'


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    extra = "".join(f',{label}="{value}"' for label, value in labels.items())
    return {"series": name + SERIES % extra, "values": values}


def histogram(name: str, seconds: float, **labels: str) -> list[dict[str, str]]:
    """Return the series of a histogram with 60 observations per minute, each of `seconds` seconds."""
    bounds = ("0.01", "0.25", "0.5", "1", "5", "10", "15", "30", "+Inf")
    buckets = [
        series(f"{name}_bucket", "0+60x180" if seconds <= float(le) else "0x180", le=le, **labels) for le in bounds
    ]
    return [*buckets, series(f"{name}_sum", f"0+{60 * seconds:g}x180", **labels)]


def hold(state: str, values: str) -> list[dict[str, str]]:
    return [series("sidecar_limit_state", values, dimension="hold", state=state)]


def requests(shed_a_minute: int) -> list[dict[str, str]]:
    return [
        series("sidecar_requests_total", "0+1000x180", outcome="ok", api="trio"),
        series("sidecar_requests_total", f"0+{shed_a_minute}x180", outcome="shed", api="trio"),
    ]


def attempts(refused_a_minute: int) -> list[dict[str, str]]:
    return [
        series("sidecar_upstream_attempts_total", "0+1000x180", result="ok"),
        series("sidecar_throttles_total", f"0+{refused_a_minute}x180", kind="request_rate"),
    ]


def limit(values: str) -> list[dict[str, str]]:
    return [series("sidecar_limit_requests_per_second", values)]


def lock_wait(lock_seconds: float, whole_seconds: float) -> list[dict[str, str]]:
    return [
        *histogram("sidecar_backend_lock_wait_seconds", lock_seconds),
        *histogram("sidecar_request_duration_seconds", whole_seconds, outcome="ok", api="trio"),
    ]


def starts(values: str, metric: str = "sidecar_build_info") -> list[dict[str, str]]:
    at = '{job="cams/vlm-sidecar",instance="10.0.0.1:9464"%s}'
    return [
        {"series": "process_start_time_seconds" + at % "", "values": values},
        {"series": metric + at % ',version="0.1.0"', "values": "1x180"},
    ]


@dataclass(frozen=True)
class Case:
    fires: list[dict[str, str]]
    quiet: list[list[dict[str, str]]]
    at: str = "20m"
    labels: dict[str, str] | None = None


CASES = {
    "VlmSidecarQueueWaitHigh": Case(
        histogram("sidecar_queue_wait_seconds", 12, priority="normal"),
        [histogram("sidecar_queue_wait_seconds", 4, priority="normal")],
    ),
    "VlmSidecarLockWaitDominates": Case(lock_wait(2, 3), [lock_wait(2, 8), lock_wait(0.01, 0.012)]),
    "VlmSidecarShedding": Case(requests(50), [requests(5)]),
    "VlmSidecarBillingRefused": Case(
        hold("billing", "0x10 1x170"), [hold("billing", "0x180"), hold("outage", "1x180")]
    ),
    "VlmSidecarKeyRefused": Case(
        hold("unauthorized", "0x10 1x170"), [hold("unauthorized", "0x19 1x0 0x160"), hold("billing", "1x180")]
    ),
    "VlmSidecarQuotaUsedUp": Case(
        hold("quota_period", "0x10 1x170"), [hold("quota_period", "0x180"), hold("billing", "1x180")]
    ),
    "VlmSidecarUpstreamOutage": Case(
        hold("outage", "0x10 1x170"), [hold("outage", "0x18 1x1 0x160"), hold("blackout", "1x180")]
    ),
    "VlmSidecarLimitHalved": Case(
        limit("40x120 15x60"), [limit("40x120 25x60"), limit("40x115 15x2 40x60")], at="2h20m"
    ),
    "VlmSidecarRefusalsOverBudget": Case(
        attempts(20), [attempts(4), [series("sidecar_throttles_total", "0x100 1x80", kind="request_rate")]], at="90m"
    ),
    "VlmSidecarEventLoopLag": Case(
        histogram("sidecar_event_loop_lag_seconds", 0.2, instance="10.0.0.1:9464"),
        [histogram("sidecar_event_loop_lag_seconds", 0.005, instance="10.0.0.1:9464")],
        labels={"namespace": "cams", "pod": "cortex-1", "instance": "10.0.0.1:9464"},
    ),
    "VlmSidecarConfigReloadFailed": Case(
        [{"series": 'sidecar_config_reload_success{namespace="cams",pod="cortex-1"}', "values": "1x5 0x170"}],
        [[{"series": 'sidecar_config_reload_success{namespace="cams",pod="cortex-1"}', "values": "1x16 0x3 1x160"}]],
        labels={"namespace": "cams", "pod": "cortex-1"},
    ),
    "VlmSidecarRestartLoop": Case(
        starts("100x9 200x3 300x3 400x160"),
        [starts("100x9 200x160"), starts("100x9 200x3 300x3 400x160", metric="someone_elses_build_info")],
        labels={"job": "cams/vlm-sidecar", "instance": "10.0.0.1:9464"},
    ),
}


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([real_part("promtool"), *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def run(tmp_path: Path, alert: str, case: Case, *inputs: tuple[list[dict[str, str]], bool]) -> None:
    """Let promtool check for each input whether the alert fires. `inputs`: pairs of series and the expected result."""
    rule = alerts()[alert]
    fired = {"exp_labels": rule["labels"] | (case.labels or BACKEND), "exp_annotations": rule["annotations"]}
    tests: list[dict[str, Any]] = [
        {
            "interval": "1m",
            "input_series": series_list,
            "alert_rule_test": [{"eval_time": case.at, "alertname": alert, "exp_alerts": [fired] if fires else []}],
        }
        for series_list, fires in inputs
    ]
    write_rules(tmp_path)
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": tests}))
    promtool("test", "rules", tmp_path / "test.yaml")


@pytest.mark.parametrize("alert", CASES)
def test_alert_fires(tmp_path: Path, alert: str) -> None:
    run(tmp_path, alert, CASES[alert], (CASES[alert].fires, True))


@pytest.mark.parametrize("alert", CASES)
def test_alert_is_quiet(tmp_path: Path, alert: str) -> None:
    run(tmp_path, alert, CASES[alert], *((series_list, False) for series_list in CASES[alert].quiet))


def test_every_alert_has_its_cases_and_its_runbook() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    assert set(CASES) == set(alerts())
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        assert f"\n## {name}\n" in runbook


def test_prometheus_accepts_the_rules(tmp_path: Path) -> None:
    promtool("check", "rules", write_rules(tmp_path))


def test_each_recording_rule_records_the_value_in_its_name(tmp_path: Path) -> None:
    inputs = [*requests(50), *attempts(20), *limit("40x180"), *lock_wait(1, 4)]
    inputs += histogram("sidecar_queue_wait_seconds", 12, priority="normal")
    expected = {
        "sidecar:shed_to_requests:ratio_5m": 50 / 1050,
        "sidecar:refusals_per_1000_attempts:rate_1h": 20,
        "sidecar:limit_requests_per_second:sum": 40,
        "sidecar:goodput_to_limit:ratio_5m": 1000 / 60 / 40,
        "sidecar:lock_wait_to_request_duration:ratio_5m": 0.25,
        # Prometheus interpolates linearly within a bucket: 12 s is in the bucket 10-15 s, 1 s in the bucket 0.5-1 s.
        "sidecar:queue_wait_seconds:p50_5m": 12.5,
        "sidecar:queue_wait_seconds:p99_5m": 14.95,
        "sidecar:backend_lock_wait_seconds:p50_5m": 0.75,
        "sidecar:backend_lock_wait_seconds:p99_5m": 0.995,
    }
    records = {rule["record"] for group in spec()["groups"] for rule in group["rules"] if "record" in rule}
    assert expected.keys() == records
    checks = [
        {
            "expr": f"round({record}, 0.0001)",
            "eval_time": "90m",
            "exp_samples": [{"labels": '{namespace="cams",backend="dashscope"}', "value": round(value, 4)}],
        }
        for record, value in expected.items()
    ]
    write_rules(tmp_path)
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": checks}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [test]}))
    promtool("test", "rules", tmp_path / "test.yaml")
