"""`GET /status`: what an operator asks when requests wait. Plain data, made when it is asked for."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

from . import __version__
from .admission import Admission, Lane, Priority
from .health import Health

#: Keys with the longest queues that are shown.
_MOST_KEYS = 20


def status_of(health: Health, admissions: Mapping[str, Admission], uptime_seconds: float) -> dict[str, Any]:
    """Everything `GET /status` says. It names cameras (keys) and models, never a prompt, an image or a key of ours."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "uptime_seconds": round(uptime_seconds, 1),
        "ready": health.unready_reason() is None,
        "reason": health.unready_reason(),
        "backend": ",".join(name for name in admissions if name != "detector"),
        "simulated": "simulated" in admissions,
        "backends": [_backend(name, admission) for name, admission in admissions.items()],
    }


def _backend(name: str, admission: Admission) -> dict[str, Any]:
    return {
        "name": name,
        "in_flight": admission.in_flight(),
        "queue": {
            "requests": admission.waiting(),
            "bytes": admission.waiting_bytes(),
            "by_priority": {priority.name.lower(): admission.waiting(priority) for priority in Priority},
        },
        "models": [_lane(model, lane, admission.loop.time()) for model, lane in admission.lanes.items()],
    }


def _lane(model: str, lane: Lane, now: float) -> dict[str, Any]:
    return {
        "model": model,
        "bound_by": lane.cause,
        **lane.limits.status(now),
        "longest_queues": [{"key": key, "requests": count} for key, count in lane.queue.lengths_by_key(_MOST_KEYS)],
    }
