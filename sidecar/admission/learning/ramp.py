"""The pace as a multiple of the learned limit. The same ramp is used to search for a limit and to probe it later.

A ramp begins below the limit by the relative error of the limit, rises slowly at first and then faster, and ends with
the next refusal. An uncertain limit has a short, steep ramp. A well-known limit is probed as often as the refusal
budget allows. At its end, the ramp is above the limit, to use up what the provider's bucket may have saved. If that is
used up and no refusal came, the limit has risen. Then the pace grows exponentially until a refusal comes.
"""

from __future__ import annotations

from math import exp

from sidecar.admission.learning.estimate import Estimate
from sidecar.admission.learning.tuning import (
    ESTIMATE_SUREST,
    ESTIMATE_UNSUREST,
    ESTIMATE_VAGUE,
    RAMP,
    RAMP_FIRST_HASTE,
    RAMP_HASTE,
    RAMP_HASTE_LEFT,
    RAMP_LOST_SHARE,
    RAMP_MAX_EACH,
    RAMP_MAX_EXCESS,
    RAMP_MAX_LOSING_SECONDS,
    RAMP_MAX_SECONDS,
    RAMP_MIN_EXCESS,
    RAMP_MIN_SECONDS,
    RAMP_NO_CREDIT,
    RAMP_RISE,
    RAMP_RISE_PER_REQUEST,
    RAMP_RISEN_NO_CREDIT,
    RAMP_SPENT,
)


class Ramp:
    """The present ramp. `begin` starts it; each sent amount moves it forward. Amounts are in the dimension's unit."""

    __slots__ = (
        "_budget", "_caution", "_credit", "_each", "_eager", "_excess", "_haste", "_length", "_no_credit", "_refusals",
        "_sent", "_unsure", "_vague", "height", "rise", "spent",
    )  # fmt: skip

    def __init__(self, budget: float) -> None:
        self.rise = 1.0
        """Factor by which the limit is assumed to have risen."""
        self.height = 1.0
        """The pace as a share of the limit."""
        self.spent = 0.0
        """Amount sent above the limit since the ramp reached its end."""
        self._budget = budget
        self._refusals = 0  # since the limit was last confirmed
        self._each = 1.0  # refusals per ramp, smoothed
        self._haste = RAMP_FIRST_HASTE

    def refused(self) -> None:
        """Count one refusal."""
        self._refusals += 1

    def moved(self) -> bool:
        """Shorten the next ramps, because the limit has changed. Return False if it changed shortly before too."""
        if self._haste < 1.0:
            return False
        self._haste = RAMP_HASTE
        return True

    def confirmed(self) -> None:
        """Lengthen the next ramp, because the limit has not changed."""
        if self._unsure <= ESTIMATE_VAGUE:
            if self._haste == 1.0:  # refusals while a limit is being learned say nothing about probes
                self._each += 0.5 * (min(max(self._refusals, 1), RAMP_MAX_EACH) - self._each)
            self._haste = min(self._haste * RAMP_HASTE_LEFT, 1.0)
        self._refusals = 0

    def begin(self, estimate: Estimate, refusal_seconds: float, *, lost: float = 0.0, window: float = 0.0) -> None:
        """
        Start a new ramp from the present estimate.

        `lost`: amount that each refusal costs if refusals are punished, else 0. `window`: amount that a quota window
        allows, 0 without windows.
        """
        limit, burst, typical = estimate.limit, estimate.burst, estimate.typical
        unsure = self._unsure = estimate.unsure
        self._no_credit = burst < 2.0 * typical and not window
        self._credit = RAMP_SPENT * burst + typical
        self._excess = min(max(typical / (limit * max(refusal_seconds, 1e-3)), RAMP_MIN_EXCESS), RAMP_MAX_EXCESS)
        self._caution = 1.0 + refusal_seconds
        self._eager = (self._excess / RAMP_MAX_EXCESS) ** 2  # if refusals take long to arrive, rise with care
        self._vague = unsure / ESTIMATE_UNSUREST if unsure > ESTIMATE_VAGUE else 0.0
        if window:
            self._eager = self._vague = 0.0
            self._credit, self._excess = 2.0 * max(RAMP_MIN_EXCESS, unsure) * window + typical, RAMP_MIN_EXCESS
        share, longest = (RAMP_NO_CREDIT, 2 * RAMP_MAX_SECONDS) if self._no_credit else (RAMP, RAMP_MAX_SECONDS)
        length, sure = self._each * share * typical / self._budget, ESTIMATE_SUREST
        if lost:
            length, longest, sure = max(length, lost / RAMP_LOST_SHARE), RAMP_MAX_LOSING_SECONDS, ESTIMATE_VAGUE
        elif not window:
            # If refusals take long to arrive, each probe costs many refusals.
            length *= min(self._haste * max(1.0, 0.5 * limit * refusal_seconds / typical), 1.0)
        length = min(max(length, RAMP_MIN_SECONDS * limit), longest * limit)
        self._length = max(length * sure / unsure, 2 * typical, window)
        self._sent = self.spent = 0.0
        self.rise = 1.0
        self._climb()

    def end(self, rise: float) -> None:
        """Go to the end of the ramp, as if the limit had risen, and grow from `rise` times the limit."""
        self._sent, self.spent = RAMP_RISEN_NO_CREDIT * self._length, self._credit
        self.rise = rise
        self._climb()

    @property
    def along(self) -> float:
        """The position on the ramp, as a share of its length."""
        return self._sent / self._length

    @property
    def risen(self) -> bool:
        """True if more was sent above the limit than the limit allows, so the limit has risen."""
        return self.spent >= self._credit

    def _climb(self) -> None:
        along = self.along
        if along < 1.0 or self._no_credit:
            along = min(along, RAMP_RISEN_NO_CREDIT)
            self.height = (1.0 - self._unsure + 2.0 * self._unsure * along * along) * self.rise
        else:
            self.height = (1.0 + max(self._unsure, self._excess)) * self.rise

    def grow(self, seconds: float, amount: float, typical: float) -> None:
        """Move forward by the sent `amount`, after `seconds` in which the pace delayed requests."""
        height = self.height
        self._sent += amount
        if self.along < 1.0:
            self._climb()
            return
        self.spent += amount * (1.0 - 1.0 / max(height, 1.0))
        if self._no_credit:
            risen = float(self.along >= RAMP_RISEN_NO_CREDIT)
        else:
            risen = 1.0 if self.risen else min(max(self._eager * self.spent / self._credit, self._vague), 1.0)
        self.rise *= exp(risen * min(RAMP_RISE / self._caution * seconds, RAMP_RISE_PER_REQUEST * amount / typical))
        self._climb()
