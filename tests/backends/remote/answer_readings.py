"""The meaning of an error as one word, for the tests of its reading."""

from __future__ import annotations

from backends.base import BackendError, BillingRefused, QuotaUsedUp, Rejected, ServerFailed, Throttled, Unauthorized


def meaning_of(error: BackendError) -> str:
    match error:
        case Throttled():
            return error.kind
        case QuotaUsedUp():
            return "quota_period"
        case BillingRefused():
            return "billing"
        case Unauthorized():
            return "unauthorized"
        case Rejected():
            return "moderated" if error.moderated else "rejected"
        case ServerFailed():
            return "server"
    raise AssertionError(f"{error!r} is none of the errors a caller of classify knows")


def wait_of(error: BackendError) -> float | None:
    match error:
        case Throttled():
            return error.retry_after
        case QuotaUsedUp():
            return error.ends_in
    return None
