"""`GET /status`: the state of the sidecar for an operator who asks why requests wait. Built for each call."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from math import inf
from typing import Any

from sidecar import __version__
from sidecar.admin.health import Health
from sidecar.admission import Admission, Lane, Priority
from sidecar.admission.controller import RateController
from sidecar.observe.format import duration, number, visible
from sidecar.observe.sampler import Sampler

#: Maximum number of keys listed per model: those with the longest queues.
_MAX_KEYS = 20


def status_of(health: Health, admissions: Mapping[str, Admission], sampler: Sampler) -> dict[str, Any]:
    """Return the answer to `GET /status`. It contains names of cameras and models, but no prompt, image or API key.

    `in_words` is a sentence about why requests wait at present. `totals` are the metrics' sums since the start.
    """
    uptime = sampler.uptime
    return {
        "version": __version__,
        "python": platform.python_version(),
        "uptime_seconds": round(uptime, 1),
        "ready": health.unready_reason() is None,
        "reason": health.unready_reason(),
        "backend": ",".join(name for name in admissions if name != "detector"),
        "simulated": "simulated" in admissions,
        "backends": [_backend(name, admission, sampler) for name, admission in admissions.items()],
        "throttles": [
            {"seconds_ago": round(uptime - seen["t"], 1), **{name: seen[name] for name in ("backend", "kind", "count")}}
            for seen in reversed(sampler.throttles)
        ],
    }


def _backend(name: str, admission: Admission, sampler: Sampler) -> dict[str, Any]:
    now = admission.loop.time()
    lanes = sorted(admission.lanes.items(), key=lambda item: item[1].last_used, reverse=True)
    return {
        "name": name,
        "in_flight": admission.in_flight(),
        "queue": {
            "requests": admission.waiting(),
            "bytes": admission.waiting_bytes(),
            "by_priority": {priority.name.lower(): admission.waiting(priority) for priority in Priority},
        },
        "totals": {key: round(value, 3) for key, value in sampler.totals.get(name, {}).items()},
        "models": [_lane(model, lane, now) for model, lane in lanes],
    }


def _lane(model: str, lane: Lane, now: float) -> dict[str, Any]:
    return {
        "model": visible(model),
        "bound_by": lane.cause,
        "in_words": in_words(lane, now),
        "waiting": len(lane.queue),
        **lane.limits.status(now),
        "longest_queues": [
            {"key": visible(key), "requests": count, "oldest_seconds": round(now - arrived, 2)}
            for key, count, arrived in lane.queue.longest(_MAX_KEYS)
        ],
    }


def in_words(lane: Lane, now: float) -> str:
    """Return a sentence about why this model's requests wait at present."""
    waiting, limits, permits = len(lane.queue), lane.limits, lane.limits.permits
    hold = limits.hold
    if hold.kind is not None:
        probe = "a probe is out" if hold.probing else f"next probe in {max(hold.next_probe - now, 0.0):.1f} s"
        return f"on hold for {duration(now - hold.since)} ({hold.kind.value}: {hold.reason}); {probe}"
    if not waiting:
        return f"nothing waits, {permits.in_flight} in flight" if permits.in_flight else "idle"
    match lane.cause:
        case "request_rate":
            what = _rate(limits.requests, "requests", now)
        case "token_rate":
            what = _rate(limits.tokens, "tokens", now)
        case "growth":
            what = "the provider's rule on how quickly traffic may grow"
        case "concurrency":
            what = f"one of the {permits.allowed} permits, {permits.in_flight} are in flight"
        case _:
            what = "their turn"
    return f"{waiting} {'waits' if waiting == 1 else 'wait'} for {what}"


def _rate(learned: RateController, unit: str, now: float) -> str:
    pace = f"{number(learned.pace(now))} {unit}/s"
    if learned.limit == inf:
        return f"their pace, {pace}: the provider's limit is not known yet"
    return (
        f"the provider's {unit.removesuffix('s')} limit: {number(learned.limit)} {unit}/s, "
        f"learned {duration(now - learned.estimate.changed_at)} ago, paced at {number(learned.pace(now))}"
    )
