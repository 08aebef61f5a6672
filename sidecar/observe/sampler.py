"""Looks once a second at what the others keep: fills the history, and logs what an operator wants told.

It keeps no accounts of its own: every figure is the difference of two readings of the metrics' own sums, or the state
of a lane as it stands. What happens between two looks is told by its sum.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

from sidecar.admission import CAUSES, Admission, Lane
from sidecar.admission.learning.learner import RateController
from sidecar.observe.metrics import Metrics
from sidecar.observe.time_series import FIELDS, Point, TimeSeries

log = logging.getLogger("sidecar")

STEP_SECONDS = 1.0
#: Refusals are told in one line for so many seconds.
SUMMARY_SECONDS = 10
#: Seconds of refusals remembered for `GET /status`.
MAX_THROTTLES = 20
#: A learned limit that has moved by this share is told, though the controller's state is an everyday one.
_TOLD_SHARE = 0.1
_EVERYDAY = frozenset({"steady", "probe"})


class Sampler:
    """The observer of one sidecar."""

    def __init__(self, metrics: Metrics, admissions: Mapping[str, Admission]) -> None:
        self._metrics = metrics
        self._admissions = admissions
        self._clock = asyncio.get_running_loop().time
        self._began = self._looked = self._summed = self._clock()
        self.totals = metrics.totals()
        self._summary_totals = self.totals
        self.history = {name: TimeSeries() for name in admissions}
        self.throttles: deque[dict[str, Any]] = deque(maxlen=MAX_THROTTLES)
        """Seconds with refusals, newest last: `t` since the start, backend, kind, count."""
        # What was told last of each; what is forgotten by admission is forgotten here.
        self._told: WeakKeyDictionary[RateController, tuple[str, float]] = WeakKeyDictionary()
        self._held: WeakKeyDictionary[Lane, str] = WeakKeyDictionary()
        self._looks = asyncio.Event()
        self.closed = False

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    async def run(self) -> None:
        """Look every second until cancelled. A defect here is logged, since no request must suffer from it."""
        while True:
            await asyncio.sleep(STEP_SECONDS)
            try:
                self.look()
            except Exception:
                log.exception("a defect in the watch: this second is missing from the live views")

    async def next_look(self) -> bool:
        """Wait for the next look; False once there will be none."""
        if not self.closed:
            await self._looks.wait()
        return not self.closed

    def close(self) -> None:
        """Let go of everyone who waits for a look."""
        self.closed = True
        self._looks.set()

    def look(self) -> None:
        """Read everything once."""
        now = self._clock()
        before, self.totals = self.totals, self._metrics.totals()
        span, self._looked = now - self._looked, now
        for name, admission in self._admissions.items():
            grown = _grown(before, self.totals, name)
            self.history[name].add(self._point(now, span, admission, grown))
            for kind, count in _with_prefix(grown, "throttles."):
                self.throttles.append(
                    {"t": round(now - self._began, 1), "backend": name, "kind": kind, "count": int(count)}
                )
            for model, lane in admission.lanes.items():
                self._tell_hold(name, model, lane)
                for unit, limit in _limits(lane):
                    self._tell_limit(name, model, unit, limit)
        if now - self._summed >= SUMMARY_SECONDS:
            self._summarise(now)
        self._looks.set()
        self._looks = asyncio.Event()

    def _point(self, now: float, span: float, admission: Admission, grown: dict[str, float]) -> Point:
        waiting = dict.fromkeys(CAUSES, 0)
        learned: dict[str, list[float]] = {"requests": [], "tokens": []}
        for lane in admission.lanes.values():
            if len(lane.queue):
                waiting[lane.cause or "turn"] += len(lane.queue)
            if now - lane.last_used < SUMMARY_SECONDS:
                for unit, limit in _limits(lane):
                    if limit.limit != inf:
                        learned[unit].append(limit.limit)
        values: dict[str, float | None] = {
            "t": now - self._began,
            "span": span,
            "sent": sum(count for _, count in _with_prefix(grown, "attempts.")),
            "refused": grown.get("attempts.throttled", 0.0),
            "answered": grown.get("requests.ok", 0.0),
            "lost": sum(grown.get(f"requests.{outcome}", 0.0) for outcome in ("shed", "deadline", "error")),
            "input_tokens": grown.get("tokens.input", 0.0),
            "output_tokens": grown.get("tokens.output", 0.0),
            "queue_seconds": grown.get("seconds.queue", 0.0),
            "lock_seconds": grown.get("seconds.lock", 0.0),
            "upstream_seconds": grown.get("seconds.upstream", 0.0),
            "limit": sum(learned["requests"]) if learned["requests"] else None,
            "token_limit": sum(learned["tokens"]) if learned["tokens"] else None,
            "in_flight": admission.in_flight(),
            **{f"waiting.{cause}": count for cause, count in waiting.items()},
        }
        return tuple(None if (value := values[field]) is None else round(value, 3) for field in FIELDS)

    # -- the log -------------------------------------------------------------------------------------------------------

    def _tell_hold(self, backend: str, model: str, lane: Lane) -> None:
        hold = lane.limits.hold
        kind = "" if hold.kind is None else hold.kind.value
        if kind == self._held.get(lane, ""):
            return
        self._held[lane] = kind
        if kind:
            log.warning("%s: holding %s back but for single probes (%s): %s", backend, model, kind, hold.reason)
        else:
            log.info("%s: %s takes work again", backend, model)

    def _tell_limit(self, backend: str, model: str, unit: str, learned: RateController) -> None:
        """Say that a limit was learned, has moved by enough, or is learned in another way, and why."""
        state = learned.state.value
        told_state, told_limit = self._told.get(learned, ("start", inf))
        moved = learned.limit != told_limit and not abs(learned.limit - told_limit) < _TOLD_SHARE * told_limit
        everyday = state == told_state or {state, told_state} <= _EVERYDAY
        if moved or not everyday:
            self._told[learned] = (state, learned.limit)
            limit = "unknown" if learned.limit == inf else f"{learned.limit:.3g} {unit}/s"
            log.info("%s: the limit of %s is %s (%s): %s", backend, model, limit, state, learned.estimate.changed_why)

    def _summarise(self, now: float) -> None:
        """One line for all refusals since the last one."""
        for name in self._admissions:
            grown = _grown(self._summary_totals, self.totals, name)
            kinds = [f"{kind} {count:.0f}" for kind, count in _with_prefix(grown, "throttles.")]
            if kinds:
                sent = sum(count for _, count in _with_prefix(grown, "attempts."))
                log.warning(
                    "%s refused %.0f of %.0f attempts in %.0f s (%s)",
                    name, grown.get("attempts.throttled", 0.0), sent, now - self._summed, ", ".join(kinds),
                )  # fmt: skip
        self._summed, self._summary_totals = now, self.totals


def _limits(lane: Lane) -> tuple[tuple[str, RateController], ...]:
    return (("requests", lane.limits.requests), ("tokens", lane.limits.tokens))


def _grown(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], backend: str
) -> dict[str, float]:
    old = before.get(backend, {})
    return {name: value - old.get(name, 0.0) for name, value in after.get(backend, {}).items()}


def _with_prefix(grown: Mapping[str, float], prefix: str) -> Iterator[tuple[str, float]]:
    return ((name.removeprefix(prefix), value) for name, value in grown.items() if name.startswith(prefix) and value)
