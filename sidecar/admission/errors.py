"""Why admission does not let a request through. Every one carries what a caller needs to try again well."""

from __future__ import annotations


class NotAdmitted(Exception):
    """The request was not let through, and no attempt is under way."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        """Seconds after which a new try would get in, as far as can be told."""


class QueueFull(NotAdmitted):
    """A bound of the queue (requests or bytes) is reached."""


class DeadlineUnreachable(NotAdmitted):
    """It cannot be served before its deadline."""


class Superseded(NotAdmitted):
    """A newer request of the same key took its place."""


class Draining(NotAdmitted):
    """Nothing new is taken: the sidecar is stopping."""


class AccountClosed(NotAdmitted):
    """The provider refuses the account itself (billing): waiting does not help."""


class StillFailing(NotAdmitted):
    """It was to go once more if other requests failed too; they do not. Never reaches a caller."""
