"""Takes a sample of all backends once a second: fills the time series and logs the changes that matter to an operator.

The sampler counts nothing itself. Every number is the difference between two readings of the metrics' sums, or the
present status of a pool. So a point includes everything that happened since the point before.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

from sidecar.admission import CAUSES, NO_MODEL, Admission, Change, GateStatus, PoolStatus
from sidecar.admission.learning.reported import ReportedStatus
from sidecar.observe.gauges import upstreams_named
from sidecar.observe.metrics import Metrics
from sidecar.observe.time_series import FIELDS, Point, TimeSeries

log = logging.getLogger("sidecar")

#: Seconds between two samples.
STEP_SECONDS = 1.0
#: One log line reports all refusals of this many seconds.
SUMMARY_SECONDS = 10
#: Maximum number of entries in `Sampler.throttles`, for `GET /status`.
MAX_THROTTLES = 20
#: Maximum number of entries in `Sampler.changes`, for `GET /status`.
MAX_CHANGES = 50
#: A learned limit is logged again when it has changed by this share, even if the learner is in a routine state.
_MIN_LOGGED_CHANGE = 0.1
_ROUTINE_STATES = frozenset({"steady", "probe"})
#: Maximum number of limits whose last log line is remembered: callers choose the names of models.
_MAX_LOGGED_LIMITS = 512


#: A reported limit is compared with a learned limit whose relative error is at most this, and logged if they differ by
#: more than this share.
_KNOWN_ERROR, _REPORTED_APART = 0.05, 0.25


class Sampler:
    """Takes the samples of one sidecar. Create it in the event loop that runs it."""

    def __init__(self, metrics: Metrics, admissions: Sequence[Admission]) -> None:
        self._metrics = metrics
        self.refusals = metrics.refusals
        self._admissions = admissions
        self._clock = asyncio.get_running_loop().time
        self._started_at = self._last_sample_at = self._last_summary_at = self._clock()
        self.totals = metrics.totals()
        self._summary_totals = self.totals
        self._names = [name for admission in admissions for name in admission.names]
        self.time_series = {name: TimeSeries() for name in self._names}
        self.throttles: deque[dict[str, Any]] = deque(maxlen=MAX_THROTTLES)
        """Refusals by sample, backend and kind, newest last. `t`: seconds since the start; `count`: refusals."""
        self._logged_limits: dict[tuple[str, str, str], tuple[str, float]] = {}  # state and limit, as last logged
        self._logged_reported: set[tuple[str, str, str, float]] = set()  # upstream, model, header and its limit
        self._unlogged: dict[tuple[str, str, str], list[Change]] = {}  # since the last sample
        self.changes: deque[tuple[str, str, Change]] = deque(maxlen=MAX_CHANGES)
        """The upstream, the model and what changed; newest last."""
        for admission in admissions:
            admission.on_change.append(self._on_change)
        self._sampled = asyncio.Event()
        self.closed = False

    def __repr__(self) -> str:
        return f"<Sampler {','.join(self._names)} uptime={self.uptime:.1f} closed={self.closed}>"

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
        for admission in self._admissions:
            pools = list(admission.status())
            for name in admission.names:
                increases = _increases(before, self.totals, name)
                self.time_series[name].add(self._point(now, span, name, pools, increases))
                for kind, count in _with_prefix(increases, "throttles."):
                    self.throttles.append(
                        {"t": round(now - self._started_at, 1), "backend": name, "kind": kind, "count": int(count)}
                    )
        self._log_limits()
        if now - self._last_summary_at >= SUMMARY_SECONDS:
            self._log_summary(now)
        self._sampled.set()
        self._sampled = asyncio.Event()

    def _point(
        self, now: float, span: float, name: str, pools: Sequence[PoolStatus], increases: dict[str, float]
    ) -> Point:
        waiting = dict.fromkeys(CAUSES, 0)
        learned: dict[str, list[float]] = {"requests": [], "tokens": []}
        for pool in pools:
            if pool.upstreams[0].name == name and (count := sum(pool.waiting.values())):
                waiting[pool.cause or "turn"] += count
        upstreams = list(upstreams_named(pools, name))
        used = {pool.model for pool in pools if now - pool.last_used < SUMMARY_SECONDS} - {NO_MODEL}
        for upstream in upstreams:
            if upstream.model in used or len(upstreams) == 1:
                for unit, gate in (("requests", upstream.requests), ("tokens", upstream.tokens)):
                    if gate.limit is not None:
                        learned[unit].append(gate.limit)
                    if gate.reported is not None:
                        self._log_reported(name, upstream.model, unit, gate, gate.reported)
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
            "in_flight": sum(upstream.concurrency.in_flight or 0 for upstream in upstreams),
            **{f"waiting.{cause}": count for cause, count in waiting.items()},
        }
        return tuple(None if (value := values[field]) is None else round(value, 3) for field in FIELDS)

    # -- the log -------------------------------------------------------------------------------------------------------

    def _on_change(self, backend: str, model: str, change: Change) -> None:
        """Keep a change for the views, and log it: a circuit at once, a limit with the next sample.

        Changes are pushed when they happen, so a value that changes and changes back between two samples is not lost.
        """
        self.changes.append((backend, model, change))
        if change.dimension != "hold":
            self._unlogged.setdefault((backend, model, change.dimension), []).append(change)
        elif change.state:
            log.warning(
                "%s: holding %s back but for single probes (%s): %s", backend, model, change.state, change.reason
            )
        else:
            log.info("%s: %s takes work again", backend, model)

    def _log_limits(self) -> None:
        """Write one log line for each limit that is new, has a new state, or has changed enough since its last line."""
        unlogged, self._unlogged = self._unlogged, {}
        for limit_key, changes in unlogged.items():
            backend, model, dimension = limit_key
            old_state, old_limit = self._logged_limits.get(limit_key, ("start", inf))
            latest = changes[-1]
            moved = any(
                change.new != old_limit and not abs(change.new - old_limit) < _MIN_LOGGED_CHANGE * old_limit
                for change in changes
            )
            routine = latest.state == old_state or {latest.state, old_state} <= _ROUTINE_STATES
            if moved or not routine:
                if len(self._logged_limits) >= _MAX_LOGGED_LIMITS:
                    self._logged_limits.clear()
                self._logged_limits[limit_key] = (latest.state, latest.new)
                unit = "tokens" if dimension == "token_rate" else "requests"
                limit = "unknown" if latest.new == inf else f"{latest.new:.3g} {unit}/s"
                log.info("%s: the limit of %s is %s (%s): %s", backend, model, limit, latest.state, latest.reason)

    def _log_reported(self, backend: str, model: str, unit: str, gate: GateStatus, reported: ReportedStatus) -> None:
        """Write one log line if the learned limit is known well and differs from the reported one by over a quarter."""
        if gate.limit is None or (gate.error or 0.0) > _KNOWN_ERROR:
            return
        key = backend, model, reported.header, reported.limit
        if abs(gate.limit / reported.per_second - 1.0) > _REPORTED_APART and key not in self._logged_reported:
            if len(self._logged_reported) >= _MAX_LOGGED_LIMITS:
                self._logged_reported.clear()
            self._logged_reported.add(key)
            log.info(
                "%s: the limit of %s is %.3g %s/s, but the header %s reports %.3g/s: the learned limit counts",
                backend, model, gate.limit, unit, reported.header, reported.per_second,
            )  # fmt: skip

    def _log_summary(self, now: float) -> None:
        """Log one line per backend for all refusals since the last such line."""
        for name in self._names:
            increases = _increases(self._summary_totals, self.totals, name)
            kinds = [f"{kind} {count:.0f}" for kind, count in _with_prefix(increases, "throttles.")]
            if kinds:
                sent = sum(count for _, count in _with_prefix(increases, "attempts."))
                log.warning(
                    "%s refused %.0f of %.0f attempts in %.0f s (%s)",
                    name, increases.get("attempts.throttled", 0.0), sent, now - self._last_summary_at, ", ".join(kinds),
                )  # fmt: skip
        self._last_summary_at, self._summary_totals = now, self.totals


def _increases(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], backend: str
) -> dict[str, float]:
    old = before.get(backend, {})
    return {name: value - old.get(name, 0.0) for name, value in after.get(backend, {}).items()}


def _with_prefix(increases: Mapping[str, float], prefix: str) -> Iterator[tuple[str, float]]:
    return (
        (name.removeprefix(prefix), value) for name, value in increases.items() if name.startswith(prefix) and value
    )
