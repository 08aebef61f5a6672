"""The waits that a provider reports in its refusals: how far they are believed, and when they mean a used-up quota."""

from __future__ import annotations

from math import inf, isfinite
from typing import TypeGuard

#: Maximum delay of the first probe by a reported wait, in seconds: LITTLE_TRUST normally, MUCH_TRUST after two reported
#: waits in a row were found to be true. While the provider reports no capacity, each refused probe doubles the maximum,
#: up to MUCH_TRUST.
LITTLE_TRUST, MUCH_TRUST = 5.0, 30.0
#: A reported wait means a used-up quota if every probe in this many seconds was refused with the same end, and the end
#: is still further away than this: longer than usual deadlines, so that no request can wait for it.
QUOTA_SECONDS = 60.0
#: Two reported ends are the same if they differ by at most this share of the wait.
SAME_SHARE = 0.1


class ReportedWaits:
    """What the provider reported since the circuit opened. A wait that is not finite and positive counts as none."""

    __slots__ = ("_end", "_longest", "_same_since", "_true", "_until")

    def __init__(self) -> None:
        self._true = 0  # how many reported waits in a row were found to be true
        self._longest = LITTLE_TRUST  # maximum delay of the next probe, in seconds
        self._until = 0.0  # loop time at which the latest reported wait ends; 0: none was reported
        self._end = inf  # the reported end of the wait, as long as it stays the same; inf: none
        self._same_since = 0.0  # loop time since which the end has stayed the same

    def begin(self) -> None:
        """Start again: the circuit opens."""
        self._until, self._end = 0.0, inf
        self._longest = MUCH_TRUST if self._true >= 2 else LITTLE_TRUST

    def show_used_up_quota(self, now: float, wait: float | None) -> bool:
        """Return True if the reported ends mean a used-up quota; see QUOTA_SECONDS.

        Call it once for the refusal that opened the circuit and for each refused probe, with its wait in seconds.
        """
        if not self.is_same_end(now, wait):
            self._end, self._same_since = now + wait if is_valid(wait) else inf, now
        return self._end - now > QUOTA_SECONDS and inf > self._end and now - self._same_since >= QUOTA_SECONDS

    def is_same_end(self, now: float, wait: float | None) -> bool:
        """Return True if a refusal with this wait in seconds reports the same end as the refusals before it."""
        return is_valid(wait) and abs(now + wait - self._end) <= SAME_SHARE * wait

    def double(self) -> None:
        """Allow twice the delay for the probes after the next one: a probe was refused for capacity."""
        self._longest = min(2.0 * self._longest, MUCH_TRUST)

    def delay(self, now: float, wait: float | None, last_refused: float) -> float:
        """Return the loop time before which the next probe must not be sent; -inf if no wait was reported.

        `last_refused`: loop time at which the latest probe was refused. Refusals of attempts that were sent before it
        must not delay the next probe further than the maximum.
        """
        if not is_valid(wait):
            return -inf
        self._until = now + wait
        return min(self._until, now + self._longest, last_refused + MUCH_TRUST)

    def judge(self, opened_at: float, last_refused: float, probed_at: float) -> None:
        """Compare the latest reported wait with the time at which the accepted probe was sent."""
        if self._until:
            early = self._until - probed_at
            if early > 0.5 * (self._until - opened_at):
                self._true = 0  # the probe was accepted long before the time that the provider named
            elif early <= 0 and last_refused < self._until:
                self._true += 1


def is_valid(wait: float | None) -> TypeGuard[float]:
    """Return True for a wait in seconds that can be used: it is finite and above 0."""
    return wait is not None and isfinite(wait) and wait > 0
