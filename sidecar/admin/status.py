"""`GET /status`: shows why requests wait. Each call builds the answer from frozen status objects.

The dataclasses here are the schema of the answer; docs/reference.md shows it.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from sidecar import __version__
from sidecar.admin.health import Health
from sidecar.admission import NO_MODEL, Admission, Change, GateStatus, PoolStatus, Priority, UpstreamStatus
from sidecar.observe.format import duration, number, shown_name
from sidecar.observe.gauges import upstreams_named
from sidecar.observe.refusal_words import RefusalWords
from sidecar.observe.sampler import Sampler

#: Maximum number of keys in `longest_queues`.
_MAX_KEYS = 20


@dataclass(frozen=True, slots=True)
class Reported:
    """The limit that the provider reports in the headers of its answers. It can be wrong."""

    header: str
    per_second: float
    limit: float
    window_seconds: float
    remaining: float | None
    trusted: bool
    refuted: bool
    others_per_second: float | None


@dataclass(frozen=True, slots=True)
class Rate:
    """A learned rate. Rates are per second; None while unknown or unlimited."""

    state: str
    learned: float | None
    pace: float | None
    burst: float | None
    uncertainty: float | None
    changed_seconds_ago: float
    changed_why: str
    reported: Reported | None


@dataclass(frozen=True, slots=True)
class Growth:
    """How quickly traffic may rise.

    Calls allowed in one second: `base` + `factor` x the calls per second of the 8 to 12 s before it.
    """

    base: float
    factor: float


@dataclass(frozen=True, slots=True)
class Concurrency:
    """Attempts in flight."""

    allowed: float
    learned: float | None
    in_flight: int


@dataclass(frozen=True, slots=True)
class Hold:
    """The circuit is open."""

    kind: str
    reason: str
    since_seconds: float
    next_probe_seconds: float


@dataclass(frozen=True, slots=True)
class KeyQueue:
    """The queue of one key (camera)."""

    key: str
    requests: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class Model:
    """One model at one upstream."""

    model: str
    bound_by: str | None
    """Why the queue waits: a cause of `sidecar_queue_wait_cause_seconds_total`; None while the queue is empty."""
    in_words: str
    waiting: int
    requests: Rate
    tokens: Rate
    growth: Growth | None
    concurrency: Concurrency
    hold: Hold | None
    longest_queues: list[KeyQueue]


@dataclass(frozen=True, slots=True)
class Queue:
    """The waiting requests. Requests that several upstreams could take are shown at the first upstream."""

    requests: int
    bytes: int
    by_priority: dict[str, int]


@dataclass(frozen=True, slots=True)
class Unknown:
    """The latest refusal that was read by its status alone."""

    seconds_ago: float
    status: int
    code: str


@dataclass(frozen=True, slots=True)
class Refusals:
    """The provider's refusals since the start, by whether a rule knew their code or words."""

    known: int
    unknown: int
    last_unknown: Unknown | None


@dataclass(frozen=True, slots=True)
class UpstreamReport:
    """One upstream by name, with all its models."""

    name: str
    in_flight: int
    queue: Queue
    totals: dict[str, float]
    """The metrics' own sums since the start."""
    refusals: Refusals
    models: list[Model]


@dataclass(frozen=True, slots=True)
class Throttle:
    """Refusals of one kind by one backend in one sample (one second)."""

    seconds_ago: float
    backend: str
    kind: str
    count: int


@dataclass(frozen=True, slots=True)
class LimitChange:
    """A learned limit changed, or a circuit opened or closed (dimension `hold`). Limits are per second."""

    seconds_ago: float
    backend: str
    model: str
    dimension: str
    old: float | None
    new: float | None
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Status:
    """The whole answer. It contains camera keys and model names.

    It never contains prompts, images or the sidecar's API keys.
    """

    version: str
    python: str
    uptime_seconds: float
    ready: bool
    reason: str | None
    backend: str
    simulated: bool
    backends: list[UpstreamReport]
    throttles: list[Throttle]
    changes: list[LimitChange]
    """The latest first."""


def status_of(health: Health, admissions: Sequence[Admission], sampler: Sampler) -> Status:
    """Return the data of `GET /status`."""
    uptime = sampler.uptime
    names = [name for admission in admissions for name in admission.names]
    return Status(
        version=__version__,
        python=platform.python_version(),
        uptime_seconds=round(uptime, 1),
        ready=health.unready_reason() is None,
        reason=health.unready_reason(),
        backend=",".join(name for name in names if name != "detector"),
        simulated="simulated" in names,
        backends=[
            _backend(name, list(admission.status(_MAX_KEYS)), admission.loop.time(), sampler)
            for admission in admissions
            for name in admission.names
        ],
        throttles=[
            Throttle(round(uptime - seen["t"], 1), seen["backend"], seen["kind"], seen["count"])
            for seen in reversed(sampler.throttles)
        ],
        changes=[_change(*change, now=admissions[0].loop.time()) for change in reversed(sampler.changes)],
    )


def _backend(name: str, pools: Sequence[PoolStatus], now: float, sampler: Sampler) -> UpstreamReport:
    queues = [pool for pool in pools if pool.upstreams[0].name == name]
    by_priority = {priority.name.lower(): sum(pool.waiting[priority] for pool in queues) for priority in Priority}
    pairs = [(pool, upstream) for pool in pools for upstream in pool.upstreams if upstream.name == name]
    pairs.sort(key=lambda pair: (pair[0].model == NO_MODEL, -pair[0].last_used))
    return UpstreamReport(
        name=name,
        in_flight=sum(upstream.concurrency.in_flight or 0 for upstream in upstreams_named(pools, name)),
        queue=Queue(sum(by_priority.values()), sum(pool.waiting_bytes for pool in queues), by_priority),
        totals={key: round(value, 3) for key, value in sampler.totals.get(name, {}).items()},
        refusals=_refusals(name, now, sampler.refusals),
        models=[_model(pool, upstream, now) for pool, upstream in pairs],
    )


def _refusals(name: str, now: float, words: RefusalWords) -> Refusals:
    last = words.last_unknown.get(name)
    unknown = None if last is None else Unknown(round(now - last.at, 1), last.status, last.code)
    return Refusals(words.known[name], words.unknown[name], unknown)


def _model(pool: PoolStatus, upstream: UpstreamStatus, now: float) -> Model:
    is_first = pool.upstreams[0] is upstream
    growth, concurrency, circuit = upstream.growth, upstream.concurrency, upstream.circuit
    learned = concurrency.limit
    return Model(
        model=shown_name(pool.model),
        bound_by=pool.cause if is_first else None,
        in_words=in_words(pool, upstream, now),
        waiting=sum(pool.waiting.values()) if is_first else 0,
        requests=_rate(upstream.requests, now),
        tokens=_rate(upstream.tokens, now),
        growth=None if growth.limit is None else Growth(growth.limit, round(growth.factor or 0.0, 3)),
        concurrency=Concurrency(concurrency.pace or 0.0, learned, concurrency.in_flight or 0),
        hold=None
        if not circuit.state
        else Hold(
            circuit.state,
            circuit.why,
            round(now - circuit.since, 1),
            round(max((circuit.next_at or now) - now, 0.0), 1),
        ),
        longest_queues=[
            KeyQueue(shown_name(key), count, round(now - arrived, 2)) for key, count, arrived in pool.longest_queues
        ]
        if is_first
        else [],
    )


def _change(backend: str, model: str, change: Change, *, now: float) -> LimitChange:
    def limit(value: float) -> float | None:
        return round(value, 3) if 0.0 < value < inf else None

    ago, old, new = round(now - change.at, 1), limit(change.old), limit(change.new)
    return LimitChange(ago, backend, shown_name(model), change.dimension, old, new, change.state, change.reason)


def _rate(gate: GateStatus, now: float) -> Rate:
    def rounded(value: float | None, digits: int) -> float | None:
        return None if value is None else round(value, digits)

    return Rate(
        gate.state,
        rounded(gate.limit, 3),
        rounded(gate.pace, 3),
        rounded(gate.burst, 1),
        rounded(gate.error, 3),
        round(now - gate.since, 1),
        gate.why,
        None
        if (reported := gate.reported) is None
        else Reported(
            reported.header,
            round(reported.per_second, 3),
            reported.limit,
            reported.window_seconds,
            reported.remaining,
            reported.trusted,
            reported.refuted,
            rounded(reported.others_per_second, 3),
        ),
    )


def in_words(pool: PoolStatus, upstream: UpstreamStatus, now: float) -> str:
    """Return a sentence that says why this model's requests wait."""
    waiting = sum(pool.waiting.values()) if pool.upstreams[0] is upstream else 0
    circuit, in_flight = upstream.circuit, upstream.concurrency.in_flight
    if circuit.state:
        next_at = circuit.next_at or now
        probe = "a probe is out" if upstream.probing else f"next probe in {max(next_at - now, 0.0):.1f} s"
        return f"on hold for {duration(now - circuit.since)} ({circuit.state}: {circuit.why}); {probe}"
    if not waiting:
        return f"nothing waits, {in_flight} in flight" if in_flight else "idle"
    match pool.cause:
        case "request_rate":
            what = _rate_in_words(upstream.requests, "requests", now)
        case "token_rate":
            what = _rate_in_words(upstream.tokens, "tokens", now)
        case "growth":
            what = "the provider's rule on how quickly traffic may grow"
        case "concurrency":
            what = f"one of the {upstream.concurrency.pace} permits, {in_flight} are in flight"
        case _:
            what = "their turn"
    return f"{waiting} {'waits' if waiting == 1 else 'wait'} for {what}"


def _rate_in_words(gate: GateStatus, unit: str, now: float) -> str:
    pace = "any" if gate.pace is None else number(gate.pace)
    if gate.limit is None:
        return f"their pace, {pace} {unit}/s: the provider's limit is not known yet"
    return (
        f"the provider's {unit.removesuffix('s')} limit: {number(gate.limit)} {unit}/s, "
        f"learned {duration(now - gate.since)} ago, paced at {pace}"
    )
