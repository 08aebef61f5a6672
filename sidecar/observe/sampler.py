"""Looks once a second at what the others keep: fills the history, and logs what an operator wants told.

It keeps no accounts of its own: every figure is the difference of two readings of the metrics' own sums, or the state
of a lane as it stands. What happens between two looks is told by its sum.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

from sidecar.admission import CAUSES, Admission, Change, PoolStatus
from sidecar.observe.gauges import distinct
from sidecar.observe.metrics import Metrics
from sidecar.observe.time_series import FIELDS, Point, TimeSeries

log = logging.getLogger("sidecar")

STEP_SECONDS = 1.0
#: Refusals are told in one line for so many seconds.
SUMMARY_SECONDS = 10
#: Seconds of refusals remembered for `GET /status`.
MAX_THROTTLES = 20
#: Changes of limits and circuits remembered for `GET /status`.
MAX_CHANGES = 50
#: A learned limit that has moved by this share is told, though the controller's state is an everyday one.
_REPORTED_SHARE = 0.1
_EVERYDAY = frozenset({"steady", "probe"})
#: Limits whose last log line is remembered: callers name models as they like.
_MAX_REPORTED = 512


class Sampler:
    """The observer of one sidecar."""

    def __init__(self, metrics: Metrics, admissions: Sequence[Admission]) -> None:
        self._metrics = metrics
        self._admissions = admissions
        self._clock = asyncio.get_running_loop().time
        self._began = self._looked = self._summed = self._clock()
        self.totals = metrics.totals()
        self._summary_totals = self.totals
        self._names = [name for admission in admissions for name in admission.names]
        self.history = {name: TimeSeries() for name in self._names}
        self.throttles: deque[dict[str, Any]] = deque(maxlen=MAX_THROTTLES)
        """Seconds with refusals, newest last: `t` since the start, backend, kind, count."""
        self._reported: dict[tuple[str, str, str], tuple[str, float]] = {}  # state and limit, as last logged
        self.changes: deque[tuple[str, str, Change]] = deque(maxlen=MAX_CHANGES)
        """Upstream, model and what changed; newest last."""
        for admission in admissions:
            admission.on_change.append(self._on_change)
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
        for admission in self._admissions:
            pools = list(admission.status())
            for name in admission.names:
                grown = _grown(before, self.totals, name)
                self.history[name].add(self._point(now, span, name, pools, grown))
                for kind, count in _with_prefix(grown, "throttles."):
                    self.throttles.append(
                        {"t": round(now - self._began, 1), "backend": name, "kind": kind, "count": int(count)}
                    )
        if now - self._summed >= SUMMARY_SECONDS:
            self._summarise(now)
        self._looks.set()
        self._looks = asyncio.Event()

    def _point(self, now: float, span: float, name: str, pools: Sequence[PoolStatus], grown: dict[str, float]) -> Point:
        waiting = dict.fromkeys(CAUSES, 0)
        learned: dict[str, list[float]] = {"requests": [], "tokens": []}
        for pool in pools:
            if pool.upstreams[0].name == name and (count := sum(pool.waiting.values())):
                waiting[pool.cause or "turn"] += count
        upstreams = list(distinct(pools, name))
        used = {pool.model for pool in pools if now - pool.last_used < SUMMARY_SECONDS}
        for one in upstreams:
            if one.model in used or len(upstreams) == 1:
                for unit, gate in (("requests", one.requests), ("tokens", one.tokens)):
                    if gate.limit is not None:
                        learned[unit].append(gate.limit)
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
            "in_flight": sum(one.concurrency.in_flight or 0 for one in upstreams),
            **{f"waiting.{cause}": count for cause, count in waiting.items()},
        }
        return tuple(None if (value := values[field]) is None else round(value, 3) for field in FIELDS)

    # -- the log -------------------------------------------------------------------------------------------------------

    def _on_change(self, backend: str, model: str, change: Change) -> None:
        """Log a change and keep it for the views, when it happens: none is lost between two samples."""
        self.changes.append((backend, model, change))
        if change.dimension != "hold":
            self._log_limit(backend, model, change)
        elif change.state:
            log.warning(
                "%s: holding %s back but for single probes (%s): %s", backend, model, change.state, change.reason
            )
        else:
            log.info("%s: %s takes work again", backend, model)

    def _log_limit(self, backend: str, model: str, change: Change) -> None:
        """Log that a limit was learned, has moved by enough, or is learned in another way, and why."""
        place = (backend, model, change.dimension)
        state, limit = self._reported.get(place, ("start", inf))
        moved = change.new != limit and not abs(change.new - limit) < _REPORTED_SHARE * limit
        everyday = change.state == state or {change.state, state} <= _EVERYDAY
        if moved or not everyday:
            if len(self._reported) >= _MAX_REPORTED:
                self._reported.clear()
            self._reported[place] = (change.state, change.new)
            unit = "tokens" if change.dimension == "token_rate" else "requests"
            text = "unknown" if change.new == inf else f"{change.new:.3g} {unit}/s"
            log.info("%s: the limit of %s is %s (%s): %s", backend, model, text, change.state, change.reason)

    def _summarise(self, now: float) -> None:
        """One line for all refusals since the last one."""
        for name in self._names:
            grown = _grown(self._summary_totals, self.totals, name)
            kinds = [f"{kind} {count:.0f}" for kind, count in _with_prefix(grown, "throttles.")]
            if kinds:
                sent = sum(count for _, count in _with_prefix(grown, "attempts."))
                log.warning(
                    "%s refused %.0f of %.0f attempts in %.0f s (%s)",
                    name, grown.get("attempts.throttled", 0.0), sent, now - self._summed, ", ".join(kinds),
                )  # fmt: skip
        self._summed, self._summary_totals = now, self.totals


def _grown(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], backend: str
) -> dict[str, float]:
    old = before.get(backend, {})
    return {name: value - old.get(name, 0.0) for name, value in after.get(backend, {}).items()}


def _with_prefix(grown: Mapping[str, float], prefix: str) -> Iterator[tuple[str, float]]:
    return ((name.removeprefix(prefix), value) for name, value in grown.items() if name.startswith(prefix) and value)
