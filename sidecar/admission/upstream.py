"""One account and model at one provider (or in process): its gates, and the learned limits and latencies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, inf
from random import Random
from types import TracebackType
from typing import Any
from weakref import proxy

from sidecar.admission.gates.base import Ahead, Change, Gate, GateStatus, Verdict
from sidecar.admission.gates.circuit import Circuit, CircuitState
from sidecar.admission.gates.concurrency import MAX_CONCURRENCY, ConcurrencyGate
from sidecar.admission.gates.growth import GrowthGate
from sidecar.admission.gates.rate import RateGate
from sidecar.admission.gates.rise import RiseGate
from sidecar.admission.gates.token_cost import TokenCost
from sidecar.admission.learning.learner import UNKNOWN, Learner, Recovery, Remembered
from sidecar.admission.learning.policer import Sent
from sidecar.admission.learning.policer_learner import PolicerLearner
from sidecar.admission.learning.reported import ReportedLimit
from sidecar.admission.learning.tuning import ESTIMATE_UNSUREST
from sidecar.admission.learning.wordless import Load, Reading, WordlessLimit
from sidecar.admission.own_fault import OwnFault
from sidecar.admission.suspects import Suspects
from sidecar.admission.ticket import Cause, Ticket

#: After an outage the pace begins at this share of the learned limit.
OUTAGE_SHARE = 0.4
#: While no limit is known, or only guessed, `throughput` counts this share of the pace, or the accepted rate if that is
#: higher.
UNTRIED_SHARE = 0.25
#: Assumed seconds per answer until the first answer is known.
USUAL_SECONDS = 1.0
#: The circuit opens after this many refusals in a row that are blamed on growth or concurrency. A refusal continues the
#: row only if the refused attempt was the first one that started after the previous refusal was known.
MAX_REFUSED_IN_ROW = 2
#: Number of send times that the growth gate may keep while dormant. Above it, old ones are deleted.
MAX_REMEMBERED = 4096
#: An attempt without a byte is stopped after PATIENCE_P99S times the 99th percentile of the answer times. While fewer
#: than PATIENCE_ANSWERS answers are known: after half of the request's time. Never before MIN_PATIENCE_SECONDS.
PATIENCE_P99S, MIN_PATIENCE_SECONDS, PATIENCE_ANSWERS = 3.0, 5.0, 20
#: While no answer time is known, an attempt that waited for less than this many seconds shows no outage: its caller
#: allowed too little time for most answers.
UNKNOWN_PATIENCE_SECONDS = 1.0


_FULL: tuple[float, Cause] = inf, "concurrency"


class Permit:
    """The right to have one attempt in flight. Call `report` once with the verdict of the attempt.

    Use it as `with await admission.permit(ticket) as permit:`. If there is no verdict (for example because the caller
    left), the end of the block reports `abandoned`. The attempt still counts as sent, because the provider may have
    received it.
    """

    __slots__ = ("_on_end", "_reservations", "load", "number", "own_fault", "reading", "sent_at", "ticket", "upstream")

    def __init__(
        self,
        upstream: Upstream,
        ticket: Ticket,
        now: float,
        reservations: tuple[Any, ...],
        on_end: Callable[[Permit], None],
    ) -> None:
        self.upstream = upstream
        self.ticket = ticket
        self.sent_at = now
        self.number = upstream.started
        """Sequence number of the attempt at this upstream, starting at 1."""
        self.load: Load | None = None
        """The load at the start, recorded only while failures could be refusals without words."""
        self.reading: Reading | None = None
        """How the attempt's 5xx was read; None if there was none, or if it named its reason."""
        self.own_fault = False
        """True: the attempt failed or was refused because of its request or its key, as the answers to others show."""
        self._reservations: tuple[Any, ...] | None = reservations
        self._on_end = on_end

    def __repr__(self) -> str:
        return f"<Permit {'held' if self._reservations else 'settled'} {self.ticket!r}>"

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reservations is not None:
            self.release(self.upstream.clock())

    def report(self, verdict: Verdict) -> None:
        """Settle all reservations, so that the next ticket can start. A second call does nothing."""
        reservations, self._reservations = self._reservations, None
        if reservations is not None:
            self.upstream.settle(self, reservations, verdict)
            self._on_end(self)

    def read_failure(self, now: float) -> Reading:
        """Return how to read the attempt's 5xx that named no limit: a limit may have refused it without words.

        Call it before `report`, and report `refused` if it says so.
        """
        self.reading = self.upstream.read_failure(self, now)
        return self.reading

    def release(self, now: float) -> None:
        """End an attempt that has no verdict, as abandoned. Does nothing if the verdict was reported."""
        if self._reservations is not None:
            self.report(Verdict("abandoned", now))


@dataclass(frozen=True, slots=True)
class UpstreamStatus:
    """State for metrics, status page and log. Rates are per second, times are on the event loop's clock."""

    name: str
    model: str
    requests: GateStatus
    tokens: GateStatus
    growth: GateStatus
    concurrency: GateStatus
    circuit: GateStatus
    probing: bool
    """True: the half-open probe is in flight."""
    latency: float
    """Smoothed seconds per answer; 0 until the first answer."""


class Upstream:
    """The gates of one account and model. The first closed gate, in a fixed order, delays a ticket. Never awaits."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        name: str = "",
        model: str = "",
        tier: int = 1,
        requests_per_second: float = inf,
        tokens_per_second: float = inf,
        concurrency: int | None = None,
        refusal_budget: float = 0.005,
        paced: bool = True,
        random: Random | None = None,
        unready_reason: Callable[[], str | None] = lambda: None,
        on_change: Callable[[Change], None] = lambda _: None,
        learner: Callable[..., Learner] = PolicerLearner,
    ) -> None:
        """`paced` False: only concurrency and the circuit delay tickets, for a backend that has no quota.

        `unready_reason` returns why the backend cannot serve at present, or None. `on_change` is called with every
        change of a limit. `learner` creates the learner of each rate.
        """
        now = clock()
        self.clock = clock
        self.name = name
        self.model = model
        self.tier = tier
        self.unready_reason = unready_reason
        self.latency = 0.0
        """Smoothed seconds from the start of an attempt to its accepted verdict."""
        self.on_end: list[Callable[[float], None]] = []
        """Called with the loop time when an attempt ends, so that waiting pools call `admit` again."""
        self._paced = paced
        self._pinned = concurrency is not None
        self.concurrency = ConcurrencyGate(concurrency or MAX_CONCURRENCY, refusal_budget, on_change)
        ceilings = (requests_per_second, tokens_per_second) if paced else (inf, inf)
        self.requests = RateGate(
            now,
            "request_rate",
            learner(now, ceiling=ceilings[0], budget=refusal_budget, dormant=not paced),
            on_change,
        )
        self.tokens = RateGate(
            now,
            "token_rate",
            learner(now, ceiling=ceilings[1], budget=refusal_budget, typical=1000.0, dormant=True),
            on_change,
        )
        self.growth = GrowthGate(on_change)
        self._suspects = Suspects()
        # No gate refers to its upstream. A reference cycle would keep a forgotten model in memory until the garbage
        # collector stops the event loop for it.
        rates = (self.requests, self.tokens)
        upstream = proxy(self)
        self.circuit = Circuit(
            on_close=lambda *what: upstream._on_circuit_closed(*what),  # noqa: PLW0108  its method would be strong
            window_ends=lambda now: _window_ends(now, rates),
            refusal_seconds=lambda: rates[0].learner.refusal_seconds,
            random=(random or Random()).random,  # noqa: S311  jitter, not a secret
            on_change=on_change,
            refused_before=self._suspects.refused_before,
        )
        self.rise = RiseGate(
            cold=paced, refusal_seconds=self.circuit.refusal_seconds, others_fail=self.circuit.others_fail
        )
        paces: list[Gate] = [self.requests, self.growth, self.tokens] if paced else []
        self._gates: list[Gate] = [self.concurrency, *paces]
        self.wordless = WordlessLimit()
        self._limit_without_words = False  # True: the learned request rate comes only from refusals without words
        self._paces: list[Gate] = [self.rise, *paces]  # the gates that `opening` asks last, in this order
        self._latencies: deque[float] = deque(maxlen=64)
        self._answers = 0
        self._accepted_at = -inf  # time of the latest accepted verdict
        self.exists = False
        """Whether a request got an answer, and not only an error about the request: then the model exists."""
        self.last_good = -inf
        """Send time of the newest accepted attempt, as loop time; -inf: none yet."""
        self._p90 = self._p99 = 0.0  # percentiles of `_latencies`; the 99th percentile is their maximum
        self._cost = TokenCost()
        self._counted_after: float | None = None  # smoothed seconds until the provider counts an attempt, if it says so
        self._delayed_by: Cause | None = None  # the gate that delays the next attempt; each start resets it to None
        self.started = 0
        """Number of attempts so far."""
        # For refusals blamed on growth or concurrency. `_started_before`: the number of attempts that had started when
        # the last refusal arrived. `_first_sent_at`: when the first attempt after that started (inf: none yet).
        # `_refused_in_row`: how many times in a row the first attempt after a refusal was refused too. The refusals of
        # attempts that were sent at the same time arrive in any order, so any of them counts as the first.
        self._started_before = 0
        self._first_sent_at = inf
        self._refused_in_row = 0
        self._own_fault = OwnFault(now)

    def __repr__(self) -> str:
        learners = f"{self.requests.learner!r} {self.tokens.learner!r}"
        return f"<Upstream {self.name} {self.model!r} {self.concurrency!r} {self.circuit!r} {learners}>"

    # -- may a ticket start? -------------------------------------------------------------------------------------------

    def opening(self, now: float, ticket: Ticket) -> tuple[float, Cause | None]:
        """Return the loop time when the ticket may start here, and the gate that delays it (None: it may start now).

        inf: the gate opens only after an event, for example the end of an attempt.
        """
        circuit = self.circuit
        if circuit.state is not None:
            circuit.advance(now)  # may close the circuit
        if circuit.state is not None:
            at = max(circuit.opens_for(now, ticket.key), self.requests.probe_opens_at(now))
            return (at, "hold") if at > now else (now, None)  # the probe passes every other gate
        permits = self.concurrency  # its `opens_at`, copied here: several full upstreams are asked for each ticket
        if permits.in_flight >= permits.size or permits.in_flight >= permits.learned + permits.step:
            return _FULL
        for gate in self._paces:
            if not gate.dormant:
                gate.advance(now)
                at = gate.opens_at(now, self.cost(ticket) if gate is self.tokens else 1.0)
                if at > now:
                    return at, gate.name
        return now, None

    def goes_last(self, now: float) -> bool:
        """Return True if another ticket shows more about the provider than one that had a setback.

        While the load rises, they take turns.
        """
        return self.circuit.state is not None or (not self.rise.dormant and self.started % 4 > 0)

    def is_suspect(self, now: float, key: str) -> bool:
        """Return True if a request of this key was refused or failed before, and none was accepted since."""
        return self._suspects.refused_before(key, now)

    def note_delay(self, cause: Cause | None) -> None:
        """Note the gate that delays the next attempt; None: no ticket waits for this upstream."""
        self._delayed_by = cause

    def cost(self, ticket: Ticket) -> float:
        """Return the estimated LLM tokens of the ticket: its input and an answer of average length.

        At least 1: without a cost, no token rate could be measured.
        """
        return max(ticket.tokens * self._cost.correction + self._cost.output, 1.0)  # `TokenCost.of`

    # -- an attempt ----------------------------------------------------------------------------------------------------

    def start(self, now: float, ticket: Ticket, on_end: Callable[[Permit], None]) -> Permit:
        """Start one attempt: reserve it at every gate and return its permit. `on_end` is called when it has ended."""
        ticket.attempts += 1
        self.started += 1
        if self._first_sent_at == inf:
            self._first_sent_at = now
        held, self._delayed_by = self._delayed_by, None
        growth = self.growth
        if self.circuit.state is not None:
            self.circuit.reserve(now, ticket, 0.0, held=False)
        elif not self.rise.dormant:
            self.rise.reserve(now, ticket, 0.0, held=False)
        in_flight = self.concurrency.reserve(now, ticket, 0.0, held=held == "concurrency")
        if not self._paced:
            return Permit(self, ticket, now, (in_flight,), on_end)
        cost = self.cost(ticket)
        # The typical cost of an attempt: until the first answer, the mean of the attempts in flight; afterwards a
        # moving average (weight 0.05).
        self.tokens.learner.usual(cost, 0.05 if self._answers else 1.0 / self.concurrency.in_flight)
        requests = self.requests.reserve(now, ticket, 1.0, held=held == "request_rate")
        if not growth.dormant:
            growth.reserve(now, ticket, 1.0, held=held == "growth")
        else:
            growth.log.append(now)
            if len(growth.log) > MAX_REMEMBERED:
                growth.trim(now)
        tokens = self.tokens.reserve(now, ticket, cost, held=held == "token_rate")
        permit = Permit(self, ticket, now, (in_flight, requests, now, tokens), on_end)
        if self.wordless.awake:
            permit.load = self.wordless.sent(now, self.concurrency.in_flight - 1)
        return permit

    def read_failure(self, permit: Permit, now: float) -> Reading:
        """See `Permit.read_failure`. A backend that has no quota never refuses."""
        if not self._paced:
            return "failed"
        was_sure = self.wordless.sure
        reading = self.wordless.failed(
            now,
            permit.ticket,
            sent_at=permit.sent_at,
            number=permit.number,
            load=permit.load,
            answer_seconds=self.latency,
            answers=self._answers,
        )
        if self.wordless.sure and not was_sure and self.requests.learner.limit == inf:
            # The learner did not see the refusals so far. So it begins with what was accepted beside them.
            accepted = self.wordless.accepted_per_second(now)
            known = Remembered(accepted, 1.0, ESTIMATE_UNSUREST, "failures that come when more is sent")
            self.requests.resume(now, known)
            self._limit_without_words = True
        elif was_sure and not self.wordless.sure and self._limit_without_words:
            self.requests.resume(now, UNKNOWN)
            self._limit_without_words = False
        return reading

    def settle(self, permit: Permit, reservations: tuple[Any, ...], verdict: Verdict) -> None:
        """Report the verdict of an ended attempt to every gate. Called once for each attempt."""
        now, ticket = verdict.at, permit.ticket
        if verdict.outcome == "timed_out" and not self._is_silent(permit, now):
            verdict = verdict._replace(outcome="abandoned")
        if verdict.counted_at is not None and self._paced:
            self._note_counted(permit, reservations, verdict.counted_at - permit.sent_at)
        if verdict.limits and self._paced:
            self._note_limits(now, reservations, verdict.limits)
        may_be_limit = permit.reading == "undecided" and self.wordless.is_likely
        if verdict.outcome in ("failed", "refused", "account") and not may_be_limit:
            named = permit.reading is None and verdict.outcome != "failed"
            if self._suspects.unanswered(now, ticket, self.started, refused=named):
                permit.own_fault = permit.reading in (None, "failed")
                verdict = verdict._replace(outcome="abandoned")
                if self._suspects.is_only_teacher(now, ticket.key):
                    self._forget_limits(now)
            elif verdict.outcome == "refused" and verdict.named != "capacity":
                self._suspects.taught(ticket.key)
        if not self.rise.dormant:
            self.rise.settle(now, ticket, verdict, blamed=None)
        if verdict.outcome == "accepted":
            self.circuit.settle(now, ticket, verdict, blamed=None)  # first: the rates may learn from an accepted probe
            for gate, reservation in zip(self._gates, reservations, strict=True):
                gate.settle(now, reservation, verdict, blamed=None)
            self._answered(now, permit, verdict)
            if self.requests.limit_forgotten or self.tokens.limit_forgotten:
                self.requests.limit_forgotten = self.tokens.limit_forgotten = False
                self.rise.start(permit.sent_at)
            return
        self._own_fault.unanswered(now, ticket)
        blamed = None
        if verdict.outcome == "refused":
            blamed = self._blamed(now, reservations, verdict)
            self._limit_without_words = self._limit_without_words and permit.reading is not None
        for gate, reservation in zip(self._gates, reservations, strict=True):
            gate.settle(now, reservation, verdict, blamed=blamed)
        self.circuit.settle(now, ticket, verdict, blamed=blamed)  # last: it may open because of what the rates learned
        if self.concurrency.discovered:
            # The refusals came from a concurrency limit, so the learned request rate was not a limit.
            self.requests.resume(now, UNKNOWN if self._limit_without_words else 1.0)
            self._limit_without_words = False
        if blamed in ("request_rate", "token_rate"):
            nothing_accepted = (self.requests if blamed == "request_rate" else self.tokens).refuses_everything
        else:
            nothing_accepted = blamed in ("growth", "concurrency") and self._nothing_accepted(permit)
        if nothing_accepted:
            self.circuit.open(now, CircuitState.BLACKOUT, verdict.reason, verdict.retry_after)
        if verdict.limits and self.circuit.state is CircuitState.BLACKOUT:
            self._delay_probe(now)

    def _forget_limits(self, now: float) -> None:
        """Forget all learned limits, because the refusals that taught them had another cause."""
        self.concurrency.forget(now)
        for gate in (self.requests, self.tokens):
            if gate.learner.limit < inf:
                gate.resume(now, UNKNOWN)

    def _note_counted(self, permit: Permit, reservations: tuple[Any, ...], seconds: float) -> None:
        """Note that the provider counted an attempt `seconds` after it was sent.

        Only the difference from the usual time counts, so that calls in flight can be compared with it, and a wrong
        clock does no harm.
        """
        if self._counted_after is None:
            self._counted_after = seconds
        later = seconds - self._counted_after
        self._counted_after += 0.1 * later
        for one in reservations:
            if isinstance(one, Sent):
                one.counted_at = permit.sent_at + later

    def _note_limits(self, now: float, reservations: tuple[Any, ...], limits: tuple[ReportedLimit, ...]) -> None:
        """Pass the limits that an answer's headers report to the gates of the rates."""
        for limit in limits:
            for gate, reservation in zip(self._gates, reservations, strict=True):
                if isinstance(gate, RateGate) and gate.name == limit.dimension:
                    gate.note_limit(now, reservation, limit)

    def _delay_probe(self, now: float) -> None:
        """Let the next probe wait for the end of a window that is used up, as trusted headers report it."""
        for gate in (self.requests, self.tokens):
            if gate.reported is not None:
                self.circuit.next_probe = max(self.circuit.next_probe, gate.reported.closed_until(now))

    def lone_token_refusals(self, permit: Permit) -> int:
        """Return how many times in a row this ticket was refused for LLM tokens while nothing else was sent.

        Call it for each such refusal, before its verdict is reported. 0: something else was sent within a minute, or
        the circuit is open, so this request may be smaller than the limit.
        """
        now, ticket = self.clock(), permit.ticket
        self._own_fault.unanswered(now, ticket)
        if self.concurrency.in_flight > 1 or self.circuit.state is not None:
            return 0
        return self._own_fault.refused(permit.sent_at, ticket, self._accepted_at)

    def _is_silent(self, permit: Permit, now: float) -> bool:
        """Return True if an attempt without a byte means an outage, and not only that its caller allowed little time.

        The attempt waited much longer than the known answers took, and no attempt was accepted since it was sent.
        """
        patience = PATIENCE_P99S * self._p99 or UNKNOWN_PATIENCE_SECONDS
        return permit.sent_at >= self._accepted_at and now - permit.sent_at >= patience

    def _nothing_accepted(self, refused: Permit) -> bool:
        """Return True if the first attempt after each of the latest refusals was refused too.

        Then the provider accepts nothing, and only single probes may be sent.
        """
        if refused.number <= self._started_before:  # this attempt started before the last refusal was known
            return False
        self._refused_in_row = self._refused_in_row + 1 if refused.sent_at <= self._first_sent_at else 0
        self._started_before, self._first_sent_at = self.started, inf
        return self._refused_in_row >= MAX_REFUSED_IN_ROW

    def _blamed(self, now: float, reservations: tuple[Any, ...], verdict: Verdict) -> Cause | None:
        """Return the cause of a refusal: the limit that it names, unless another limit explains it better.

        None: the refusal is for capacity, so no gate learns a limit from it.
        """
        named = verdict.named
        if named == "capacity" or named == "quota_period" or named == "unauthorized":  # noqa: PLR1714  `in` would not narrow
            return None
        if not self._paced or self.circuit.state is not None:
            return "hold"
        if named in (None, "request_rate") and self.concurrency.explains(reservations[0]):
            return "concurrency"
        if named is None:
            # The rate with the highest use of its own limit. While nothing is known: the request rate.
            by_tokens = self.tokens.learner.use(now) > self.requests.learner.use(now)
            return "token_rate" if by_tokens else "request_rate"
        return named

    def _answered(self, now: float, permit: Permit, verdict: Verdict) -> None:
        self._accepted_at = now
        self._suspects.accepted(now, permit.ticket, permit.number)
        if self.wordless.awake:
            self.wordless.accepted(permit.ticket)
        self.last_good = max(self.last_good, permit.sent_at)
        self.exists = self.exists or not verdict.reason
        if permit.number > self._started_before:
            self._refused_in_row = 0
        if self._paced and verdict.usage is not None:
            self._cost.learn(permit.ticket.tokens, *verdict.usage)
        seconds = now - permit.sent_at
        self.latency += (0.1 if self._latencies else 1.0) * (seconds - self.latency)
        self.concurrency.answer_seconds = self.rise.answer_seconds = self.latency
        self._latencies.append(seconds)
        self._answers += 1
        if self._answers % 16 == 1:
            ordered = sorted(self._latencies)
            self._p90, self._p99 = ordered[int(len(ordered) * 0.9)], ordered[-1]
        if self._pinned:
            return
        # Permits for the pace: 2 x pace x p90 latency (Little's law with a margin of 2), at least 8.
        if self.requests.learner.limit == inf:
            self.concurrency.size = MAX_CONCURRENCY
        else:
            pace = self.requests.learner.pace(now)
            self.concurrency.size = min(max(ceil(2 * pace * self._p90), 8), MAX_CONCURRENCY)

    def _on_circuit_closed(self, now: float, state: CircuitState, recovery: Recovery) -> None:
        self.rise.start(recovery.probed_at)
        if state is CircuitState.BLACKOUT:
            self.concurrency.forget_guess(now)
            for gate in (self.requests, self.tokens):
                if gate.learner.limit < inf:
                    gate.resume(now, recovery)
                    self.circuit.ends_by_itself = gate.learner.windowed
        elif state is CircuitState.QUOTA:
            self.concurrency.forget_guess(now)
            for gate in (self.requests, self.tokens):
                if gate.learner.limit < inf and not gate.learner.certain:
                    gate.resume(now, UNKNOWN)  # it was learned from refusals because of the quota
        elif state is CircuitState.OUTAGE or self.requests.learner.limit == inf:
            self.requests.resume(now, OUTAGE_SHARE)

    @property
    def has_answered(self) -> bool:
        """True after the first answer. From then on, failures mean an outage; before, the address may be wrong."""
        return self.last_good > -inf

    # -- looking ahead -------------------------------------------------------------------------------------------------

    @property
    def unavailable(self) -> bool:
        """True if the provider cannot answer: it is down, has no capacity, or refuses the account.

        A blackout (the provider refuses every call because of a limit) does not count, because its end can be
        predicted.
        """
        return self.circuit.state not in (None, CircuitState.BLACKOUT)

    def seconds_for(self, now: float, ticket: Ticket, requests: float, tokens: float, *, guess: bool = True) -> float:
        """Return the seconds until this ticket could start behind `requests` other requests.

        `tokens`: the estimated input of the others in LLM tokens, in total. The circuit is assumed to be closed.
        `guess=False`: ignore limits that are only guesses.
        """
        cost = 0.0 if self.tokens.dormant else self._cost.of(tokens, requests) + self.cost(ticket)
        ahead = Ahead(requests + 1, cost)
        wait = 0.0
        for gate in self._gates:
            if not gate.dormant:
                wait = max(wait, gate.seconds_for(now, ahead, guess=guess))
        return wait

    def patience(self, ticket: Ticket) -> float:
        """Return the seconds without a byte after which an attempt is stopped or counts as timed out.

        It is stopped if another upstream can take the ticket. Otherwise it runs until its deadline, and then counts as
        timed out.
        """
        if self._answers < PATIENCE_ANSWERS:
            return max(MIN_PATIENCE_SECONDS, (ticket.deadline - ticket.stopwatch.started) / 2)
        return max(MIN_PATIENCE_SECONDS, PATIENCE_P99S * self._p99)

    @property
    def slow_seconds(self) -> float:
        """The 90th percentile of the seconds per answer; 0 until the first answer."""
        return self._p90

    def next_probe_in(self, now: float) -> float:
        """Return the seconds until the next probe; no attempt can start earlier. 0 while the circuit is closed."""
        return 0.0 if self.circuit.refuses_few_keys else max(self.circuit.next_probe - now, 0.0)

    def throughput(self, now: float, ticket: Ticket) -> float:
        """Return how many attempts with the cost of this ticket can certainly start in one second."""
        pace = self.concurrency.allowed / (self.latency or USUAL_SECONDS)
        if not self._paced:
            return pace
        learner = self.requests.learner
        requests = learner.pace(now)
        if learner.limit == inf or learner.guessed:
            requests = max(UNTRIED_SHARE * requests, learner.rate(now))
        return min(pace, requests, self.tokens.learner.pace(now) / self.cost(ticket), self.growth.allowed(now))

    # -- state file and operators --------------------------------------------------------------------------------------

    @property
    def has_learned(self) -> bool:
        """Whether a limit is known: whether `learned` returns any."""
        return min(self.requests.learner.limit, self.tokens.learner.limit, self.concurrency.learned) < inf

    def learned(self) -> dict[str, dict[str, float]]:
        """Return the learned limits to save for a restart, by dimension. Rates are per second.

        `recall` accepts this data.
        """
        known = {}
        for dimension, gate in (("requests", self.requests), ("tokens", self.tokens)):
            rate = gate.learner.snapshot()
            if rate.limit < inf:
                known[dimension] = {"limit": rate.limit, "burst": rate.burst, "uncertainty": rate.error}
        if self.concurrency.learned < inf:
            known["concurrency"] = {"limit": self.concurrency.learned}
        return known

    def recall(self, now: float, learned: Mapping[str, Mapping[str, float]], share: float) -> None:
        """Restore what `learned` returned before a restart, with limits scaled by `share`.

        Raises `KeyError` if the data has another form.
        """
        for dimension, gate in (("requests", self.requests), ("tokens", self.tokens)):
            if dimension in learned:
                rate = learned[dimension]
                gate.resume(now, Remembered(share * rate["limit"], rate["burst"], rate["uncertainty"]))
        if "concurrency" in learned:
            self.concurrency.recall(now, round(share * learned["concurrency"]["limit"]))

    def status(self, now: float) -> UpstreamStatus:
        """Return the present state."""
        return UpstreamStatus(
            self.name,
            self.model,
            self.requests.status(now),
            self.tokens.status(now),
            self.growth.status(now),
            self.concurrency.status(now),
            self.circuit.status(now),
            self.circuit.probing,
            self.latency,
        )


def _window_ends(now: float, rates: tuple[RateGate, RateGate]) -> float:
    """Return the best loop time for the next probe of a used-up window; `now` if no window is used up."""
    for gate in rates:
        if gate.reported is not None and (ends_at := gate.reported.ends_at(now)) > now:
            return ends_at
    return rates[0].learner.window_ends(now)
