"""Build dashboard.json for Grafana. It shows first where requests wait, then the limits, errors and resources.

    make dashboard            (or .venv/bin/python k8s/monitoring/dashboard.py)

The JSON is committed. A test fails if this script builds another one, and runs every query on a live Prometheus.
"""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models

TARGET = Path(__file__).with_name("dashboard.json")

#: Label matchers in every query: the namespace and backend that the user selects at the top of the dashboard.
_CHOSEN = 'namespace=~"$namespace",backend=~"$backend"'
_RATE = "[$__rate_interval]"

#: Row title -> panels: title, unit, stacked, and the query and legend of each line. `_filled` replaces `CHOSEN` and
#: `RATE`.
ROWS: dict[str, list[tuple[str, str, bool, list[tuple[str, str]]]]] = {
    "Where do requests wait?": [
        (
            "Seconds spent in each place, by the second: how many requests are there on average",
            "short",
            True,
            [
                ("sum by (cause) (rate(sidecar_queue_wait_cause_seconds_total{CHOSEN}RATE))", "queue: {{cause}}"),
                ("sum(rate(sidecar_backend_lock_wait_seconds_sum{CHOSEN}RATE))", "lock"),
                ("sum(rate(sidecar_backend_duration_seconds_sum{CHOSEN}RATE))", "upstream"),
            ],
        ),
        (
            "Wait in the queue and for the lock",
            "s",
            False,
            [
                (
                    "histogram_quantile(0.5, sum by (le) (rate(sidecar_queue_wait_seconds_bucket{CHOSEN}RATE)))",
                    "queue p50",
                ),
                (
                    "histogram_quantile(0.99, sum by (le) (rate(sidecar_queue_wait_seconds_bucket{CHOSEN}RATE)))",
                    "queue p99",
                ),
                (
                    "histogram_quantile(0.99,"
                    " sum by (le) (rate(sidecar_backend_lock_wait_seconds_bucket{CHOSEN}RATE)))",
                    "lock p99",
                ),
            ],
        ),
        (
            "Waiting and in flight",
            "short",
            False,
            [
                ("sum by (priority) (sidecar_queue_requests{CHOSEN})", "waiting, {{priority}}"),
                ("sum(sidecar_in_flight_requests{CHOSEN})", "in flight"),
            ],
        ),
    ],
    "What does the provider allow?": [
        (
            "Learned limit, sent and refused, requests a second",
            "reqps",
            False,
            [
                ("sum(sidecar_limit_requests_per_second{CHOSEN})", "learned limit"),
                ("sum(rate(sidecar_upstream_attempts_total{CHOSEN}RATE))", "sent"),
                ("sum by (kind) (rate(sidecar_throttles_total{CHOSEN}RATE))", "refused: {{kind}}"),
            ],
        ),
        (
            "LLM tokens a second",
            "short",
            True,
            [("sum by (model, kind) (rate(sidecar_tokens_total{CHOSEN}RATE))", "{{model}} {{kind}}")],
        ),
    ],
    "What goes wrong?": [
        (
            "Requests by how they ended",
            "reqps",
            True,
            [("sum by (outcome) (rate(sidecar_requests_total{CHOSEN}RATE))", "{{outcome}}")],
        ),
        (
            "Attempts by what they were told",
            "reqps",
            True,
            [("sum by (result) (rate(sidecar_upstream_attempts_total{CHOSEN}RATE))", "{{result}}")],
        ),
    ],
    "What does it cost?": [
        (
            "Memory",
            "bytes",
            False,
            [('process_resident_memory_bytes{namespace=~"$namespace"} and on (pod) sidecar_build_info', "{{pod}}")],
        ),
        (
            "Processor, of one core",
            "percentunit",
            False,
            [
                (
                    'rate(process_cpu_seconds_total{namespace=~"$namespace"}RATE) and on (pod) sidecar_build_info',
                    "{{pod}}",
                )
            ],
        ),
        (
            "Event loop lag, p99",
            "s",
            False,
            [
                (
                    "histogram_quantile(0.99, sum by (le)"
                    ' (rate(sidecar_event_loop_lag_seconds_bucket{namespace=~"$namespace"}RATE)))',
                    "lag",
                )
            ],
        ),
    ],
}


def queries() -> list[str]:
    """Return the PromQL queries of all panels, with the dashboard's variables."""
    return [_filled(query) for row in ROWS.values() for _, _, _, lines in row for query, _ in lines]


def _filled(query: str) -> str:
    return query.replace("CHOSEN", _CHOSEN).replace("RATE", _RATE)


def build() -> str:
    """Return the dashboard's JSON."""
    made = (
        dashboard.Dashboard("vlm-sidecar")
        .uid("vlm-sidecar")
        .tags(["vlm-sidecar"])
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
    )
    for name in ("namespace", "backend"):
        made = made.with_variable(
            dashboard.QueryVariable(name)
            .query(f"label_values(sidecar_in_flight_requests, {name})")
            .datasource(common_source())
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        )
    for title, panels in ROWS.items():
        made = made.with_row(dashboard.Row(title))
        for panel in panels:
            made = made.with_panel(_panel(*panel, span=24 // len(panels)))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def common_source() -> models.DataSourceRef:
    """Return the Prometheus data source that the user selects at the top of the dashboard."""
    return models.DataSourceRef(type_val="prometheus", uid="${datasource}")


def _panel(title: str, unit: str, stacked: bool, lines: list[tuple[str, str]], *, span: int) -> timeseries.Panel:
    panel = timeseries.Panel().title(title).unit(unit).datasource(common_source()).span(span).height(9).min(0)
    if stacked:
        panel = panel.fill_opacity(60).stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL))
    for query, legend in lines:
        panel = panel.with_target(prometheus.Dataquery().expr(_filled(query)).legend_format(legend))
    return panel


if __name__ == "__main__":
    TARGET.write_text(build())
