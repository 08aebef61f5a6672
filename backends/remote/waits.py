"""Reads from the headers of a refusal how long the provider asks to wait."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")


def retry_after(headers: Mapping[str, str], now_wall: float) -> float | None:
    """Return the wait in seconds that the provider asks for: finite and not negative; None if no header is valid.

    The headers are read in this order:

    1. `retry-after-ms`. If it is invalid, the next header is read.
    2. `Retry-After` as seconds, as a duration ("6m0s") or as a date. A date is compared with the response's own `Date`
       header, so that a wrong clock on this machine does no harm. Without that header it is compared with `now_wall`
       (Unix time in seconds). If `Retry-After` is present but invalid, the result is None.
    3. OpenAI's `x-ratelimit-reset-requests` and `x-ratelimit-reset-tokens`, each only if the `x-ratelimit-remaining-`
       header of the same dimension is 0. The larger value is returned.

    `x-ratelimit-reset` is ignored: some providers send seconds in it, and others a Unix time.
    """
    lower = {name.lower(): value.strip() for name, value in headers.items()}
    milliseconds = _number(lower.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    if value := lower.get("retry-after"):
        seconds = _number(value)
        if seconds is None:
            seconds = _duration(value)
        if seconds is None and (date := _unix_time(value)) is not None:
            now = _unix_time(lower.get("date", ""))
            seconds = max(0.0, date - (now_wall if now is None else now))
        return seconds
    resets = [
        seconds
        for dimension in ("requests", "tokens")
        if lower.get(f"x-ratelimit-remaining-{dimension}") == "0"
        and (seconds := _duration(lower.get(f"x-ratelimit-reset-{dimension}", ""))) is not None
    ]
    return max(resets, default=None)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _duration(text: str) -> float | None:
    """Parse a duration in the notation of Go, which OpenAI uses ("1s", "6m0s", "20ms"). Returns seconds."""
    match = _DURATION.fullmatch(text[:40])
    if match is None or not text:
        return None
    hours, minutes, seconds, milliseconds = (float(group or 0) for group in match.groups())
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000


def _unix_time(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text[:40]).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):  # the standard library raises any of these
        return None
