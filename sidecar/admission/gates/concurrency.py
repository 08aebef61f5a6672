"""Limit the attempts in flight. The number is derived from the pace, and learned if the provider limits concurrency."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from math import inf

from sidecar.admission.gates.base import Ahead, Change, GateStatus, Verdict
from sidecar.admission.ticket import Cause, Ticket

MAX_CONCURRENCY = 1024
#: Refusals are blamed on concurrency only if SUSPECT_AFTER refused attempts in a row had more attempts in flight beside
#: them than the accepted attempts had. These refusals must span at least SUSPECT_SECONDS seconds and SUSPECT_LATENCIES
#: times the latency of an answer. Reason: a rate limit that fell can also cause several refusals within a short time,
#: and until the first answers arrive, the number in flight can only rise.
SUSPECT_AFTER, SUSPECT_SECONDS, SUSPECT_LATENCIES = 4, 10.0, 3.0
#: A concurrency limit of n is suspected only if at most this share of the accepted attempts had n or more attempts
#: beside them. If the share is larger, the refusals could be chance.
CHANCE = 0.1


class InFlight:
    """One attempt in flight."""

    __slots__ = ("beside", "held", "sent_at")

    def __init__(self, sent_at: float, beside: int, held: bool) -> None:
        self.sent_at = sent_at
        self.beside = beside
        """Number of other attempts in flight at the provider when this attempt started. Attempts that the provider
        refused are not counted."""
        self.held = held
        """True: this gate delayed the attempt."""


class ConcurrencyGate:
    """
    A counting semaphore whose size changes. It never blocks: while no permit is free, tickets stay in the queue.

    A smaller size revokes no permit. Attempts in flight finish, and no attempt starts until fewer than `size` are in
    flight.
    """

    __slots__ = (
        "_accepted_by_beside", "_attempts", "_budget", "_changed_at", "_confirming", "_last_burst_at", "_on_change",
        "_paid", "_suspects", "answer_seconds", "discovered", "dormant", "guessed", "in_flight", "learned", "name",
        "size", "step",
    )  # fmt: skip

    def __init__(self, size: int, budget: float = 0.005, on_change: Callable[[Change], None] = lambda _: None) -> None:
        """`budget`: share of attempts that may be refused. `on_change` is called when the learned limit changes."""
        self.name: Cause = "concurrency"
        self.dormant = False
        self.size = size
        """Number of permits that the present pace needs, at most MAX_CONCURRENCY (bounds the memory)."""
        self.learned = inf
        """The provider's limit on concurrency; infinite until refusals have shown it."""
        self.in_flight = 0
        """Attempts that hold a permit."""
        self.step = 0
        """Attempts allowed at present above the learned limit, to test whether the provider allows more."""
        self.answer_seconds = 0.0
        """Seconds that an answer takes, set by the upstream; 0 while none is known."""
        self.discovered = False
        """True: the last refusal revealed a concurrency limit although it did not name concurrency."""
        self.guessed = False
        """True: the learned limit rests on one burst of refusals, or on the state file. So the search for a higher
        limit uses no refusal budget, and no request is refused on arrival because of this limit."""
        self._confirming = False  # an attempt was accepted since the last burst of refusals
        self._budget = budget
        self._on_change = on_change
        self._changed_at = -inf
        self._last_burst_at = -inf
        self._paid = 0.0  # saved refusal budget; at 1.0 one refusal may be risked
        self._suspects: deque[tuple[float, int]] = deque(maxlen=SUSPECT_AFTER)  # send time, other attempts in flight
        self._accepted_by_beside: Counter[int] = Counter()  # number of accepted attempts for each value of `beside`
        self._attempts: dict[InFlight, None] = {}  # in flight, in the order in which they started

    def __repr__(self) -> str:
        return f"<ConcurrencyGate in_flight={self.in_flight} allowed={self.allowed} learned={self.learned}>"

    @property
    def allowed(self) -> float:
        """Attempts that may be in flight now."""
        return min(self.size, self.learned + self.step)

    # -- the gate ------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """See `Gate`."""

    def opens_at(self, now: float, cost: float) -> float:
        """See `Gate`: a closed gate opens when an attempt ends or the limit rises."""
        return now if self.in_flight < self.size and self.in_flight < self.learned + self.step else inf

    def reserve(self, now: float, ticket: Ticket, cost: float, *, held: bool) -> InFlight:
        """See `Gate`."""
        attempt = InFlight(now, self.in_flight, held)
        self.in_flight += 1
        self._attempts[attempt] = None
        return attempt

    def settle(self, now: float, reservation: InFlight, verdict: Verdict, *, blamed: Cause | None) -> None:
        """See `Gate`."""
        self.discovered = False
        if verdict.outcome == "accepted":
            if reservation.beside < self.learned or self._beside_is_final(reservation):
                self._accepted(now, reservation.beside, reservation.held)
        elif verdict.outcome == "refused":
            self._remove_from_later(reservation)
            if blamed != "hold" and verdict.named != "capacity":
                self._refused(now, reservation, verdict, blamed=blamed == "concurrency")
        self.in_flight -= 1
        del self._attempts[reservation]  # a KeyError here shows a bug in the caller: it settled a reservation twice

    def explains(self, refused: InFlight) -> bool:
        """Return True if a concurrency limit explains this and the latest refusals better than a rate limit does.

        Asked only if the refusal names the request rate or no limit. Has no side effects.
        """
        return self.answer_seconds > 0 and (refused.beside >= self.learned or self._suspected_limit(refused) > 0)

    def seconds_for(self, now: float, ahead: Ahead, *, guess: bool) -> float:
        """See `Gate`: permits become free at the rate of answers (allowed attempts / seconds per answer)."""
        if self.answer_seconds <= 0:
            return 0.0
        allowed = self.size if self.guessed and not guess else self.allowed
        return max(ahead.requests - (allowed - self.in_flight), 0.0) * self.answer_seconds / allowed

    def status(self, now: float) -> GateStatus:
        """See `Gate`."""
        return GateStatus(
            "concurrency",
            limit=None if self.learned == inf else self.learned,
            pace=self.allowed,
            since=self._changed_at,
            in_flight=self.in_flight,
        )

    # -- what verdicts show --------------------------------------------------------------------------------------------

    def recall(self, now: float, limit: int) -> None:
        """Begin with a limit from before a restart: a guess."""
        self._set(now, max(limit, 1), "remembered")
        self.guessed = True

    def forget_guess(self, now: float) -> None:
        """Forget a limit that is only a guess."""
        if self.guessed:
            self.forget(now)

    def forget(self, now: float) -> None:
        """Forget the learned limit."""
        self._set(now, inf, "the refusals had another cause")
        self.guessed, self.step = False, 0

    def _set(self, now: float, limit: float, why: str) -> None:
        old, self.learned = self.learned, limit
        if limit != old:
            self._changed_at = now
            self._on_change(Change(now, self.name, old, limit, "guessed" if self.guessed else "", why))

    def _accepted(self, now: float, beside: int, held: bool) -> None:
        self._accepted_by_beside[beside] += 1
        self._confirming = True
        if beside >= self.learned:  # accepted above the learned limit, so the limit has risen: double the search step
            self._set(now, beside + 1, "more in flight were accepted")
            self.step = max(2 * self.step, 1)
        if self.learned < inf:
            self._paid = min(self._paid + self._budget, 1.0)
            if held and (self.guessed or self._paid >= 1.0):
                self._paid = 0.0
                self.step = max(self.step, 1)

    def _refused(self, now: float, attempt: InFlight, verdict: Verdict, *, blamed: bool) -> None:
        if verdict.named in (None, "request_rate") and self.answer_seconds > 0:
            self._weigh(now, attempt)
        if not blamed:
            return
        self._changed_at = now
        if attempt.sent_at > self._last_burst_at:  # the refusals of one burst count once
            self._last_burst_at = now
            self.guessed, self._confirming = not self._confirming, False
            self._set(now, max(min(self.learned, attempt.beside), 1), "refused for concurrency")
        elif attempt.beside >= 1:
            self._set(now, min(self.learned, attempt.beside), "refused for concurrency")
        self.step = 0
        self._paid = 0.0

    def _weigh(self, now: float, attempt: InFlight) -> None:
        """
        Check whether a concurrency limit explains the latest refusals better than a rate limit does.

        A rate limit refuses at any number in flight. A concurrency limit refuses only at higher numbers in flight than
        those of accepted attempts, with few exceptions.
        """
        if attempt.beside >= self.learned or attempt.sent_at <= self._last_burst_at:
            return
        suspected = self._suspected_limit(attempt)
        self._last_burst_at = now
        self._suspects.append((attempt.sent_at, attempt.beside))
        if suspected > 0:
            self.discovered = suspected < self.learned
            self.guessed = False
            self._set(now, suspected, "refused only with more in flight")
            self._suspects.clear()
        elif suspected < 0:
            self._accepted_by_beside.clear()  # the provider's limit can change, so old observations may be wrong
            self._suspects.clear()

    def _suspected_limit(self, attempt: InFlight) -> int:
        """Return the limit that this refusal and the latest ones show.

        0: there are too few refusals. -1: they show no concurrency limit.
        """
        if attempt.sent_at <= self._last_burst_at:
            return 0
        suspects = [*self._suspects, (attempt.sent_at, attempt.beside)][-SUSPECT_AFTER:]
        seconds = attempt.sent_at - suspects[0][0]
        if len(suspects) < SUSPECT_AFTER or seconds < max(SUSPECT_SECONDS, SUSPECT_LATENCIES * self.answer_seconds):
            return 0
        suspected = min(beside for _, beside in suspects)
        above = sum(count for at, count in self._accepted_by_beside.items() if at >= suspected)
        return (
            -1 if suspected < 1 or above > min(SUSPECT_AFTER, CHANCE * self._accepted_by_beside.total()) else suspected
        )

    def _remove_from_later(self, refused: InFlight) -> None:
        """Reduce `beside` of the later attempts by 1, because the provider did not work on the refused attempt."""
        later = False
        for other in self._attempts:
            if later:
                other.beside -= 1
            later = later or other is refused

    def _beside_is_final(self, accepted: InFlight) -> bool:
        """Return True if no earlier attempt with `beside` >= `learned` is still in flight.

        Such an attempt could still be refused, and then `beside` of the attempt `accepted` was too high.
        """
        for other in self._attempts:
            if other is accepted:
                break
            if other.beside >= self.learned:
                return False
        return True
