"""Everything that can hold a request of one account and model back, and everything learned about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import ceil, inf
from random import Random
from typing import Any

from sidecar.admission.attempts import Attempt, InFlight
from sidecar.admission.gates.circuit import Hold, HoldKind
from sidecar.admission.gates.concurrency import Permits
from sidecar.admission.gates.growth import GrowthGovernor
from sidecar.admission.gates.token_cost import TokenCost
from sidecar.admission.learning.learner import RateController
from sidecar.admission.learning.states import State
from sidecar.admission.ticket import Cause, Ticket

#: Consecutive failures (5xx, broken connections) that mean the provider is down, and of how many requests they must be:
#: one request that breaks the provider each time is not an outage.
OUTAGE_FAILURES, OUTAGE_TICKETS = 6, 2
#: Requests that have failed in a row, none answered between, from which on failing is the provider's doing.
FAILING_TICKETS = 2
#: After an outage the pace begins at this share of the learned limit.
OUTAGE_SHARE = 0.4
#: A probe that was not refused within this many seconds, and thrice the usual time of a refusal, was taken.
PATIENCE_SECONDS = 0.5
MAX_CONCURRENCY = 1024
#: The share that is sure of a pace at which no limit was met yet, or but one that is guessed.
UNTRIED_SHARE = 0.25
#: An answer is taken to last so many seconds until there was one.
USUAL_SECONDS = 1.0


class Limits:
    """The gates in front of one account and model. Synchronous; every call takes `now`, nothing is scheduled."""

    def __init__(
        self,
        now: float,
        *,
        requests_per_second: float = inf,
        tokens_per_second: float = inf,
        concurrency: int | None = None,
        refusal_budget: float = 0.005,
        paced: bool = True,
        random: Random | None = None,
    ) -> None:
        """`paced` False: only permits and holds, for a backend that has no quota."""
        self._paced = paced
        self._pinned = concurrency is not None
        self._random = (random or Random()).random  # noqa: S311  jitter, not a secret
        self.permits = Permits(concurrency or MAX_CONCURRENCY, refusal_budget)
        self.hold = Hold()
        self.requests = RateController(
            now, ceiling=requests_per_second if paced else inf, budget=refusal_budget, dormant=not paced
        )
        self.tokens = RateController(
            now, ceiling=tokens_per_second if paced else inf, budget=refusal_budget, typical=1000.0, dormant=True
        )
        self.growth = GrowthGovernor(refusal_budget)
        self.latency = 0.0
        """Seconds that an answer takes, smoothed."""
        self._latencies: deque[float] = deque(maxlen=64)
        self._answers = 0
        self._p90 = 0.0  # of the latencies
        self._in_flight = InFlight()
        self._failures = 0
        self._failed: set[Ticket] = set()
        self._probe: Attempt | None = None
        self._cost = TokenCost()

    # -- the gates -----------------------------------------------------------------------------------------------------

    def closed(self, now: float, ticket: Ticket) -> tuple[Cause | None, float]:
        """The gate that keeps this ticket from starting now and when time alone opens it (inf: an event must)."""
        hold = self.hold
        if hold.kind is not None:
            if hold.probing and self._patience(now) <= 0:
                self._opened(now)
            elif hold.may_probe(now):
                return None, now
            else:
                return "hold", now + self._patience(now) if hold.probing else hold.next_probe
        if not self.permits.free:
            return "concurrency", inf
        if not self._paced:
            return None, now
        wait = self.requests.wait(now, 1.0)
        if wait > 0:
            return "request_rate", now + wait
        wait = self.growth.wait(now)
        if wait > 0:
            return "growth", now + wait
        if not self.tokens.unpaced:
            wait = self.tokens.wait(now, self.cost(ticket))
            if wait > 0:
                return "token_rate", now + wait
        return None, now

    def cost(self, ticket: Ticket) -> float:
        """LLM tokens that the ticket will take: its input as far as it can be told, and an answer of usual length.

        At least 1: of what costs nothing, no rate can be told.
        """
        return max(self._cost.of(ticket.tokens), 1.0)

    def start(self, now: float, ticket: Ticket, bound: Cause | None) -> Attempt:
        """One attempt goes out. `bound` is the gate that held the queue since the last one; None if none did."""
        attempt = Attempt(ticket, now, self.permits.take(), bound, self.hold.kind is not None)
        self._in_flight.add(attempt)
        if attempt.probe:
            self.hold.probing = True
            self._probe = attempt
        if self._paced:
            attempt.requests = self.requests.sent(now, 1.0, bound == "request_rate")
            self.growth.sent(now, bound == "growth")
            cost = self.cost(ticket)
            share = 0.05 if self._answers else 1.0 / self.permits.in_flight  # the mean of all until the first answer
            usual = self.tokens.estimate
            usual.typical += share * (cost - usual.typical)
            attempt.tokens = self.tokens.sent(now, cost, bound == "token_rate")
        return attempt

    def held(self, now: float) -> float:
        """Seconds for which nothing can start, as far as is known."""
        return max(self.hold.next_probe - now, 0.0) if self.hold.kind is not None else 0.0

    def seconds_for(self, now: float, ticket: Ticket, requests: float, tokens: float) -> float:
        """Seconds until this ticket could start behind so many others, of so many LLM tokens as tickets tell them."""
        wait = 0.0
        if self._paced:
            cost = self._cost.of(tokens, requests) + self.cost(ticket)
            wait = max(
                self.requests.seconds_for(now, requests + 1),
                self.growth.seconds_for(now, requests + 1),
                self.tokens.seconds_for(now, cost),
            )
        if self.latency > 0:  # permits come back at this rate
            missing = requests + 1 - (self.permits.allowed - self.permits.in_flight)
            wait = max(wait, missing * self.latency / self.permits.allowed)
        return wait

    def throughput(self, now: float, ticket: Ticket) -> float:
        """Attempts a second, each like this ticket, that can start for certain."""
        pace = self.permits.allowed / (self.latency or USUAL_SECONDS)
        if not self._paced:
            return pace
        requests = self.requests.pace(now)
        if self.requests.limit == inf or self.requests.guessed:
            requests = max(UNTRIED_SHARE * requests, self.requests.rate(now))
        return min(pace, requests, self.tokens.pace(now) / self.cost(ticket), self.growth.allowed(now))

    @property
    def failing(self) -> bool:
        """The provider fails request after request: none of them is to blame."""
        return self.hold.kind is not None or len(self._failed) >= FAILING_TICKETS

    # -- verdicts ------------------------------------------------------------------------------------------------------

    def accepted(self, attempt: Attempt, now: float, usage: tuple[int, int] | None = None) -> None:
        """The provider took the attempt. `usage` are the LLM tokens that it counted, of input and output."""
        attempt.told = True
        self._failures = 0
        self._failed.clear()
        if attempt is self._probe:
            self._opened(now)
        if attempt.beside < self.permits.learned or self._in_flight.was_surely_beside(attempt, self.permits.learned):
            self.permits.accepted(attempt.beside, attempt.bound == "concurrency")
        if attempt.requests is not None:
            self.requests.accepted(now, attempt.requests)
        if attempt.tokens is not None:
            self.tokens.accepted(now, attempt.tokens)
            if usage is not None:  # put what it cost in the place of what was reserved, and reserve better
                self.tokens.settle(now, attempt.tokens, max(float(sum(usage)), 1.0))
                self._cost.counted(attempt.ticket.tokens, *usage)
        seconds = now - attempt.started
        self.latency += (0.1 if self._latencies else 1.0) * (seconds - self.latency)
        self._latencies.append(seconds)
        self._answers += 1
        if self._answers % 16 == 1:
            self._p90 = sorted(self._latencies)[int(len(self._latencies) * 0.9)]
        self._size_permits(now)

    def throttled(self, attempt: Attempt, now: float, kind: str, reason: str, retry_after: float | None = None) -> None:
        """The provider refused the attempt because of a limit of this kind (`backends.base.ThrottleKind`)."""
        attempt.told = True
        self._failures = 0
        self._failed.clear()
        self._in_flight.was_not_there(attempt)
        if kind == "capacity":
            if attempt is self._probe or self.hold.kind is None:
                self._close(now, HoldKind.CAPACITY, reason, retry_after)
            else:
                self.hold.heard(now, retry_after)
            self._void(attempt, now)
            return
        if attempt.requests is None or attempt.tokens is None:
            return
        if self.hold.kind is not None:  # the probe, or what was sent before everything was refused
            self.requests.refused_too(now, attempt.requests)
            self.tokens.refused_too(now, attempt.tokens)
            if attempt is self._probe:
                self._close(now, self.hold.kind, reason, retry_after)
            else:
                self.hold.heard(now, retry_after)
            return
        named = self._dimension(attempt, now, kind)
        if named == "growth":
            self.growth.refused(now, attempt.started)
        elif named == "concurrency":
            self.permits.refused(now, attempt.started, attempt.beside)
        barren = False
        for dimension, controller, sent in (
            ("request_rate", self.requests, attempt.requests),
            ("token_rate", self.tokens, attempt.tokens),
        ):
            if dimension == named:
                barren = controller.refused(now, sent)
            else:
                controller.void(now, sent)
        if barren:
            self._close(now, HoldKind.BLACKOUT, reason, retry_after)

    def failed(self, attempt: Attempt, now: float, reason: str) -> None:
        """The provider failed, or could not be reached."""
        attempt.told = True
        self._failures += 1
        self._failed.add(attempt.ticket)
        self._void(attempt, now)
        down = self._failures >= OUTAGE_FAILURES and len(self._failed) >= OUTAGE_TICKETS
        if attempt is self._probe or (self.hold.kind is None and down):
            self._close(now, HoldKind.OUTAGE, reason)

    def account_refused(self, attempt: Attempt, now: float, reason: str) -> None:
        """The provider refuses the account (billing)."""
        attempt.told = True
        self._void(attempt, now)
        self._close(now, HoldKind.BILLING, reason)

    def ended(self, attempt: Attempt, now: float) -> None:
        """The attempt is over, whatever it said: its permit is free."""
        self.permits.give_back()
        self._in_flight.remove(attempt)
        if not attempt.told:
            self._void(attempt, now)
        if attempt is self._probe:  # without a verdict: its caller left
            self._probe = None
            self.hold.probing = False

    # -- what follows --------------------------------------------------------------------------------------------------

    def _dimension(self, attempt: Attempt, now: float, kind: str) -> str:
        """What a refusal is booked to: what it names, unless something else explains it better."""
        if kind in {"unknown", "request_rate"}:
            known = self.permits.learned
            if self.latency and self.permits.suspect(now, attempt.started, attempt.beside, self.latency):
                if self.permits.learned < known:
                    self.requests.restart(now, 1.0)  # what was taken for its limit was none
                return "concurrency"
        if kind == "unknown":
            # the dimension with the highest use of its own limit; requests while nothing is known
            used = self.tokens.use(now)
            return "token_rate" if used > 0 and used > self.requests.use(now) else "request_rate"
        return kind

    def _void(self, attempt: Attempt, now: float) -> None:
        if attempt.requests is not None:
            self.requests.void(now, attempt.requests)
        if attempt.tokens is not None:
            self.tokens.void(now, attempt.tokens)

    def _patience(self, now: float) -> float:
        """Seconds until a probe of which nothing was heard counts as taken; infinite where silence means nothing."""
        if self._probe is None or self.hold.kind is not HoldKind.BLACKOUT:
            return inf
        return self._probe.started + max(PATIENCE_SECONDS, 3 * self.requests.refusal_seconds) - now

    def _close(self, now: float, kind: HoldKind, reason: str, retry_after: float | None = None) -> None:
        self._probe = None
        self.hold.probing = False
        expected = self.requests.window_ends(now) if kind is HoldKind.BLACKOUT else now
        self.hold.close(now, kind, reason, retry_after, jitter=1.0 + 0.2 * self._random(), expected=expected)

    def _opened(self, now: float) -> None:
        """A probe was taken: the provider takes work again."""
        hold, probe = self.hold, self._probe
        if probe is None:
            return
        if hold.kind is HoldKind.BLACKOUT:
            for controller in (self.requests, self.tokens):
                if controller.state is not State.START:
                    controller.recovered(now, hold.since, probe.started, probe.started - hold.last_refused)
                    hold.passes = controller.windowed
        elif hold.kind is HoldKind.OUTAGE or self.requests.state is State.START:
            self.requests.restart(now, OUTAGE_SHARE)
        hold.open(probe.started)
        self._probe = None
        hold.probing = False

    def _size_permits(self, now: float) -> None:
        """Enough permits for the pace: 2 x pace x p90 latency (Little's law with room), at least 8."""
        if self._pinned:
            return
        if self.requests.limit == inf:
            self.permits.size = MAX_CONCURRENCY
            return
        self.permits.size = min(max(ceil(2 * self.requests.pace(now) * self._p90), 8), MAX_CONCURRENCY)

    # -- memory and operators ------------------------------------------------------------------------------

    def learned(self) -> dict[str, dict[str, float]]:
        """What is worth remembering over a restart, by dimension. Rates are a second."""
        known = {"requests": self.requests.estimate.learned(), "tokens": self.tokens.estimate.learned()}
        if self.permits.learned < inf:
            known["concurrency"] = {"limit": self.permits.learned}
        return {dimension: values for dimension, values in known.items() if values is not None}

    def recall(self, now: float, learned: Mapping[str, Mapping[str, float]], share: float) -> None:
        """Begin with that share of what `learned` gave before a restart. Raises `KeyError` if it is something else."""
        for dimension, controller in (("requests", self.requests), ("tokens", self.tokens)):
            if dimension in learned:
                values = learned[dimension]
                controller.recall(now, share * values["limit"], values["burst"], values["uncertainty"])
        if "concurrency" in learned:
            self.permits.learned = max(round(share * learned["concurrency"]["limit"]), 1)

    def status(self, now: float) -> dict[str, Any]:
        """What was learned, and when and why it last changed, as plain data. Rates are a second."""
        growth, permits, hold = self.growth, self.permits, self.hold
        return {
            "requests": self.requests.status(now),
            "tokens": self.tokens.status(now),
            "growth": {"base": growth.base, "factor": round(growth.factor, 3)} if growth.active else None,
            "concurrency": {
                "allowed": permits.allowed,
                "learned": None if permits.learned == inf else permits.learned,
                "in_flight": permits.in_flight,
            },
            "hold": None
            if hold.kind is None
            else {
                "kind": hold.kind.value,
                "reason": hold.reason,
                "since_seconds": round(now - hold.since, 1),
                "next_probe_seconds": round(max(hold.next_probe - now, 0.0), 1),
            },
        }
