"""Reasons why admission refuses a request. Each error carries the seconds after which the caller can try again."""

from __future__ import annotations


class NotAdmitted(Exception):
    """The request was not admitted, and no attempt is in flight."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        """Predicted seconds after which a new request would be admitted; None if there is no prediction."""


class QueueFull(NotAdmitted):
    """The queue has reached its maximum number of requests or bytes."""


class DeadlineUnreachable(NotAdmitted):
    """The request cannot be served before its deadline."""


class Superseded(NotAdmitted):
    """A newer request of the same key replaced this request."""


class Draining(NotAdmitted):
    """The sidecar is stopping and accepts no new requests."""


class AccountClosed(NotAdmitted):
    """The provider refuses the account itself (for money or the key), so that waiting does not help."""


class QuotaClosed(AccountClosed):
    """The quota of a day or of another long period is used up.

    `retry_after`: seconds until the end that the provider reported, otherwise until the next probe.
    """


class KeyClosed(AccountClosed):
    """The provider refuses the sidecar's key."""


class StillFailing(NotAdmitted):
    """The request waited for a last retry, which is allowed only during an outage, and there is no outage.

    Other requests are answered, so the retry is not sent. The dispatcher handles this error; no caller gets it.
    """
