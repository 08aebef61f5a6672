"""What a provider's headers report about one rate, and how far the reports are believed.

Headers can be wrong: cached, those of another key, of another window. So a reported limit is only a ceiling until the
first refusal; afterwards the verdicts decide. What the headers say remains is used only after it has proved right. When
a wrong limit was instead used like a limit remembered from before a restart, only .15 of the quota was used
(simulated).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Protocol

from sidecar.admission.learning.policer import Sent

#: Seconds. A reported limit with a longer window (a day) gives no ceiling: its quota may be used up in minutes.
_MAX_WINDOW = 3600.0
#: Seconds in which the ceiling doubles while it holds requests back: usually, and if the limit is refuted. From one
#: attempt to the next it doubles at most.
_DOUBLING_SECONDS, _REFUTED_DOUBLING_SECONDS = 5.0, 1.0
#: Seconds. One attempt in this time is sent whatever is reported. A ceiling below that would only begin to double late:
#: with "1 per hour", after a minute.
_PROBE_SECONDS = 5.0
#: Refusals at which about nothing remained, until `remaining` is trusted; contradictions until it no longer is.
_HITS, _CONTRADICTIONS = 2, 2
#: Share of the limit that still counts as about nothing, and share above which something remains for certain.
_NOTHING, _SOMETHING = 0.01, 0.05
#: Windows of a limit that are accepted at most within one window, if the limit is true: the rest of a fixed window and
#: all of the next one, or a full bucket and what refills it.
_MAX_WINDOWS = 2.0
#: Seconds. After a refusal that reports a time, a probe is sent after this time at the latest.
_MAX_CLOSED_SECONDS = 30.0
#: Seconds before the reported end of a window at which the closed gate lets a probe through. Whole seconds may have
#: been rounded up. If the probe is refused, the learner knows the end of the window to within this time.
_EARLY_SECONDS = 1.0
#: A limit that a trusted header raises by less than this share is no new limit.
_RISEN = 0.05
#: A quota from which a share above this is missing of what we sent is not ours, or not counted as we count.
_MISSED = 0.25
#: Maximum number of reported limits of one rate.
_MAX_NAMES = 8


class ReportedLimit(Protocol):
    """One limit, as an answer's headers report it."""

    @property
    def name(self) -> str:
        """The header's name."""
        ...

    @property
    def dimension(self) -> str:
        """`request_rate` or `token_rate`."""
        ...

    @property
    def limit(self) -> float:
        """Requests or LLM tokens per window; above 0."""
        ...

    @property
    def window(self) -> float | None:
        """Seconds of the window; None if it is not known."""
        ...

    @property
    def remaining(self) -> float | None:
        """What remains of the limit; None if it is not reported."""
        ...

    @property
    def reset(self) -> float | None:
        """Seconds until the window ends; None if it is not reported."""
        ...

    @property
    def refills(self) -> bool:
        """True: the limit refills continuously."""
        ...


@dataclass(frozen=True, slots=True)
class ReportedStatus:
    """The reported limit of one rate, for operators."""

    header: str
    limit: float
    window_seconds: float
    remaining: float | None
    trusted: bool
    """True: `remaining` has proved right, so probes wait for the end of a used-up window."""
    refuted: bool
    """True: more was accepted than the limit allows."""
    others_per_second: float | None
    """Requests or LLM tokens per second that others use, as far as a trusted header shows it."""

    @property
    def per_second(self) -> float:
        """The limit per second."""
        return self.limit / self.window_seconds


class _Limit:
    """One reported limit and what speaks for and against it."""

    __slots__ = (
        "_at", "_contradictions", "_hits", "_level", "_level_at", "_others_at", "_ours", "_refused_until", "_spent",
        "_used", "_was_open", "ends_at", "limit", "name", "others", "refills", "refuted", "remaining", "trusted",
        "window",
    )  # fmt: skip

    def __init__(self, now: float, report: ReportedLimit) -> None:
        self.name, self.limit, self.window, self.refills = report.name, report.limit, report.window, report.refills
        self.remaining: float | None = None
        self.ends_at = -inf
        """Loop time at which the reported window ends."""
        self.trusted = self.refuted = False
        self.others: float | None = None
        self._at, self._spent = -inf, 0.0  # send time of the newest report, and what had been sent by then
        self._hits = self._contradictions = 0
        self._was_open = True  # something remained since the last refusal at which nothing did
        self._refused_until = -inf  # refused attempts that were sent until then belong to the last event
        self._level, self._level_at = 0.0, now
        self._ours = self._used = 0.0  # what we sent, and what left the quota, since `_others_at`
        self._others_at = -inf

    @property
    def _nothing(self) -> float:
        return max(_NOTHING * self.limit, 1.0)

    @property
    def is_used_up(self) -> bool:
        """True: a refusal has confirmed that nothing remains of the window that the latest answers reported."""
        return self._hits > 0 and self.remaining is not None and self.remaining <= self._nothing < inf

    @property
    def rate(self) -> float:
        """The limit per second; infinite if it gives no ceiling."""
        window = self.window
        return inf if window is None or window > _MAX_WINDOW else self.limit / window

    def report(self, now: float, sent: Sent, report: ReportedLimit) -> float:
        """Note a report of the answer to `sent`. Return the factor by which the limit has changed."""
        factor = report.limit / self.limit
        if factor != 1.0:
            self.limit, self.refuted, self._level = report.limit, False, 0.0
            self.remaining, self.ends_at = None, -inf
        self.window, self.refills = report.window, report.refills
        remaining = report.remaining
        if remaining is None:
            return factor
        self._was_open |= remaining > _SOMETHING * self.limit
        at = sent.counted_at
        if not self.refills and at < self.ends_at and self.remaining is not None:
            self._count_others(at, sent.spent - self._spent, self.remaining - remaining)
            remaining = min(self.remaining, remaining)  # answers arrive in any order: the lowest of a window counts
        elif at < self._at:
            return factor
        elif not self.refills:
            if remaining <= self._nothing and self.is_used_up:
                self.contradicted()  # the window has not ended when the header said
            self.ends_at = -inf
        elif self.remaining is not None and remaining < self.limit:
            refilled = min(self.remaining + (at - self._at) * self.rate, self.limit) - remaining
            self._count_others(at, sent.spent - self._spent, refilled)
        if report.reset is not None and not self.refills:
            # Whole seconds are rounded up, so the earliest end that a window's answers report is the best.
            end = at + report.reset
            self.ends_at = min(self.ends_at, end) if at < self.ends_at else end
        self.remaining = remaining
        if at >= self._at:
            self._at, self._spent = at, sent.spent
        return factor

    def available(self, now: float, spent: float) -> float:
        """Return what remains now, if `spent` was sent in total; infinite if it is not known."""
        if self.remaining is None or (not self.refills and now >= self.ends_at):
            return inf
        refilled = (now - self._at) * self.rate if self.refills else 0.0
        return min(self.remaining + refilled, self.limit) - (spent - self._spent)

    def is_overdrawn(self, now: float, spent: float) -> bool:
        """Return True if more was sent than remained of a window."""
        return not self.refills and self.available(now, spent) < 0.0

    def closed_until(self, now: float, spent: float) -> float:
        """Return the loop time at which a used-up window ends; `now` if something remains.

        A limit that refills continuously needs no closed gate: the learned pace follows it.
        """
        if self.refills or self.available(now, spent) > self._nothing:
            return now
        return min(self.ends_at - _EARLY_SECONDS, self._at + min(self.window or inf, _MAX_CLOSED_SECONDS))

    def accepted(self, now: float, amount: float) -> None:
        """Refute the limit if more was accepted than it allows."""
        rate = self.rate
        if rate == inf:
            return
        self._level = max(self._level - rate * (now - self._level_at), 0.0) + amount
        self._level_at = now
        if self._level > _MAX_WINDOWS * self.limit + amount:
            self.refuted = True

    def refused(self, now: float, sent: Sent) -> None:
        """Note a refusal because of this rate: it confirms or contradicts what the header says remains."""
        if self.remaining is None or sent.at <= self._refused_until:
            return
        self._refused_until = now
        remaining = self.available(sent.counted_at, sent.spent)
        if remaining <= max(sent.amount, _NOTHING * self.limit):
            if self._was_open:  # refusals with nothing accepted in between are one
                self._hits, self._contradictions, self._was_open = self._hits + 1, 0, False
                self.trusted = self._hits >= _HITS
        elif _SOMETHING * self.limit < remaining < inf:
            self.contradicted()

    def contradicted(self) -> None:
        """Note that the header said what was not true."""
        self._contradictions += 1
        if self._contradictions >= _CONTRADICTIONS:
            self.trusted, self._hits, self._contradictions = False, 0, 0

    def _count_others(self, at: float, ours: float, used: float) -> None:
        """Count what left the quota although we did not send it. If less left than we sent, it is not our quota."""
        self._ours += ours
        self._used += used
        seconds = at - self._others_at
        if seconds < min(self.window or inf, _MAX_WINDOW):
            return
        if seconds < inf:
            self.others = max(self._used - self._ours, 0.0) / seconds
            if self._used < (1.0 - _MISSED) * self._ours:
                self.contradicted()
        self._ours = self._used = 0.0
        self._others_at = at


class Reported:
    """Every limit that the headers report about one rate."""

    __slots__ = ("_factor", "_grown_at", "_least", "_limits", "_refused", "_refuted", "_spent", "ceiling")

    def __init__(self, now: float) -> None:
        self.ceiling = inf
        """The most that may be sent per second; infinite after the first refusal."""
        self._limits: dict[str, _Limit] = {}
        self._factor = 1.0
        self._refused = self._refuted = False
        self._least = 0.0  # what the latest attempt each `_PROBE_SECONDS` is per second
        self._grown_at = now  # send time of the last attempt
        self._spent = 0.0  # sent since the first report

    def report(self, now: float, sent: Sent, report: ReportedLimit) -> float:
        """Note a report of the answer to `sent`. Return the factor by which a trusted limit has risen, or 1."""
        one = self._limits.get(report.name)
        if one is None:
            if len(self._limits) >= _MAX_NAMES:
                return 1.0
            one = self._limits[report.name] = _Limit(now, report)
        factor = one.report(now, sent, report)
        self._update()
        return factor if one.trusted and factor > 1.0 + _RISEN else 1.0

    def sent(self, now: float, sent: Sent, *, held: bool, pace: float) -> None:
        """Note an attempt. `held`: the gate delayed it at this pace."""
        self._spent += sent.amount
        sent.spent = self._spent
        self._least = sent.amount / _PROBE_SECONDS
        if held and pace >= self.ceiling:
            doubling = _REFUTED_DOUBLING_SECONDS if self._refuted else _DOUBLING_SECONDS
            self._factor *= 2.0 ** (min(now - self._grown_at, doubling) / doubling)
            self._update()
        self._grown_at = now
        sent.against = tuple(one for one in self._limits.values() if one.is_overdrawn(now, self._spent))

    def accepted(self, now: float, sent: Sent) -> None:
        """Note an accepted attempt: it may refute a limit, or contradict a header that had closed the gate."""
        for one in self._limits.values():
            one.accepted(now, sent.amount)
        for one in sent.against:
            one.contradicted()
        self._update()

    def refused(self, now: float, sent: Sent) -> None:
        """Note a refusal because of this rate: from now on the verdicts decide."""
        self._refused = True
        for one in self._limits.values():
            one.refused(now, sent)
        self._update()

    def closed_until(self, now: float) -> float:
        """Return the loop time until which trusted headers allow nothing more; `now` if they allow something."""
        return max((one.closed_until(now, self._spent) for one in self._limits.values() if one.trusted), default=now)

    def ends_at(self, now: float) -> float:
        """Return the loop time at which a used-up window ends, as the headers say; `now` if they name none.

        This needs less trust than `closed_until`: a refusal at which nothing remained, and no two wrong ends since.
        """
        ends = max((one.ends_at for one in self._limits.values() if one.is_used_up), default=-inf)
        # If it ended while the last attempt was under way, no attempt has shown this yet: probe at once.
        return max(ends, now + 1e-3) if ends > self._grown_at else now

    def status(self) -> ReportedStatus | None:
        """Return the limit with the shortest window; None if no window is known."""
        known = [one for one in self._limits.values() if one.window is not None]
        if not known:
            return None
        one = min(known, key=_shortest)
        return ReportedStatus(
            one.name, one.limit, one.window or 0.0, one.remaining, one.trusted, one.refuted,
            one.others if one.trusted else None,
        )  # fmt: skip

    def _update(self) -> None:
        shortest = min(self._limits.values(), key=_shortest)
        self._refuted = shortest.refuted
        self.ceiling = inf if self._refused else self._factor * max(shortest.rate, self._least)


def _shortest(one: _Limit) -> tuple[bool, float, float]:
    return one.rate == inf, one.window or inf, one.rate
