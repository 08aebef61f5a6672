"""How far below or above the learned limit the pace is: the one mechanism by which a limit is looked for and probed.

A ramp begins below the limit by as much as the limit is unsure, rises slowly and ever faster, and ends with the next
refusal. The less is known, the steeper; what is known well is probed as often as the refusal budget pays for. At its
end it is above the limit, to spend what a bucket may have saved: once all of that must be gone and nothing was refused,
the limit has risen, and the pace grows by a share a second until a refusal comes.
"""

from __future__ import annotations

from math import exp

from sidecar.admission.estimate import SUREST, UNSUREST, VAGUE, Estimate

#: A ramp's length as a share of the calls that pay for one refusal.
RAMP, RAMP_NO_CREDIT = 1.0, 1.4
#: Beyond its length the credit of a bucket is spent at this share above the limit at least and at most: between them so
#: that no more than one further request goes out until the refusal is back.
MIN_EXCESS, MAX_EXCESS = 0.05, 0.1
#: No refusal means that the limit has risen when so many times the credit was spent; without credit, so far on the
#: ramp.
SPENT, RISEN_NO_CREDIT = 1.2, 1.15
#: Growth a second of a risen limit, where refusals come back at once,
RISE = 0.35
#: ... at most by this share from one request to the next: at half a request a second, a second is no time,
RISE_PER_REQUEST = 0.08
#: A ramp's length in seconds is held within these, since a limit may move: too slow for a small one is no use either.
MIN_SECONDS, MAX_SECONDS = 4.0, 160.0
#: Where each refusal begins a blackout, this share of the quota may be lost to probing, and a ramp may take so long.
LOST_SHARE, MAX_LOSING_SECONDS = 0.02, 600.0
#: Refusals to the end of a ramp that make the next one longer at most.
MAX_EACH = 4.0
#: A limit that has just moved may move again: the ramp after that is so much shorter, and each one that follows longer.
HASTE, FIRST_HASTE, HASTE_LEFT = 0.25, 0.35, 1.5


class Ramp:
    """Amounts are in the dimension's unit. `begin` says what is known; what was sent since moves it."""

    __slots__ = (
        "_budget", "_caution", "_credit", "_each", "_eager", "_excess", "_haste", "_length", "_no_credit", "_refusals",
        "_sent", "_unsure", "_vague", "rise", "spent",
    )  # fmt: skip

    def __init__(self, budget: float) -> None:
        self.rise = 1.0
        """Growth of a limit that has risen."""
        self.spent = 0.0
        """What was sent above the limit since the ramp was to its end."""
        self._budget = budget
        self._refusals = 0  # since a ramp ended as it should
        self._each = 1.0  # refusals that it takes to end one, smoothed
        self._haste = FIRST_HASTE

    def refused(self) -> None:
        """One refusal."""
        self._refusals += 1

    def moved(self) -> bool:
        """The limit is another: look again soon. False if it has just moved before: then others may share it."""
        if self._haste < 1.0:
            return False
        self._haste = HASTE
        return True

    def confirmed(self) -> None:
        """The limit is where it was: look again later than this time."""
        if self._unsure <= VAGUE:
            if self._haste == 1.0:  # what it took to learn a limit says nothing of what it takes to probe it
                self._each += 0.5 * (min(max(self._refusals, 1), MAX_EACH) - self._each)
            self._haste = min(self._haste * HASTE_LEFT, 1.0)
        self._refusals = 0

    def begin(self, estimate: Estimate, refusal_seconds: float, *, lost: float = 0.0, window: float = 0.0) -> None:
        """
        Start again at the foot, with what is known now.

        `lost` is what each refusal costs where it is punished; `window` is what a window holds where one was used up.
        """
        limit, burst, typical = estimate.limit, estimate.burst, estimate.typical
        unsure = self._unsure = estimate.unsure
        self._no_credit = burst < 2.0 * typical and not window
        self._credit = SPENT * burst + typical
        self._excess = min(max(typical / (limit * max(refusal_seconds, 1e-3)), MIN_EXCESS), MAX_EXCESS)
        self._caution = 1.0 + refusal_seconds
        self._eager = (self._excess / MAX_EXCESS) ** 2  # a refusal that is long in coming is not to be hurried
        self._vague = unsure / UNSUREST if unsure > VAGUE else 0.0
        if window:
            self._eager = self._vague = 0.0
            self._credit, self._excess = 2.0 * max(MIN_EXCESS, unsure) * window + typical, MIN_EXCESS
        share, longest = (RAMP_NO_CREDIT, 2 * MAX_SECONDS) if self._no_credit else (RAMP, MAX_SECONDS)
        length, sure = self._each * share * typical / self._budget, SUREST
        if lost:
            length, longest, sure = max(length, lost / LOST_SHARE), MAX_LOSING_SECONDS, VAGUE
        elif not window:
            # each probe of one that is slow to refuse costs many refusals
            length *= min(self._haste * max(1.0, 0.5 * limit * refusal_seconds / typical), 1.0)
        length = min(max(length, MIN_SECONDS * limit), longest * limit)
        self._length = max(length * sure / unsure, 2 * typical, window)
        self._sent = self.spent = 0.0
        self.rise = 1.0

    def end(self, rise: float) -> None:
        """Be at the end, as if the limit had risen, and grow from that share of it."""
        self._sent, self.spent = RISEN_NO_CREDIT * self._length, self._credit
        self.rise = rise

    @property
    def along(self) -> float:
        """How far on the ramp, as a share of its length."""
        return self._sent / self._length

    @property
    def risen(self) -> bool:
        """More was sent above the limit than is allowed, if it is what it was."""
        return self.spent >= self._credit

    def height(self) -> float:
        """The pace as a share of the limit."""
        along = self.along
        if along < 1.0 or self._no_credit:
            along = min(along, RISEN_NO_CREDIT)
            return (1.0 - self._unsure + 2.0 * self._unsure * along * along) * self.rise
        return (1.0 + max(self._unsure, self._excess)) * self.rise

    def grow(self, seconds: float, amount: float, typical: float) -> None:
        """So much more was sent, after so many seconds in which the pace was what held requests back."""
        height = self.height()
        self._sent += amount
        if self.along < 1.0:
            return
        self.spent += amount * (1.0 - 1.0 / max(height, 1.0))
        if self._no_credit:
            risen = float(self.along >= RISEN_NO_CREDIT)
        else:
            risen = 1.0 if self.risen else min(max(self._eager * self.spent / self._credit, self._vague), 1.0)
        self.rise *= exp(risen * min(RISE / self._caution * seconds, RISE_PER_REQUEST * amount / typical))
