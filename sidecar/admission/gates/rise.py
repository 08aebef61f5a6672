"""Lets the load rise slowly: at a cold start, after an outage or a blackout, and after a limit proved to be wrong."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from sidecar.admission.gates.base import Ahead, GateStatus, Verdict
from sidecar.admission.ticket import Cause, Ticket

#: The number of attempts without an answer is limited to 2, then 4, 8, … up to MAX_RISING; after that there is no
#: limit. It doubles after each round of answers. An attempt counts as answered after ANSWERED_SECONDS without a refusal
#: or a failure, so that long answers do not delay the rise.
MAX_RISING, ANSWERED_SECONDS = 64, 2.0
#: Seconds between the first attempts, while nothing is known about the provider. A first refusal (which takes about
#: 50 ms) then stops the rest of the first burst.
COLD_STEP_SECONDS = 0.01


class RiseGate:
    """Limits the attempts without an answer while the load rises. Otherwise it is dormant."""

    __slots__ = (
        "_answered", "_cold", "_others_fail", "_refusal_seconds", "_rising", "_sent_at", "_unanswered",
        "answer_seconds", "dormant", "name",
    )  # fmt: skip

    def __init__(
        self, *, cold: bool, refusal_seconds: Callable[[], float], others_fail: Callable[[Ticket], bool]
    ) -> None:
        """`cold`: the first attempts are spaced, because nothing is known about the provider.

        `refusal_seconds` returns how long a refusal can take to arrive. `others_fail` says whether other requests than
        this one failed since the last answer.
        """
        self.name: Cause = "hold"
        self.dormant = not cold
        self.answer_seconds = 0.0
        """Seconds that an answer takes, set by the upstream; 0 while none is known."""
        self._cold = cold  # True until the first verdict
        self._refusal_seconds = refusal_seconds
        self._others_fail = others_fail
        self._sent_at = -inf  # send time of the latest attempt
        self._rising = 0  # while the load rises: maximum number of attempts without an answer; 0: no limit
        self._unanswered: dict[Ticket, float] = {}  # send time of each unanswered attempt, in the order of sending
        self._answered = 0  # answers in the present round

    def __repr__(self) -> str:
        return f"<RiseGate cold={self._cold} rising={self._rising} unanswered={len(self._unanswered)}>"

    def start(self, sent_at: float) -> None:
        """Let the load rise from now on: one attempt, sent at `sent_at`, was answered, so 2 more may be sent."""
        self._cold = False
        self._sent_at = sent_at
        self._unanswered.clear()
        self._set(2)

    # -- the gate ------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Count an attempt as answered if it was sent ANSWERED_SECONDS ago and no refusal came."""
        while self._unanswered and now >= next(iter(self._unanswered.values())) + ANSWERED_SECONDS:
            del self._unanswered[next(iter(self._unanswered))]
            if self._rising:
                self._count_answer()

    def opens_at(self, now: float, cost: float) -> float:
        """See `Gate`."""
        if self._cold:
            return max(now, self._sent_at + COLD_STEP_SECONDS)
        if not self._rising:
            return now
        if self._rising <= len(self._unanswered):
            return next(iter(self._unanswered.values())) + ANSWERED_SECONDS
        if self._rising == 1:
            return now
        # Spread a round over the time of one answer: a burst would test only the provider's burst size, not its rate.
        answer_seconds = min(self.answer_seconds or ANSWERED_SECONDS, ANSWERED_SECONDS)
        return max(now, self._sent_at + answer_seconds / self._rising)

    def reserve(self, now: float, ticket: Ticket, cost: float, *, held: bool) -> Ticket:
        """See `Gate`. Call it only if not `dormant`."""
        self._unanswered[ticket] = self._sent_at = now
        return ticket

    def settle(self, now: float, reservation: Ticket, verdict: Verdict, *, blamed: Cause | None) -> None:
        """See `Gate`. Call it only if not `dormant`.

        An answered attempt counts towards the next doubling. After a refusal for capacity, or failures of two requests
        with no answer between them, start again at 1. (One failure is not enough: its request may be the cause. For the
        same reason, the later failures of a request do not count.) After any other refusal, stop limiting: the gate
        that learns from that refusal sets the pace.
        """
        sent_at = self._unanswered.pop(reservation, None)
        outcome = verdict.outcome
        learned = outcome == "refused" and verdict.named != "capacity"
        if self._cold and outcome in ("accepted", "refused", "failed"):
            self._cold = False
            # After a refusal, the gate that learned from it raises the load slowly, by a factor of at most 1.42 per
            # attempt.
            self._set(0 if outcome == "accepted" or learned else 1)
        elif sent_at is None:
            return
        elif outcome == "accepted":
            self._count_answer()
        elif outcome == "abandoned":
            if self._rising and now - sent_at >= self._refusal_seconds():  # a refusal would have come
                self._count_answer()
        elif learned:
            self._set(0)
        elif outcome == "refused" or (
            outcome == "failed" and reservation.attempts <= 1 and self._others_fail(reservation)
        ):
            self._set(1)

    def seconds_for(self, now: float, ahead: Ahead, *, guess: bool) -> float:
        """See `Gate`: 0, because the rise takes only a few answers."""
        return 0.0

    def status(self, now: float) -> GateStatus:
        """See `Gate`."""
        return GateStatus("hold", limit=None)

    def _count_answer(self) -> None:
        """Count one answer. Each complete round of answers doubles the allowed number of attempts without an answer."""
        self._answered += 1
        if self._answered >= self._rising:
            self._set(2 * self._rising if self._rising < MAX_RISING else 0)

    def _set(self, unanswered: int) -> None:
        self._rising, self._answered = unanswered, 0
        if not unanswered:
            self._unanswered.clear()
        self.dormant = not self._rising and not self._cold
