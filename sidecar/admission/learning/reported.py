"""What a provider's headers report about one rate, and how far the reports are believed.

Headers can be wrong: cached, those of another key, of another window. So a reported limit is only a ceiling until the
first refusal; afterwards the verdicts decide. What the headers say remains is used only after it has proved right. When
a wrong limit was instead used like a limit remembered from before a restart, only .15 of the quota was used
(simulated).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import Protocol

from sidecar.admission.learning.policer import Sent

#: Seconds. A reported limit with a longer window (a day) gives no ceiling: its quota may be used up in minutes.
_MAX_WINDOW = 3600.0
#: Growth of the ceiling per second while it holds requests back: it doubles in 5 s.
_GROWTH = log(2.0) / 5.0
#: The ceiling grows at most by the growth of this many seconds from one attempt to the next.
_MAX_STEP_SECONDS = 5.0
#: Refusals at which about nothing remained, until `remaining` is trusted; contradictions until it no longer is.
_HITS, _CONTRADICTIONS = 2, 2
#: Share of the limit that still counts as about nothing, and share above which something remains for certain.
_NOTHING, _SOMETHING = 0.01, 0.05
#: Windows of a limit that are accepted at most within one window, if the limit is true: the rest of a fixed window and
#: all of the next one, or a full bucket and what refills it.
_MAX_WINDOWS = 2.0
#: Seconds. A gate that was closed by a report sends a probe after this time at the latest.
_MAX_CLOSED_SECONDS = 30.0
#: A limit that a trusted header raises by less than this share is no new limit.
_RISEN = 0.05
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
    """True: `remaining` has proved right, and closes the gate."""
    refuted: bool
    """True: more was accepted than the limit allows."""
    others: float | None
    """Requests or LLM tokens per second that others use, as far as a trusted header shows it."""


class _Limit:
    """One reported limit and what speaks for and against it."""

    __slots__ = (
        "_at", "_contradictions", "_hits", "_level", "_level_at", "_others", "_others_at", "_refused_until", "_spent",
        "ends_at", "limit", "name", "others", "refills", "refuted", "remaining", "trusted", "window",
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
        self._refused_until = -inf  # refused attempts that were sent until then belong to the last event
        self._level, self._level_at = 0.0, now
        self._others, self._others_at = 0.0, -inf

    @property
    def rate(self) -> float:
        """The limit per second; infinite if it gives no ceiling."""
        window = self.window
        return inf if self.refuted or window is None or window > _MAX_WINDOW else self.limit / window

    def report(self, now: float, sent: Sent, report: ReportedLimit) -> float:
        """Note a report of the answer to `sent`. Return the factor by which the limit has changed."""
        factor = report.limit / self.limit
        if factor != 1.0:
            self.limit, self.refuted, self._level = report.limit, False, 0.0
        self.window, self.refills = report.window, report.refills
        remaining = report.remaining
        if remaining is None:
            return factor
        at = sent.counted_at
        if not self.refills and at < self.ends_at and self.remaining is not None:
            self._count_others(at, self.remaining - remaining - (sent.spent - self._spent))
            remaining = min(self.remaining, remaining)  # answers arrive in any order: the lowest of a window counts
        elif at < self._at:
            return factor
        elif not self.refills:
            self.ends_at = -inf
        elif self.remaining is not None and remaining < self.limit:
            refilled = min(self.remaining + (at - self._at) * self.rate, self.limit) - remaining
            self._count_others(at, refilled - (sent.spent - self._spent))
        if report.reset is not None and not self.refills:
            # Whole seconds may have been rounded up, and a window that is over must not stay closed.
            rounded = 1.0 if report.reset >= 2.0 and report.reset == int(report.reset) else 0.0  # noqa: PLR2004
            self.ends_at = at + report.reset - rounded
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

    def ends(self, now: float, spent: float, amount: float) -> float:
        """Return the loop time at which a window ends that has less than `amount` left; `now` if it has enough.

        A limit that refills continuously needs no closed gate: the learned pace follows it.
        """
        if self.refills or self.available(now, spent) >= amount:
            return now
        return min(self.ends_at, self._at + min(self.window or inf, _MAX_CLOSED_SECONDS))

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
            self._hits, self._contradictions = self._hits + 1, 0
            self.trusted = self._hits >= _HITS
        elif _SOMETHING * self.limit < remaining < inf:
            self.contradicted()

    def contradicted(self) -> None:
        """Note that the header said what was not true."""
        self._contradictions += 1
        if self._contradictions >= _CONTRADICTIONS:
            self.trusted, self._hits, self._contradictions = False, 0, 0

    def _count_others(self, at: float, amount: float) -> None:
        """Count what left the quota although we did not send it."""
        self._others += amount
        seconds = at - self._others_at
        if seconds >= (self.window or inf):
            self.others = max(self._others / seconds, 0.0) if seconds < inf else None
            self._others, self._others_at = 0.0, at


class Reported:
    """Every limit that the headers report about one rate."""

    __slots__ = ("_factor", "_grown_at", "_limits", "_refused", "_spent", "ceiling", "trusted")

    def __init__(self, now: float) -> None:
        self.ceiling = inf
        """The most that may be sent per second; infinite after the first refusal."""
        self.trusted = False
        """True: at least one header may close the gate."""
        self._limits: dict[str, _Limit] = {}
        self._factor = 1.0
        self._grown_at = now
        self._refused = False
        self._spent = 0.0  # sent since the first report

    def report(self, now: float, sent: Sent, report: ReportedLimit) -> float:
        """Note a report of the answer to `sent`. Return the factor by which a trusted header's limit has risen; or 1."""
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
        if held and pace >= self.ceiling:
            self._factor *= 2.0 ** (min(now - self._grown_at, _MAX_STEP_SECONDS) * _GROWTH / log(2.0))
            self._update()
        self._grown_at = now
        sent.against = tuple(one for one in self._limits.values() if one.ends(now, self._spent, 0.0) > now)

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

    def opens_at(self, now: float, amount: float) -> float:
        """Return the loop time at which trusted headers allow `amount` more."""
        return max(one.ends(now, self._spent, amount) if one.trusted else now for one in self._limits.values())

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
        self.trusted = any(one.trusted for one in self._limits.values())
        shortest = min(self._limits.values(), key=_shortest)
        self.ceiling = inf if self._refused else self._factor * shortest.rate


def _shortest(one: _Limit) -> tuple[bool, float, float]:
    return one.rate == inf, one.window or inf, one.rate
