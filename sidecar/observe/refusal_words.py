"""Counts refusals by whether a rule knows their words, so that an operator can report those that no rule knows."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from backends.base import BackendError, BillingRefused, QuotaUsedUp, Throttled, Unauthorized

log = logging.getLogger("sidecar")

#: Maximum number of log lines about unknown words: a provider may send a new code with each refusal.
_MAX_LOGGED = 20
_REFUSALS = (Throttled, QuotaUsedUp, BillingRefused, Unauthorized)


@dataclass(frozen=True, slots=True)
class UnknownRefusal:
    """A refusal that was read by its status alone. `at` is a loop time in seconds."""

    at: float
    status: int
    code: str
    """The provider's code; empty if it sent none that everybody may see."""


class RefusalWords:
    """The counts of one sidecar since its start, by upstream."""

    def __init__(self) -> None:
        self.known: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.last_unknown: dict[str, UnknownRefusal] = {}
        self._logged: set[tuple[str, str]] = set()  # upstream and code

    def __repr__(self) -> str:
        return f"<RefusalWords known={self.known.total()} unknown={self.unknown.total()}>"

    def count(self, now: float, upstream: str, failure: Exception) -> None:
        """Count a failed attempt if it is a refusal. Log unknown words once for each upstream and code."""
        if not isinstance(failure, BackendError):
            return
        if failure.words_known:
            self.known[upstream] += isinstance(failure, _REFUSALS)
            return
        self.unknown[upstream] += 1
        self.last_unknown[upstream] = UnknownRefusal(now, failure.status, failure.public_code)
        if (upstream, failure.public_code) not in self._logged and len(self._logged) < _MAX_LOGGED:
            self._logged.add((upstream, failure.public_code))
            log.warning(
                "%s refused a request in words that this version does not know: status %d, code %s. Save such an "
                "answer with `curl -i` and report what `vlm-sidecar check --answer FILE` says about it",
                upstream, failure.status, failure.public_code or "not shown, because it may quote the caller",
            )  # fmt: skip
