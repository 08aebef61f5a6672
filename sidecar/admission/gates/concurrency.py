"""Limit the attempts in flight. The number is derived from the pace, and learned if the provider limits concurrency."""

from __future__ import annotations

from collections import Counter, deque
from math import inf

from sidecar.admission.gates.base import Ahead, GateStatus, Verdict
from sidecar.admission.ticket import Cause, Ticket

MAX_CONCURRENCY = 1024
#: Refusals are put down to concurrency only if SUSPECT_AFTER of them all met more attempts in flight than accepted
#: attempts did. They must span at least SUSPECT_SECONDS seconds and SUSPECT_LATENCIES times the latency of an answer.
#: Refusals close together can equally come from a rate limit that fell, and until the first answers arrive the number
#: in flight only rises.
SUSPECT_AFTER, SUSPECT_SECONDS, SUSPECT_LATENCIES = 4, 10.0, 3.0
#: Concurrency is suspected only if at most this share of the accepted attempts had as many others in flight. With a
#: larger share, four refusals at such numbers could be chance.
CHANCE = 0.1


class Place:
    """One attempt in flight."""

    __slots__ = ("beside", "held", "sent_at")

    def __init__(self, sent_at: float, beside: int, held: bool) -> None:
        self.sent_at = sent_at
        self.beside = beside
        """Attempts in flight at the provider when this one started; refused ones were not."""
        self.held = held


class ConcurrencyGate:
    """
    A counting semaphore whose size moves. It never waits: a ticket that finds no free place stays in the queue.

    A smaller size revokes no permit: attempts in flight finish, and no other starts until the number is below the size.
    """

    __slots__ = (
        "_budget", "_changed_at", "_cut_at", "_paid", "_places", "_suspects", "_taken", "answer_seconds", "discovered",
        "dormant", "in_flight", "learned", "name", "size", "step",
    )  # fmt: skip

    def __init__(self, size: int, budget: float = 0.005) -> None:
        self.name: Cause = "concurrency"
        self.dormant = False
        self.size = size
        """Permits that the pace needs, within the bound for memory."""
        self.learned = inf
        """The provider's limit on concurrency; infinite until a refusal has shown it."""
        self.in_flight = 0
        self.step = 0
        """Attempts allowed at present above the learned limit, to test whether the provider allows more."""
        self.answer_seconds = 0.0
        """Seconds that an answer takes, set by the upstream; 0 while none is known."""
        self.discovered = False
        """The last refusal has shown a limit that it did not name."""
        self._budget = budget
        self._changed_at = -inf
        self._cut_at = -inf
        self._paid = 0.0  # share of one refusal for which the budget has paid
        self._suspects: deque[tuple[float, int]] = deque(maxlen=SUSPECT_AFTER)  # send time, other attempts in flight
        self._taken: Counter[int] = Counter()  # accepted attempts by the number of other attempts in flight
        self._places: dict[Place, None] = {}  # in flight, in the order in which they started

    def __repr__(self) -> str:
        return f"<ConcurrencyGate in_flight={self.in_flight} allowed={self.allowed} learned={self.learned}>"

    @property
    def allowed(self) -> float:
        """Attempts that may be in flight now."""
        return min(self.size, self.learned + self.step)

    # -- the gate ------------------------------------------------------------------------------------------------------

    @property
    def certain(self) -> bool:
        """See `Gate`."""
        return True

    def advance(self, now: float) -> None:
        """See `Gate`."""

    def opens_at(self, now: float, cost: float) -> float:
        """See `Gate`: only the end of an attempt, or a larger limit, opens it."""
        return now if self.in_flight < self.size and self.in_flight < self.learned + self.step else inf

    def reserve(self, now: float, ticket: Ticket, cost: float, *, held: bool) -> Place:
        """See `Gate`."""
        place = Place(now, self.in_flight, held)
        self.in_flight += 1
        self._places[place] = None
        return place

    def settle(self, now: float, reservation: Place, verdict: Verdict, *, blamed: Cause | None) -> None:
        """See `Gate`."""
        self.discovered = False
        if verdict.outcome == "accepted":
            if reservation.beside < self.learned or self._was_surely_full_before(reservation):
                self._accepted(reservation.beside, reservation.held)
        elif verdict.outcome == "refused":
            self._was_not_there(reservation)
            if blamed != "hold" and verdict.named != "capacity":
                self._refused(now, reservation, verdict, blamed=blamed == "concurrency")
        self.in_flight -= 1
        del self._places[reservation]  # a KeyError here is a defect of ours: a reservation was settled twice

    def explains(self, now: float, reservation: Place) -> float:
        """See `Gate`: 1 if a limit on concurrency explains the latest refusals better than any rate does."""
        return float(self.answer_seconds > 0 and (reservation.beside >= self.learned or self._least(reservation) > 0))

    def seconds_for(self, now: float, ahead: Ahead) -> float:
        """See `Gate`: places become free at the rate of answers."""
        if self.answer_seconds <= 0:
            return 0.0
        return max(ahead.requests - (self.allowed - self.in_flight), 0.0) * self.answer_seconds / self.allowed

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

    def _accepted(self, beside: int, held: bool) -> None:
        self._taken[beside] += 1
        if beside >= self.learned:  # more than the learned limit: it has risen, so double the steps of the search
            self.learned = beside + 1
            self.step = max(2 * self.step, 1)
        if self.learned < inf:
            self._paid = min(self._paid + self._budget, 1.0)
            if held and self._paid >= 1.0:
                self._paid = 0.0
                self.step = max(self.step, 1)

    def _refused(self, now: float, place: Place, verdict: Verdict, *, blamed: bool) -> None:
        if verdict.named in (None, "request_rate") and self.answer_seconds > 0:
            self._weigh(now, place)
        if not blamed:
            return
        self._changed_at = now
        if place.sent_at > self._cut_at:  # one burst is one event
            self._cut_at = now
            learned = place.beside if self.learned == inf else min(self.learned, place.beside)
            self.learned = max(learned, 1)
        elif place.beside >= 1:
            self.learned = min(self.learned, place.beside)
        self.step = 0
        self._paid = 0.0

    def _weigh(self, now: float, place: Place) -> None:
        """
        A refusal named another limit, or none: see whether concurrency explains the latest ones better.

        A rate limit refuses at any number in flight. A limit on concurrency refuses only above the numbers at which
        attempts were accepted, with few exceptions.
        """
        if place.beside >= self.learned or place.sent_at <= self._cut_at:
            return
        least = self._least(place)
        self._cut_at = now
        self._suspects.append((place.sent_at, place.beside))
        if least > 0:
            self.discovered = least < self.learned
            self.learned = least
            self._suspects.clear()
        elif least < 0:
            self._taken.clear()  # old observations may no longer be true: the provider's limit can change
            self._suspects.clear()

    def _least(self, place: Place) -> int:
        """The limit that this refusal and the latest ones show; 0 while they are too few, -1 if they show none."""
        if place.sent_at <= self._cut_at:
            return 0
        suspects = [*self._suspects, (place.sent_at, place.beside)][-SUSPECT_AFTER:]
        seconds = place.sent_at - suspects[0][0]
        if len(suspects) < SUSPECT_AFTER or seconds < max(SUSPECT_SECONDS, SUSPECT_LATENCIES * self.answer_seconds):
            return 0
        least = min(beside for _, beside in suspects)
        above = sum(count for at, count in self._taken.items() if at >= least)
        return -1 if least < 1 or above > min(SUSPECT_AFTER, CHANCE * self._taken.total()) else least

    def _was_not_there(self, refused: Place) -> None:
        """Correct `beside` of the later attempts: a refused attempt was not in flight at the provider beside them."""
        later = False
        for other in self._places:
            if later:
                other.beside -= 1
            later = later or other is refused

    def _was_surely_full_before(self, accepted: Place) -> bool:
        """No attempt that went out earlier, with as many beside it, may yet turn out to have been refused."""
        for other in self._places:
            if other is accepted:
                break
            if other.beside >= self.learned:
                return False
        return True
