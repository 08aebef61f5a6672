"""How long a provider asks to wait, read from the headers of its refusal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")


def retry_after(headers: Mapping[str, str], now_wall: float) -> float | None:
    """Seconds the provider asks to wait, finite and not negative; None if it says nothing that makes sense.

    Understands `retry-after-ms`, `Retry-After` as seconds, as a duration ("6m0s") and as a date, and OpenAI's
    `x-ratelimit-reset-requests` and `-tokens` where the same dimension's `-remaining-` is 0. A date is compared with
    the response's own `Date`, so that a wrong clock here does no harm, and with `now_wall` (Unix time) without one.
    `x-ratelimit-reset` is not read: it is seconds with some and a Unix time with others.
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
    """Go's notation, as OpenAI writes it: "1s", "6m0s", "20ms"."""
    match = _DURATION.fullmatch(text[:40])
    if match is None or not text:
        return None
    hours, minutes, seconds, milliseconds = (float(group or 0) for group in match.groups())
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000


def _unix_time(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text[:40]).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):  # what the standard library raises on no date
        return None
