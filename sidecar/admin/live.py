"""The answers of `GET /history` and `GET /events`. The dataclasses are their schema; docs/reference.md shows it."""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.admin.status import Status
from sidecar.observe.time_series import Point


@dataclass(frozen=True, slots=True)
class BackendHistory:
    """The past of one upstream. A point lists its values in the order of `History.fields`; the newest is last."""

    recent: list[Point]
    """One point per second, of the last five minutes."""
    whole: list[Point]
    """The time since the start in at most 300 points. With time, each point covers more seconds."""


@dataclass(frozen=True, slots=True)
class History:
    """The answer of `GET /history`, and the data of the event `start`."""

    status: Status
    fields: tuple[str, ...]
    """The names of the values in a point."""
    history: dict[str, BackendHistory]
    """By the name of the upstream."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The data of the event `tick`, which comes once a second."""

    status: Status
    points: dict[str, Point]
    """The newest point, by the name of the upstream."""
