"""Recognizes a limit that refuses with a 5xx and no words, such as nginx's `limit_req` with its default 503.

A failure can be such a refusal only if it came much faster than answers come. Other causes also fail fast: an outage, a
request that makes the server fail each time, one bad replica of several. The difference is the load at which the
failures come: a limit refuses when more was sent just before, the other causes do not depend on that.

Each attempt is ranked by three measures of the load at its start. Under a cause that does not depend on the load, the
rank of a failure is uniform between 0 and 1. Under a limit it is near 1. The sum of the logarithms of the likelihood
ratio (CUSUM; Page, 1954) says which of the two is true. It needs 6 to 12 failures.

A caller can send a request that always fails, just when the load is high. But only a limit accepts a request that it
has refused before, so a part of the requests that failed must have been accepted later.
"""

from __future__ import annotations

from collections import deque
from math import inf, log
from typing import Literal

from sidecar.admission.learning.tuning import (
    WORDLESS_FAST,
    WORDLESS_MAX_DROP,
    WORDLESS_MIN_KNOWN,
    WORDLESS_OTHERS,
    WORDLESS_PASSED,
    WORDLESS_RECENT,
    WORDLESS_SHAPE,
    WORDLESS_SLEEP_SECONDS,
    WORDLESS_SPAN,
    WORDLESS_SURE,
    WORDLESS_UNKNOWN,
)
from sidecar.admission.ticket import Ticket

#: The load at the start of an attempt. Larger values mean more load: minus the seconds since the last attempt that has
#: not failed, minus the seconds since the 8th last one, and the number of attempts in flight.
Load = tuple[float, float, float]
#: How a failure is read. `undecided`: it came fast, and the cause is not known yet. A limit is more likely.
Reading = Literal["refused", "undecided", "failed"]


class WordlessLimit:
    """Decides whether the fast failures of one upstream are refusals by a limit."""

    __slots__ = (
        "_counted",
        "_evidence",
        "_failed_at",
        "_failures",
        "_in_vain",
        "_last_failed",
        "_loads",
        "_passed",
        "_requests",
        "_sent",
        "awake",
        "sure",
    )

    def __init__(self) -> None:
        self.awake = False
        """True: attempts are recorded, because an attempt failed fast not long ago."""
        self.sure = False
        """True: the fast failures are refusals by a limit."""
        self._failed_at = -inf
        self._failures = 0  # fast failures so far
        self._in_vain = 0  # fast failures since the last accepted attempt, one for each burst
        self._requests = self._passed = 0  # requests that failed fast while awake, and those that were accepted later
        self._sent: deque[float] = deque(maxlen=WORDLESS_RECENT)  # send times of the attempts that have not failed fast
        self._loads: deque[Load] = deque(maxlen=WORDLESS_RECENT)  # the loads of such attempts
        self._evidence = [0.0, 0.0, 0.0]  # for a limit, one sum for each measure of the load
        self._counted = [0, 0, 0]  # the number of the last attempt that counted, for each measure
        # For the latest tickets that failed fast: how often, and the numbers of answers and failures at the last time.
        self._last_failed: dict[Ticket, tuple[int, int, int]] = {}

    def __repr__(self) -> str:
        evidence = " ".join(f"{sum_:.1f}" for sum_ in self._evidence)
        return f"<WordlessLimit awake={self.awake} sure={self.sure} evidence={evidence}>"

    @property
    def is_likely(self) -> bool:
        """True: half of the evidence that is needed speaks for a limit."""
        return max(self._evidence) > WORDLESS_SURE / 2

    def sent(self, now: float, in_flight: int) -> Load | None:
        """Record an attempt that is sent now beside so many others. Call it only while `awake`."""
        if now > self._failed_at + WORDLESS_SLEEP_SECONDS:
            self.awake = False
            self._sent.clear()
            self._loads.clear()
            self._last_failed.clear()
            self._requests = self._passed = 0
            return None
        sent, load = self._sent, None
        if sent:
            span = now - sent[-WORDLESS_SPAN] if len(sent) >= WORDLESS_SPAN else inf
            load = (sent[-1] - now, -span, float(in_flight))
            self._loads.append(load)
        sent.append(now)
        return load

    def accepted(self, ticket: Ticket) -> None:
        """Note an accepted attempt. Call it only while `awake`."""
        self._in_vain = 0
        if self._last_failed.pop(ticket, None) is not None:
            self._passed += 1

    def failed(
        self,
        now: float,
        ticket: Ticket,
        *,
        sent_at: float,
        number: int,
        load: Load | None,
        answer_seconds: float,
        answers: int,
    ) -> Reading:
        """Learn from an attempt that failed with a 5xx and no words, and return how to read it.

        It is the attempt of this number, and `load` is what `sent` returned for it. `answer_seconds` is the usual time
        of an answer (0: not known), `answers` the number of answers so far.
        """
        if now - sent_at >= WORDLESS_FAST * answer_seconds:
            return "failed"
        self.awake = True
        self._in_vain += sent_at >= self._failed_at
        self._failed_at = now
        self._failures += 1
        if sent_at in self._sent:
            self._sent.remove(sent_at)
        if load is not None and load in self._loads:
            self._loads.remove(load)
        if self._is_own_fault(ticket, answers):
            return "failed"
        if load is None or len(self._loads) < WORDLESS_MIN_KNOWN:
            if self.sure:  # after a quiet time: a limit soon accepts an attempt again, an outage does not
                return "refused" if self._in_vain <= WORDLESS_OTHERS else "failed"
            return "undecided" if self.times_failed(ticket) <= WORDLESS_UNKNOWN else "failed"
        if load[0] < min(other[0] for other in self._loads):
            return "failed"  # for longer than ever, nothing was accepted: an outage, which shows nothing of a limit
        if self.times_failed(ticket) == 1:  # repetitions come close together, whatever the cause of the failures
            self._weigh(number, load)
        if self.sure:
            return "refused"
        # A request that fails often needs more evidence that it is not the cause.
        is_often = self.times_failed(ticket) > WORDLESS_UNKNOWN
        if not (is_often or any(self._counted)):
            return "undecided"  # no failure has been weighed yet
        return "undecided" if max(self._evidence) > (WORDLESS_SURE / 2 if is_often else 0.0) else "failed"

    def _weigh(self, number: int, load: Load) -> None:
        """Add the evidence of one failure that began at this load."""
        known = self._loads
        # Two attempts have most of what was sent before them in common if few were sent between them. Their ranks are
        # then alike under any cause, so only one of them counts.
        apart = (1, WORDLESS_SPAN, load[2])
        for measure, value in enumerate(load):
            below = sum(other[measure] < value for other in known)
            equal = sum(other[measure] == value for other in known)
            rank = (below + 0.5 * equal + 0.5) / (len(known) + 1)
            ratio = log((1.0 + WORDLESS_SHAPE) * rank**WORDLESS_SHAPE)
            if number - self._counted[measure] >= apart[measure]:
                self._counted[measure] = number
                summed = self._evidence[measure] + max(ratio, -WORDLESS_MAX_DROP)
                self._evidence[measure] = min(max(summed, 0.0), WORDLESS_SURE)
        strongest = max(self._evidence)
        has_passed = self._passed >= max(2.0, WORDLESS_PASSED * self._requests)
        self.sure = (strongest >= WORDLESS_SURE and has_passed) or (self.sure and strongest > 0.0)

    def accepted_per_second(self, now: float) -> float:
        """Return the rate of the attempts that have not failed fast, while attempts are recorded."""
        return len(self._sent) / max(now - self._sent[0], 1e-3) if self._sent else 0.0

    def times_failed(self, ticket: Ticket) -> int:
        """Return how often the ticket failed fast lately."""
        return self._last_failed.get(ticket, (0, 0, 0))[0]

    def _is_own_fault(self, ticket: Ticket, answers: int) -> bool:
        """Return True if this request itself is the cause, because it fails again while others are answered.

        If others failed too, it is the cause only if it fails WORDLESS_UNKNOWN times more, and only as long as no
        request was accepted after it had failed.
        """
        times, answers_then, failures_then = self._last_failed.pop(ticket, (0, answers, self._failures))
        self._requests += times == 0
        others_failed = self._failures - failures_then > 1
        alone = not (others_failed and self._passed)
        own = (
            times >= (WORDLESS_UNKNOWN if others_failed else 1) and alone and answers - answers_then >= WORDLESS_OTHERS
        )
        if len(self._last_failed) >= WORDLESS_RECENT:
            del self._last_failed[next(iter(self._last_failed))]
        self._last_failed[ticket] = times + 1, answers, self._failures
        return own
