"""The gate of one rate, in requests/s or LLM tokens/s: a token bucket whose rate and size come from a learner."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from sidecar.admission.gates.base import Ahead, Change, GateStatus, Verdict
from sidecar.admission.gates.bucket import TokenBucket
from sidecar.admission.learning.learner import UNKNOWN, Effect, Learner, Recovery, Remembered, Unknown
from sidecar.admission.learning.policer import Sent
from sidecar.admission.learning.reported import Reported, ReportedLimit
from sidecar.admission.ticket import Cause, Ticket

#: While no refusal comes and the limit grows, each growth by this share is reported to `on_change`.
REPORTED_SHARE = 0.1
#: Seconds. While requests wait, at least one attempt is sent in this time, even above the learned limit: only a probe
#: can show that the limit is far too low. If the operator's ceiling allows less than one attempt in this time, the time
#: is longer.
PROBE_SECONDS = 5.0


class RateGate:
    """Paces one dimension of one upstream. Amounts are 1 for each request, or the LLM tokens of an attempt."""

    __slots__ = (
        "_accepted_at",
        "_bucket",
        "_filled_at",
        "_in_tokens",
        "_limit",
        "_on_change",
        "_probe_seconds",
        "_sent_at",
        "_state",
        "dormant",
        "learner",
        "limit_forgotten",
        "name",
        "refuses_everything",
        "reported",
    )  # fmt: skip

    def __init__(
        self, now: float, name: Cause, learner: Learner, on_change: Callable[[Change], None] = lambda _: None
    ) -> None:
        """`on_change` is called when a verdict changes the limit, and each time the limit has grown by 10 %."""
        self.name: Cause = name
        self.learner = learner
        self.dormant = learner.unpaced
        self.refuses_everything = False
        """True: the last refusal showed that the provider refuses all calls, at any pace."""
        self.reported: Reported | None = None
        """What the provider's headers report; None before the first report."""
        self._in_tokens = name == "token_rate"
        self._bucket = TokenBucket(now, inf, learner.capacity)
        self.limit_forgotten = False
        """True: the last accepted attempt showed that the limit was far too low, so the gate has forgotten it."""
        self._filled_at = -inf
        self._sent_at = self._accepted_at = now
        self._probe_seconds = max(PROBE_SECONDS, learner.ceiling_seconds)
        self._on_change = on_change
        self._limit, self._state = learner.limit, learner.snapshot().state  # as last reported

    def advance(self, now: float) -> None:
        """Fill the bucket up to `now`. From `now` on, fill it at the current pace."""
        learner, bucket = self.learner, self._bucket
        self._filled_at = now
        pace = learner.pace(now)
        if self.reported is not None and self.reported.ceiling < pace:
            pace = self.reported.ceiling
        if pace != inf or bucket.rate != inf:
            bucket.set(now, pace, learner.capacity)

    def opens_at(self, now: float, cost: float) -> float:
        """See `Gate`."""
        bucket = self._bucket
        if bucket.rate == inf or (wait := bucket.wait(now, cost if self._in_tokens else 1.0)) <= 0:
            return now
        return min(now + wait, max(now, self._sent_at + self._probe_seconds))

    def reserve(self, now: float, ticket: Ticket, cost: float, *, held: bool) -> Sent:
        """See `Gate`."""
        amount = cost if self._in_tokens else 1.0
        learner, self._sent_at = self.learner, now
        if self.reported is not None:
            return self._reserve_reported(now, amount, self.reported, held=held)
        if self.dormant:
            return learner.sent(now, amount, held=held, pace=self._bucket.rate)
        if now != self._filled_at:  # `Upstream.opening` has already advanced the gate, except if this is a probe
            self.advance(now)
        sent = learner.sent(now, amount, held=held, pace=self._bucket.rate)
        self._bucket.take(now, amount)
        if held and abs(learner.limit - self._limit) > REPORTED_SHARE * self._limit:
            self._report(now)
        return sent

    def _reserve_reported(self, now: float, amount: float, reported: Reported, *, held: bool) -> Sent:
        """Do the rest of `reserve` for a provider that reports its limits."""
        learner, bucket = self.learner, self._bucket
        if not self.dormant and now != self._filled_at:
            self.advance(now)
        pace = bucket.rate
        # The learner must not raise its pace because of an attempt that the ceiling delayed.
        sent = learner.sent(now, amount, held=held and pace < reported.ceiling, pace=pace)
        sent.bound = held
        reported.sent(now, sent, held=held, pace=pace)
        if not self.dormant:
            bucket.take(now, amount)
            if held and abs(learner.limit - self._limit) > REPORTED_SHARE * self._limit:
                self._report(now)
        return sent

    def note_limit(self, now: float, reservation: Sent, limit: ReportedLimit) -> None:
        """Note a limit that the headers of an answer report. Call it before `settle`."""
        if self.reported is None:
            self.reported = Reported(now)
        risen = self.reported.report(now, reservation, limit)
        if risen > 1.0 and self.learner.limit < inf:
            self.resume(now, risen)
        self._set_dormant()

    def _set_dormant(self) -> None:
        reported = self.reported
        self.dormant = self.learner.unpaced and (reported is None or reported.ceiling == inf)

    def settle(self, now: float, reservation: Sent, verdict: Verdict, *, blamed: Cause | None) -> None:
        """See `Gate`.

        A refusal blamed on the circuit (`hold`) teaches nothing new about this rate, because the provider refuses all
        calls at that time.
        """
        learner = self.learner
        if verdict.outcome == "accepted":
            learner.accepted(now, reservation)
            if self.reported is not None:
                self.reported.accepted(now, reservation)
            if not self.dormant:
                seconds, self._accepted_at = reservation.at - self._accepted_at, max(reservation.at, self._accepted_at)
                if seconds >= self._probe_seconds:
                    self._forget_limit_if_disproved(now, reservation, seconds)
            if self._in_tokens and verdict.usage is not None:  # the real cost replaces the estimated cost
                amount = max(float(sum(verdict.usage)), 1.0)
                if not self.dormant:
                    self._bucket.take(now, amount - reservation.amount)
                learner.settled(reservation, amount)
        elif verdict.outcome != "refused" or verdict.named == "capacity":
            learner.void(now, reservation)
        elif blamed == self.name:
            if self.reported is not None:
                self.reported.refused(now, reservation)
            self.refuses_everything = self._apply(now, learner.refused(now, reservation))
        elif blamed == "hold":
            learner.refused_too(now, reservation)
        else:
            learner.void(now, reservation)

    def seconds_for(self, now: float, ahead: Ahead, *, guess: bool) -> float:
        """See `Gate`: at the current pace."""
        learner, reported = self.learner, self.reported
        if not guess and (not learner.certain or (reported is not None and reported.ceiling < inf)):
            return ahead.requests * learner.ceiling_seconds  # only the operator's ceiling is no guess
        self.advance(now)
        if self._bucket.rate == inf:
            return 0.0
        amount = ahead.tokens if self._in_tokens else ahead.requests
        return max(amount - self._bucket.level(now), 0.0) / self._bucket.rate

    def probe_opens_at(self, now: float) -> float:
        """Return the loop time at which a probe may be sent: the operator's ceiling holds for it too."""
        return max(now, self._sent_at + self.learner.ceiling_seconds)

    def resume(self, now: float, after: Recovery | Remembered | Unknown | float) -> None:
        """Continue after a pause or with another limit; see `Learner.resumed`."""
        self._accepted_at = now
        self._apply(now, self.learner.resumed(now, after))

    def status(self, now: float) -> GateStatus:
        """See `Gate`."""
        known = self.learner.snapshot()
        pace = self.learner.pace(now)
        if self.reported is not None:
            pace = min(pace, self.reported.ceiling)
        learned = known.limit < inf
        return GateStatus(
            self.name,
            limit=known.limit if learned else None,
            pace=None if pace == inf else pace,
            state=known.state,
            why=known.why,
            since=known.since,
            burst=known.burst if learned else None,
            error=known.error if learned else None,
            reported=None if self.reported is None else self.reported.status(),
        )

    def _forget_limit_if_disproved(self, now: float, accepted: Sent, seconds: float) -> None:
        """Forget the learned limit if an accepted call proves that it is far too low.

        Proof: no call was accepted for `seconds` (at least `_probe_seconds`), then a probe was sent and accepted,
        although the limit (with a margin of 25 %) allows less in that time than the amount of the probe. Then search
        for the limit as at the start, but slowly.
        """
        if 1.25 * self.learner.limit * seconds < accepted.amount:
            self.limit_forgotten = True
            self._apply(now, self.learner.resumed(now, UNKNOWN))

    def _apply(self, now: float, effect: Effect) -> bool:
        self._set_dormant()
        # Set the bucket to this level. A negative level is a debt: it must be refilled before the next call.
        if effect.level is not None:
            self.advance(now)
            self._bucket.take(now, self._bucket.level(now) - effect.level)
        self._report(now)
        return effect.nothing_accepted

    def _report(self, now: float) -> None:
        known = self.learner.snapshot()
        if known.limit != self._limit or known.state != self._state:
            self._on_change(Change(now, self.name, self._limit, known.limit, known.state, known.why))
            self._limit, self._state = known.limit, known.state
