"""One account and model at one place: the gates in front of it, and everything that was learned about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, inf
from random import Random
from types import TracebackType
from typing import Any

from sidecar.admission.gates.base import Ahead, Change, Gate, GateStatus, Verdict
from sidecar.admission.gates.circuit import Circuit, CircuitState
from sidecar.admission.gates.concurrency import MAX_CONCURRENCY, ConcurrencyGate
from sidecar.admission.gates.growth import GrowthGate
from sidecar.admission.gates.rate import RateGate
from sidecar.admission.gates.token_cost import TokenCost
from sidecar.admission.learning.learner import Learner, Recovery, Remembered
from sidecar.admission.learning.policer_learner import PolicerLearner
from sidecar.admission.ticket import Cause, Ticket

#: After an outage the pace begins at this share of the learned limit.
OUTAGE_SHARE = 0.4
#: Share of the pace that counts as certain while no limit was met, or while the limit is only a guess.
UNTRIED_SHARE = 0.25
#: Seconds that an answer is taken to last until there was one.
USUAL_SECONDS = 1.0
#: So many refusals in a row, each of the first attempt after the refusal before, open the circuit whatever they name.
MAX_REFUSED_IN_ROW = 2
#: Send times that the growth gate keeps before it forgets old ones.
MAX_REMEMBERED = 4096
#: An attempt without a byte is given up after so many times the 99th percentile of an answer's time, at least so many
#: seconds; while fewer answers than this are known, after half of the request's time.
PATIENCE_P99S, MIN_PATIENCE_SECONDS, PATIENCE_ANSWERS = 3.0, 5.0, 20


class Permit:
    """The right to have one attempt in flight. `report` its verdict once; without one it ends as abandoned.

    To be used as `with await admission.permit(ticket) as permit:`. The end of the block reports an attempt that ended
    without a verdict (its caller left): it was sent all the same, and counts as sent.
    """

    __slots__ = ("_on_end", "_reservations", "number", "sent_at", "ticket", "upstream")

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
        """Its place among the attempts of the upstream, from 1."""
        self._reservations: tuple[Any, ...] | None = reservations
        self._on_end = on_end

    def __repr__(self) -> str:
        return f"<Permit {'held' if self._reservations else 'settled'} {self.ticket!r}>"

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release(self.upstream.clock())

    def report(self, verdict: Verdict) -> None:
        """Settle every reservation, and let the next ticket go. The second time does nothing: the first one counted."""
        reservations, self._reservations = self._reservations, None
        if reservations is not None:
            self.upstream.settle(self, reservations, verdict)
            self._on_end(self)

    def release(self, now: float) -> None:
        """End an attempt that has no verdict."""
        if self._reservations is not None:
            self.report(Verdict("abandoned", now))


@dataclass(frozen=True, slots=True)
class UpstreamStatus:
    """What metrics, page, log, state file and dispatch read. Rates are per second, times on the event loop's clock."""

    name: str
    model: str
    requests: GateStatus
    tokens: GateStatus
    growth: GateStatus
    concurrency: GateStatus
    circuit: GateStatus
    probing: bool
    """The half-open probe is in flight."""
    latency: float
    """Seconds that an answer takes, smoothed; 0 while none is known."""


class Upstream:
    """The gates of one account and model, asked in order: the first closed one holds a ticket. Synchronous."""

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
        ready_reason: Callable[[], str | None] = lambda: None,
        on_change: Callable[[Change], None] = lambda _: None,
        learner: Callable[..., Learner] = PolicerLearner,
    ) -> None:
        """`paced` False: only concurrency and the circuit, for a backend that has no quota.

        `ready_reason` says why the backend cannot serve at present. `on_change` is called with every change of a limit.
        `learner` makes the learner of each rate.
        """
        now = clock()
        self.clock = clock
        self.name = name
        self.model = model
        self.tier = tier
        self.ready_reason = ready_reason
        self.has_answered = False
        """An attempt was answered once: failures are an outage then, and not a wrong address."""
        self.latency = 0.0
        """Smoothed seconds from the start of an attempt to its accepted verdict."""
        self.last_used = now
        self.on_end: list[Callable[[float], None]] = []
        """Called when an attempt has ended: pools that wait for this upstream look again."""
        self._paced = paced
        self._pinned = concurrency is not None
        self.concurrency = ConcurrencyGate(concurrency or MAX_CONCURRENCY, refusal_budget)
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
        self.growth = GrowthGate(refusal_budget)
        self.circuit = Circuit(
            on_close=self._on_circuit_closed,
            window_ends=self.requests.learner.window_ends,
            refusal_seconds=lambda: self.requests.learner.refusal_seconds,
            random=(random or Random()).random,  # noqa: S311  jitter, not a secret
            cold=paced,
            on_change=on_change,
        )
        self._rates: list[Gate] = [self.requests, self.growth, self.tokens] if paced else []
        self._gates: list[Gate] = [self.concurrency, *self._rates]
        self._latencies: deque[float] = deque(maxlen=64)
        self._answers = 0
        self._p90 = self._p99 = 0.0  # of the latencies
        self._cost = TokenCost()
        self._delayed_by: Cause | None = None  # since the last start
        self.started = 0
        """Attempts so far."""
        # Of refusals for growth or concurrency: the attempts that had started at the last one, and how many of those
        # that started first after one were refused in a row.
        self._started_before = 0
        self._refused_in_row = 0

    def __repr__(self) -> str:
        learners = f"{self.requests.learner!r} {self.tokens.learner!r}"
        return f"<Upstream {self.name} {self.model!r} {self.concurrency!r} {self.circuit!r} {learners}>"

    # -- may a ticket go? ----------------------------------------------------------------------------------------------

    def opening(self, now: float, ticket: Ticket) -> tuple[float, Cause | None]:
        """When the ticket may start here (inf: only an event can tell), and the gate that holds it until then."""
        circuit, concurrency = self.circuit, self.concurrency
        if circuit.state is not None:
            circuit.advance(now)  # which may close it
        if circuit.state is not None:
            at = circuit.opens_at(now, 0.0)
            return (at, "hold") if at > now else (now, None)  # the probe passes every other gate
        if concurrency.opens_at(now, 0.0) > now:
            return inf, "concurrency"
        if not circuit.dormant:
            circuit.advance(now)
            if (at := circuit.opens_at(now, 0.0)) > now:
                return at, "hold"
        for gate in self._rates:
            if not gate.dormant:
                gate.advance(now)
                at = gate.opens_at(now, self.cost(ticket) if gate is self.tokens else 1.0)
                if at > now:
                    return at, gate.name
        return now, None

    def note_delay(self, cause: Cause | None) -> None:
        """Note the gate that delays the next attempt."""
        self._delayed_by = cause

    def cost(self, ticket: Ticket) -> float:
        """Return the estimated LLM tokens of the ticket: its input and an answer of average length.

        At least 1: without a cost, no token rate could be measured.
        """
        return max(ticket.tokens * self._cost.correction + self._cost.output, 1.0)  # `TokenCost.of`

    # -- an attempt ----------------------------------------------------------------------------------------------------

    def start(self, now: float, ticket: Ticket, on_end: Callable[[Permit], None]) -> Permit:
        """One attempt goes out."""
        ticket.attempts += 1
        self.started += 1
        held, self._delayed_by = self._delayed_by, None
        circuit, growth = self.circuit, self.growth
        if not circuit.dormant:
            circuit.reserve(now, ticket, 0.0, held=False)
        place = self.concurrency.reserve(now, ticket, 0.0, held=held == "concurrency")
        if not self._paced:
            return Permit(self, ticket, now, (ticket, place), on_end)
        cost = self.cost(ticket)
        # The mean of all until the first answer, and then of the latest.
        self.tokens.learner.usual(cost, 0.05 if self._answers else 1.0 / self.concurrency.in_flight)
        requests = self.requests.reserve(now, ticket, 1.0, held=held == "request_rate")
        if not growth.dormant:
            growth.reserve(now, ticket, 1.0, held=held == "growth")
        else:
            growth.log.append(now)
            if len(growth.log) > MAX_REMEMBERED:
                growth.trim(now)
        tokens = self.tokens.reserve(now, ticket, cost, held=held == "token_rate")
        return Permit(self, ticket, now, (ticket, place, requests, now, tokens), on_end)

    def settle(self, permit: Permit, reservations: tuple[Any, ...], verdict: Verdict) -> None:
        """An attempt ended: tell every gate, once."""
        now = verdict.at
        accepted, refused = verdict.outcome == "accepted", verdict.outcome == "refused"
        blamed = self._blamed(now, reservations, verdict) if refused else None
        # An accepted probe closes the circuit before the rates learn from it; a refused one opens it after they have.
        if accepted:
            self.circuit.settle(now, reservations[0], verdict, blamed=blamed)
        for gate, reservation in zip(self._gates, reservations[1:], strict=True):
            gate.settle(now, reservation, verdict, blamed=blamed)
        if not accepted:
            self.circuit.settle(now, reservations[0], verdict, blamed=blamed)
        if accepted:
            self._answered(now, permit, verdict)
            if self._paced and (self.requests.limit_forgotten or self.tokens.limit_forgotten):
                self.requests.limit_forgotten = self.tokens.limit_forgotten = False
                self.circuit.rise(now)
        elif refused:
            if self.concurrency.discovered:
                self.requests.resume(now, 1.0)  # what was taken for its limit was none
            if blamed in ("request_rate", "token_rate"):
                gate = self.requests if blamed == "request_rate" else self.tokens
                if gate.refuses_everything:
                    self.circuit.open(now, CircuitState.BLACKOUT, verdict.reason, verdict.retry_after)
            elif blamed in ("growth", "concurrency") and self._nothing_accepted(permit):
                self.circuit.open(now, CircuitState.BLACKOUT, verdict.reason, verdict.retry_after)
        self.last_used = now

    def _nothing_accepted(self, refused: Permit) -> bool:
        """Whether the first attempts after the latest refusals were all refused: then only probes help."""
        after = refused.number - self._started_before
        if after <= 0:  # it had started before the last refusal was known
            return False
        self._refused_in_row = self._refused_in_row + 1 if after == 1 else 0
        self._started_before = self.started
        return self._refused_in_row >= MAX_REFUSED_IN_ROW

    def _blamed(self, now: float, reservations: tuple[Any, ...], verdict: Verdict) -> Cause | None:
        """Return the cause of a refusal: the dimension that it names, unless another dimension explains it better."""
        if verdict.named == "capacity":
            return None
        if not self._paced or self.circuit.state is not None:
            return "hold"
        circuit, place, requests, _, tokens = reservations
        del circuit
        if verdict.named in (None, "request_rate") and self.concurrency.explains(now, place) > 0:
            return "concurrency"
        if verdict.named is None:
            # the rate with the highest use of its own limit; requests while nothing is known
            by_tokens = self.tokens.explains(now, tokens)
            return "token_rate" if by_tokens > max(self.requests.explains(now, requests), 0.0) else "request_rate"
        return verdict.named

    def _answered(self, now: float, permit: Permit, verdict: Verdict) -> None:
        self.has_answered = True
        if permit.number > self._started_before:
            self._refused_in_row = 0
        if self._paced and verdict.usage is not None:
            self._cost.learn(permit.ticket.tokens, *verdict.usage)
        seconds = now - permit.sent_at
        self.latency += (0.1 if self._latencies else 1.0) * (seconds - self.latency)
        self.concurrency.answer_seconds = self.circuit.answer_seconds = self.latency
        self._latencies.append(seconds)
        self._answers += 1
        if self._answers % 16 == 1:
            ordered = sorted(self._latencies)
            self._p90, self._p99 = ordered[int(len(ordered) * 0.9)], ordered[-1]
        if self._pinned:
            return
        # Enough for the pace: 2 x pace x p90 latency (Little's law with room), at least 8.
        if self.requests.learner.limit == inf:
            self.concurrency.size = MAX_CONCURRENCY
        else:
            pace = self.requests.learner.pace(now)
            self.concurrency.size = min(max(ceil(2 * pace * self._p90), 8), MAX_CONCURRENCY)

    def _on_circuit_closed(self, now: float, state: CircuitState, recovery: Recovery) -> None:
        if state is CircuitState.BLACKOUT:
            for gate in (self.requests, self.tokens):
                if gate.learner.limit < inf:
                    gate.resume(now, recovery)
                    self.circuit.ends_by_itself = gate.learner.windowed
        elif state is CircuitState.OUTAGE or self.requests.learner.limit == inf:
            self.requests.resume(now, OUTAGE_SHARE)

    # -- looking ahead -------------------------------------------------------------------------------------------------

    @property
    def unavailable(self) -> bool:
        """The provider cannot answer: it is down, has no room, or refuses the account.

        A blackout (it refuses every call because of a limit) does not count: it ends, and the wait can be predicted.
        """
        return self.circuit.state not in (None, CircuitState.BLACKOUT)

    def seconds_for(self, now: float, ticket: Ticket, requests: float, tokens: float, *, guess: bool = True) -> float:
        """Seconds until this ticket could start behind so many others, of so many LLM tokens as tickets tell them.

        The circuit is taken to be closed. `guess` False: limits that are only a guess are left out.
        """
        cost = self._cost.of(tokens, requests) + self.cost(ticket) if self._paced else 0.0
        ahead = Ahead(requests + 1, cost)
        wait = 0.0
        for gate in self._gates:
            if guess or gate.certain:
                wait = max(wait, gate.seconds_for(now, ahead))
        return wait

    def patience(self, ticket: Ticket) -> float:
        """Seconds after which an attempt without a byte is given up, or counts as one that got no answer."""
        if self._answers < PATIENCE_ANSWERS:
            return max(MIN_PATIENCE_SECONDS, (ticket.deadline - ticket.stopwatch.started) / 2)
        return max(MIN_PATIENCE_SECONDS, PATIENCE_P99S * self._p99)

    @property
    def slow_seconds(self) -> float:
        """The 90th percentile of the seconds that its answers take; 0 while none is known."""
        return self._p90

    def next_probe_in(self, now: float) -> float:
        """Return the seconds until the next probe, before which no attempt can start; 0 while admission is open."""
        return max(self.circuit.next_probe - now, 0.0) if self.circuit.state is not None else 0.0

    def throughput(self, now: float, ticket: Ticket) -> float:
        """Return the rate in attempts/s, each like this ticket, that can certainly start."""
        pace = self.concurrency.allowed / (self.latency or USUAL_SECONDS)
        if not self._paced:
            return pace
        learner = self.requests.learner
        requests = learner.pace(now)
        if learner.limit == inf or learner.guessed:
            requests = max(UNTRIED_SHARE * requests, learner.rate(now))
        return min(pace, requests, self.tokens.learner.pace(now) / self.cost(ticket), self.growth.allowed(now))

    # -- state file and operators --------------------------------------------------------------------------------------

    def learned(self) -> dict[str, dict[str, float]]:
        """What is worth remembering over a restart, by dimension. Rates are per second."""
        known = {}
        for dimension, gate in (("requests", self.requests), ("tokens", self.tokens)):
            one = gate.learner.snapshot()
            if one.limit < inf:
                known[dimension] = {"limit": one.limit, "burst": one.burst, "uncertainty": one.error}
        if self.concurrency.learned < inf:
            known["concurrency"] = {"limit": self.concurrency.learned}
        return known

    def recall(self, now: float, learned: Mapping[str, Mapping[str, float]], share: float) -> None:
        """Restore what `learned` returned before a restart, with limits scaled by `share`.

        Raises `KeyError` if the data has another form.
        """
        for dimension, gate in (("requests", self.requests), ("tokens", self.tokens)):
            if dimension in learned:
                one = learned[dimension]
                gate.resume(now, Remembered(share * one["limit"], one["burst"], one["uncertainty"]))
        if "concurrency" in learned:
            self.concurrency.learned = max(round(share * learned["concurrency"]["limit"]), 1)

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
