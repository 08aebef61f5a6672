"""Takes a sample of all backends once a second: fills the time series and logs the changes that matter to an operator.

The sampler counts nothing itself. Every number is the difference between two readings of the metrics' sums, or the
present state of a lane. So a point includes everything that happened since the point before.
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
from sidecar.admission.controller import RateController
from sidecar.observe.metrics import Metrics
from sidecar.observe.time_series import FIELDS, Point, TimeSeries

log = logging.getLogger("sidecar")

#: Seconds between two samples.
STEP_SECONDS = 1.0
#: One log line reports all refusals of this many seconds.
SUMMARY_SECONDS = 10
#: Maximum number of entries in `Sampler.throttles`, for `GET /status`.
MAX_THROTTLES = 20
#: A learned limit is logged again when it has changed by this share, even if the controller is in a routine state.
_MIN_LOGGED_CHANGE = 0.1
_ROUTINE_STATES = frozenset({"steady", "probe"})


class Sampler:
    """Takes the samples of one sidecar. Create it in the event loop that runs it."""

    def __init__(self, metrics: Metrics, admissions: Mapping[str, Admission]) -> None:
        self._metrics = metrics
        self._admissions = admissions
        self._clock = asyncio.get_running_loop().time
        self._started_at = self._last_sample_at = self._last_summary_at = self._clock()
        self.totals = metrics.totals()
        self._summary_totals = self.totals
        self.time_series = {name: TimeSeries() for name in admissions}
        self.throttles: deque[dict[str, Any]] = deque(maxlen=MAX_THROTTLES)
        """Refusals by sample, backend and kind, newest last. `t`: seconds since the start; `count`: refusals."""
        # The last logged state of each limit and lane. Entries disappear when admission drops the lane.
        self._logged_limits: WeakKeyDictionary[RateController, tuple[str, float]] = WeakKeyDictionary()
        self._logged_holds: WeakKeyDictionary[Lane, str] = WeakKeyDictionary()
        self._sampled = asyncio.Event()
        self.closed = False

    def __repr__(self) -> str:
        return f"<Sampler {','.join(self._admissions)} uptime={self.uptime:.1f} closed={self.closed}>"

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started_at

    async def run(self) -> None:
        """Take a sample every second until cancelled.

        An exception is logged and ignored: requests must not fail from it.
        """
        while True:
            await asyncio.sleep(STEP_SECONDS)
            try:
                self.sample()
            except Exception:
                log.exception("a defect in the watch: this second is missing from the live views")

    async def next_sample(self) -> bool:
        """Wait for the next sample. Return False if there will be no more samples."""
        if not self.closed:
            await self._sampled.wait()
        return not self.closed

    def close(self) -> None:
        """Make all waiting calls of `next_sample` return False. No samples follow."""
        self.closed = True
        self._sampled.set()

    def sample(self) -> None:
        """Take one sample of every backend."""
        now = self._clock()
        before, self.totals = self.totals, self._metrics.totals()
        span, self._last_sample_at = now - self._last_sample_at, now
        for name, admission in self._admissions.items():
            increases = _increases(before, self.totals, name)
            self.time_series[name].add(self._point(now, span, admission, increases))
            for kind, count in _with_prefix(increases, "throttles."):
                self.throttles.append(
                    {"t": round(now - self._started_at, 1), "backend": name, "kind": kind, "count": int(count)}
                )
            for model, lane in admission.lanes.items():
                self._log_hold(name, model, lane)
                for unit, limit in _limits(lane):
                    self._log_limit(name, model, unit, limit)
        if now - self._last_summary_at >= SUMMARY_SECONDS:
            self._log_summary(now)
        self._sampled.set()
        self._sampled = asyncio.Event()

    def _point(self, now: float, span: float, admission: Admission, increases: dict[str, float]) -> Point:
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
            "t": now - self._started_at,
            "span": span,
            "sent": sum(count for _, count in _with_prefix(increases, "attempts.")),
            "refused": increases.get("attempts.throttled", 0.0),
            "answered": increases.get("requests.ok", 0.0),
            "lost": sum(increases.get(f"requests.{outcome}", 0.0) for outcome in ("shed", "deadline", "error")),
            "input_tokens": increases.get("tokens.input", 0.0),
            "output_tokens": increases.get("tokens.output", 0.0),
            "queue_seconds": increases.get("seconds.queue", 0.0),
            "lock_seconds": increases.get("seconds.lock", 0.0),
            "upstream_seconds": increases.get("seconds.upstream", 0.0),
            "limit": sum(learned["requests"]) if learned["requests"] else None,
            "token_limit": sum(learned["tokens"]) if learned["tokens"] else None,
            "in_flight": admission.in_flight(),
            **{f"waiting.{cause}": count for cause, count in waiting.items()},
        }
        return tuple(None if (value := values[field]) is None else round(value, 3) for field in FIELDS)

    # -- the log -------------------------------------------------------------------------------------------------------

    def _log_hold(self, backend: str, model: str, lane: Lane) -> None:
        hold = lane.limits.hold
        kind = "" if hold.kind is None else hold.kind.value
        if kind == self._logged_holds.get(lane, ""):
            return
        self._logged_holds[lane] = kind
        if kind:
            log.warning("%s: holding %s back but for single probes (%s): %s", backend, model, kind, hold.reason)
        else:
            log.info("%s: %s takes work again", backend, model)

    def _log_limit(self, backend: str, model: str, unit: str, learned: RateController) -> None:
        """Log a limit with the reason, if it is new, has changed enough, or has another learning state."""
        state = learned.state.value
        old_state, old_limit = self._logged_limits.get(learned, ("start", inf))
        moved = learned.limit != old_limit and not abs(learned.limit - old_limit) < _MIN_LOGGED_CHANGE * old_limit
        routine = state == old_state or {state, old_state} <= _ROUTINE_STATES
        if moved or not routine:
            self._logged_limits[learned] = (state, learned.limit)
            limit = "unknown" if learned.limit == inf else f"{learned.limit:.3g} {unit}/s"
            log.info("%s: the limit of %s is %s (%s): %s", backend, model, limit, state, learned.estimate.changed_why)

    def _log_summary(self, now: float) -> None:
        """Log one line per backend for all refusals since the last such line."""
        for name in self._admissions:
            increases = _increases(self._summary_totals, self.totals, name)
            kinds = [f"{kind} {count:.0f}" for kind, count in _with_prefix(increases, "throttles.")]
            if kinds:
                sent = sum(count for _, count in _with_prefix(increases, "attempts."))
                log.warning(
                    "%s refused %.0f of %.0f attempts in %.0f s (%s)",
                    name, increases.get("attempts.throttled", 0.0), sent, now - self._last_summary_at, ", ".join(kinds),
                )  # fmt: skip
        self._last_summary_at, self._summary_totals = now, self.totals


def _limits(lane: Lane) -> tuple[tuple[str, RateController], ...]:
    return (("requests", lane.limits.requests), ("tokens", lane.limits.tokens))


def _increases(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], backend: str
) -> dict[str, float]:
    old = before.get(backend, {})
    return {name: value - old.get(name, 0.0) for name, value in after.get(backend, {}).items()}


def _with_prefix(increases: Mapping[str, float], prefix: str) -> Iterator[tuple[str, float]]:
    return (
        (name.removeprefix(prefix), value) for name, value in increases.items() if name.startswith(prefix) and value
    )
