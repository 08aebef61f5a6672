"""Admission closed but for one probe at a time: while the provider is down, has no room, or refuses the account."""

from __future__ import annotations

from enum import StrEnum


class HoldKind(StrEnum):
    """Why admission is closed."""

    OUTAGE = "outage"
    CAPACITY = "capacity"
    BILLING = "billing"


#: Seconds to the first probe, the factor between probes, and the longest step. `limiting.md`, "hold".
FIRST_STEP, GROWTH, LONGEST_STEP = 0.5, 1.5, 5.0
BILLING_STEP = 30.0


class Hold:
    """Open while `kind` is None. While closed, `may_probe` says when the one probe may go."""

    __slots__ = ("_step", "kind", "next_probe", "probing", "reason", "since")

    def __init__(self) -> None:
        self.kind: HoldKind | None = None
        self.reason = ""
        self.since = 0.0
        self.next_probe = 0.0
        self.probing = False
        self._step = FIRST_STEP

    def close(self, now: float, kind: HoldKind, reason: str) -> None:
        """Close, or stay closed after a probe that failed too."""
        if self.kind is None:
            self.since = now
            self._step = FIRST_STEP
        elif kind is self.kind:
            self._step = min(self._step * GROWTH, LONGEST_STEP)
        self.kind = kind
        self.reason = reason
        self.next_probe = now + (BILLING_STEP if kind is HoldKind.BILLING else self._step)

    def open(self) -> None:
        """The provider takes work again."""
        self.kind = None
        self.reason = ""

    def may_probe(self, now: float) -> bool:
        """While closed: the one probe may go now."""
        return not self.probing and now >= self.next_probe
