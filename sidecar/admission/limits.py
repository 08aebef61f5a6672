"""All gates that can delay a request of one account and model, and all that is learned about its limits."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import ceil, inf
from random import Random
from typing import Any

from sidecar.admission.attempts import Attempt, InFlight
from sidecar.admission.controller import RateController
from sidecar.admission.cost import TokenCost
from sidecar.admission.growth import GrowthGovernor
from sidecar.admission.hold import Hold, HoldKind
from sidecar.admission.permits import Permits
from sidecar.admission.states import State
from sidecar.admission.ticket import Cause, Ticket

#: The provider is down after OUTAGE_FAILURES consecutive failures (5xx, broken connections) of at least OUTAGE_TICKETS
#: different requests: one request that makes the provider fail each time is not an outage.
OUTAGE_FAILURES, OUTAGE_TICKETS = 6, 2
#: If this many different requests have failed and none was answered in between, the failures are the provider's fault.
FAILING_TICKETS = 2
#: After an outage the pace begins at this share of the learned limit.
OUTAGE_SHARE = 0.4
#: A probe counts as accepted if it is not refused within this many seconds, or within three times the usual time of a
#: refusal if that is longer.
PATIENCE_SECONDS = 0.5
#: Upper bound on attempts in flight. It bounds memory.
MAX_CONCURRENCY = 1024
#: Share of the pace that counts as certain while no limit was met, or while the limit is only a guess.
UNTRIED_SHARE = 0.25
#: Assumed seconds of an answer until the first answer was measured.
USUAL_SECONDS = 1.0


class Limits:
    """The gates of one account and model. Synchronous: the time is the argument `now`, and nothing is scheduled."""

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
        """`paced` False: only permits and the circuit are used, for a backend that has no quota."""
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
        """Smoothed seconds from the start of an attempt to its accepted verdict."""
        self._latencies: deque[float] = deque(maxlen=64)
        self._answers = 0
        self._p90 = 0.0  # of the latencies
        self._in_flight = InFlight()
        self._failures = 0
        self._failed: set[Ticket] = set()
        self._probe: Attempt | None = None
        self._cost = TokenCost()

    def __repr__(self) -> str:
        rates = f"requests={self.requests.limit:.4g}/s tokens={self.tokens.limit:.4g}/s"
        return f"<Limits {rates} {self.permits!r} {self.hold!r}>"

    # -- the gates -----------------------------------------------------------------------------------------------------

    def closed(self, now: float, ticket: Ticket) -> tuple[Cause | None, float]:
        """Return the gate that delays this ticket, and the loop time at which it opens (inf: only an event opens it).

        The gate is None if the ticket may start now.
        """
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
        """Return the estimated LLM tokens of the ticket: its input and an answer of average length.

        At least 1: without a cost, no token rate could be measured.
        """
        return max(self._cost.of(ticket.tokens), 1.0)

    def start(self, now: float, ticket: Ticket, bound: Cause | None) -> Attempt:
        """Start one attempt. `bound` is the gate that delayed the queue since the last start, or None."""
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
        """Return the seconds until the next probe, before which no attempt can start; 0 while admission is open."""
        return max(self.hold.next_probe - now, 0.0) if self.hold.kind is not None else 0.0

    def seconds_for(self, now: float, ticket: Ticket, requests: float, tokens: float) -> float:
        """Return the seconds until this ticket could start behind `requests` others.

        `tokens` is the total estimated input of the others in LLM tokens.
        """
        wait = 0.0
        if self._paced:
            cost = self._cost.of(tokens, requests) + self.cost(ticket)
            wait = max(
                self.requests.seconds_for(now, requests + 1),
                self.growth.seconds_for(now, requests + 1),
                self.tokens.seconds_for(now, cost),
            )
        if self.latency > 0:  # permits are released at the rate allowed / latency
            missing = requests + 1 - (self.permits.allowed - self.permits.in_flight)
            wait = max(wait, missing * self.latency / self.permits.allowed)
        return wait

    def throughput(self, now: float, ticket: Ticket) -> float:
        """Return the rate in attempts/s, each like this ticket, that can certainly start."""
        pace = self.permits.allowed / (self.latency or USUAL_SECONDS)
        if not self._paced:
            return pace
        requests = self.requests.pace(now)
        if self.requests.limit == inf or self.requests.guessed:
            requests = max(UNTRIED_SHARE * requests, self.requests.rate(now))
        return min(pace, requests, self.tokens.pace(now) / self.cost(ticket), self.growth.allowed(now))

    @property
    def failing(self) -> bool:
        """True if the provider fails different requests in a row, so that no single request is the cause."""
        return self.hold.kind is not None or len(self._failed) >= FAILING_TICKETS

    # -- verdicts ------------------------------------------------------------------------------------------------------

    def accepted(self, attempt: Attempt, now: float, usage: tuple[int, int] | None = None) -> None:
        """Learn from an accepted attempt. `usage`: LLM tokens of input and output as the provider counted them."""
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
            if usage is not None:  # replace the reserved cost by the real cost, and improve later estimates
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
        """Learn from a refusal because of a limit of this kind (`backends.base.ThrottleKind`)."""
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
        if self.hold.kind is not None:  # the attempt is the probe, or was sent before admission closed
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
        """Learn from a failure: the provider failed or could not be reached."""
        attempt.told = True
        self._failures += 1
        self._failed.add(attempt.ticket)
        self._void(attempt, now)
        down = self._failures >= OUTAGE_FAILURES and len(self._failed) >= OUTAGE_TICKETS
        if attempt is self._probe or (self.hold.kind is None and down):
            self._close(now, HoldKind.OUTAGE, reason)

    def account_refused(self, attempt: Attempt, now: float, reason: str) -> None:
        """Close admission: the provider refuses the account (billing)."""
        attempt.told = True
        self._void(attempt, now)
        self._close(now, HoldKind.BILLING, reason)

    def ended(self, attempt: Attempt, now: float) -> None:
        """End the attempt, with or without a verdict, and free its permit."""
        self.permits.give_back()
        self._in_flight.remove(attempt)
        if not attempt.told:
            self._void(attempt, now)
        if attempt is self._probe:  # the probe ended without a verdict: its caller left
            self._probe = None
            self.hold.probing = False

    # -- consequences of a verdict -------------------------------------------------------------------------------------

    def _dimension(self, attempt: Attempt, now: float, kind: str) -> str:
        """Return the cause of a refusal: the dimension that it names, unless another dimension explains it better."""
        if kind in {"unknown", "request_rate"}:
            known = self.permits.learned
            if self.latency and self.permits.suspect(now, attempt.started, attempt.beside, self.latency):
                if self.permits.learned < known:
                    self.requests.restart(now, 1.0)  # the learned request rate was a wrong explanation
                return "concurrency"
        if kind == "unknown":
            # the dimension that uses the highest share of its limit; the request rate while no limit is known
            used = self.tokens.use(now)
            return "token_rate" if used > 0 and used > self.requests.use(now) else "request_rate"
        return kind

    def _void(self, attempt: Attempt, now: float) -> None:
        if attempt.requests is not None:
            self.requests.void(now, attempt.requests)
        if attempt.tokens is not None:
            self.tokens.void(now, attempt.tokens)

    def _patience(self, now: float) -> float:
        """Return the seconds until a probe without a verdict counts as accepted.

        Infinite outside a blackout: there a missing refusal proves nothing.
        """
        if self._probe is None or self.hold.kind is not HoldKind.BLACKOUT:
            return inf
        return self._probe.started + max(PATIENCE_SECONDS, 3 * self.requests.refusal_seconds) - now

    def _close(self, now: float, kind: HoldKind, reason: str, retry_after: float | None = None) -> None:
        self._probe = None
        self.hold.probing = False
        expected = self.requests.window_ends(now) if kind is HoldKind.BLACKOUT else now
        self.hold.close(now, kind, reason, retry_after, jitter=1.0 + 0.2 * self._random(), expected=expected)

    def _opened(self, now: float) -> None:
        """Open admission: the provider accepted the probe."""
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
        """Set the number of permits for the pace: 2 x pace x p90 latency (twice Little's law), at least 8."""
        if self._pinned:
            return
        if self.requests.limit == inf:
            self.permits.size = MAX_CONCURRENCY
            return
        self.permits.size = min(max(ceil(2 * self.requests.pace(now) * self._p90), 8), MAX_CONCURRENCY)

    # -- state for restarts and operators ------------------------------------------------------------------------------

    def learned(self) -> dict[str, dict[str, float]]:
        """Return the learned values to keep over a restart, by dimension. Rates are per second."""
        known = {"requests": self.requests.estimate.learned(), "tokens": self.tokens.estimate.learned()}
        if self.permits.learned < inf:
            known["concurrency"] = {"limit": self.permits.learned}
        return {dimension: values for dimension, values in known.items() if values is not None}

    def recall(self, now: float, learned: Mapping[str, Mapping[str, float]], share: float) -> None:
        """Restore what `learned` returned before a restart, with limits scaled by `share`.

        Raises `KeyError` if the data has another form.
        """
        for dimension, controller in (("requests", self.requests), ("tokens", self.tokens)):
            if dimension in learned:
                values = learned[dimension]
                controller.recall(now, share * values["limit"], values["burst"], values["uncertainty"])
        if "concurrency" in learned:
            self.permits.learned = max(round(share * learned["concurrency"]["limit"]), 1)

    def status(self, now: float) -> dict[str, Any]:
        """Return the learned values as plain data, with time and reason of the last change. Rates are per second."""
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
