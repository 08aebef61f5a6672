"""Reads how long a provider asks to wait: the one reader of every spelling, in headers, in JSON and in texts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache

#: Seconds of each unit in a text such as "1h2m3.4s" or "in 12 minutes".
_UNITS = {
    "ms": 0.001, "millisecond": 0.001, "milliseconds": 0.001, "毫秒": 0.001,
    "s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0, "秒": 1.0, "秒钟": 1.0,
    "m": 60.0, "min": 60.0, "mins": 60.0, "minute": 60.0, "minutes": 60.0, "分": 60.0, "分钟": 60.0,
    "h": 3600.0, "hr": 3600.0, "hrs": 3600.0, "hour": 3600.0, "hours": 3600.0, "小时": 3600.0,
    "d": 86400.0, "day": 86400.0, "days": 86400.0, "天": 86400.0,
}  # fmt: skip
_NUMBER = r"\d{1,12}(?:\.\d{1,12})?"
_UNIT = "|".join(sorted(_UNITS, key=len, reverse=True))
_PART = re.compile(rf"({_NUMBER})\s?({_UNIT})(?![a-z])")
# Each part must match in one way only, and the number of parts is bounded: the text comes from outside.
_DURATION = rf"(?:{_NUMBER}\s?(?:{_UNIT})(?![a-z])(?:,? (?:and )?)?){{1,5}}"
_CLOCK = r"(?:(\d{1,4})\.)?(\d{1,2}):(\d\d):(\d\d)"
#: Words before a duration in a message. A duration without such words ("10 requests per 60s") is no wait.
_TEXT_WAITS = re.compile(
    r"(?:try again|retry|retrying|available|reset|resets|replenished|wait|expires?|refresh(?:es|ed)?)"
    rf"(?:\s+(?:again|after|in|at|for|about|another|your|request|within|only)|\s*[:=])*\s*(?P<time>{_DURATION}|{_CLOCK})"
    rf"|(?:请在|请于|请等待|等待)\s*(?P<time2>{_DURATION})"
    rf"|(?P<time3>{_DURATION})\s*(?:后|之后|以后)(?:再|重)"
)
#: Absolute times in a message, only with their time zone.
_TEXT_DATE = re.compile(
    r"(?:regain access|resets?|reset time|available|retry|try again|until)[^.]{0,20}?"
    r"(\d{4}-\d\d-\d\d)(?:\s+at\s+|[t\s])(\d\d:\d\d(?::\d\d)?)\s*(?:utc|gmt|z\b)"
)

#: Seconds. A Unix time is believed only if it is within a year of the response's `Date`.
_YEAR = 366 * 86400.0
#: Seconds. A Unix time is not believed if it was over this long ago. A number above the maximum is no duration.
_PAST_SECONDS, _MAX_SECONDS = 60.0, 1e9
#: Headers with a wait, the most reliable spelling first. `-ms`: milliseconds.
_RETRY_AFTER = (
    "retry-after-ms",
    "x-ms-retry-after-ms",
    "retry-after",
    "llm_provider-retry-after",
    "x-retry-after",
    "x-retry-in",
)
_RATELIMIT_T = re.compile(r"\bt\s*=\s*(\d{1,12})(?!\d)")
#: The reset headers: spelling before the dimension, dimension, spelling behind it. The matching `limit` and `remaining`
#: headers are found by replacing `reset`.
_RESET = re.compile(
    r"(?:llm_provider-)?(?:x-)?(?:rate-?limit-reset|ratelimit-reset)(?:-(.+))?|anthropic-ratelimit-(.+)-reset"
    r"|x-ai-rate-?limit-reset-(.+)|reset_at"
)
#: A reset header whose value is the time until the quota is *full*: OpenAI's and Groq's, with a duration as value
#: ("6m0s"). Source: community.openai.com/t/1268905. The next request is possible after `reset / limit`.
_UNTIL_FULL = re.compile(r"x-ratelimit-reset-(requests|tokens)")
_HAS_UNIT = re.compile(r"[a-z]")


def retry_after(headers: Mapping[str, str], now_wall: float, text: str = "", delay: object = None) -> float | None:
    """Return the wait in seconds that the provider asks for, from 0 to `_MAX_SECONDS`; None if it names none.

    `text` is the provider's message in lower case. `delay` is Google's `RetryInfo.retryDelay`. The first of these that
    has a valid value counts:

    1. `retry-after-ms`, `Retry-After` and its other names: seconds, a duration ("6m0s") or a date. A date is compared
       with the response's own `Date`, so that a wrong clock on this machine does no harm. Without `Date` it is compared
       with `now_wall` (Unix time in seconds).
    2. `RetryInfo.retryDelay`.
    3. The text: "try again in 1h2m3.4s", "in 174ms".
    4. `RateLimit: t=…`, and the reset headers of each dimension of which nothing remains: durations, seconds, a Unix
       time in seconds or milliseconds, or a date (RFC 3339). The longest counts.

    A wait that is present but invalid (negative, "soon") is ignored.
    """
    lower = {name.lower(): value.strip() for name, value in headers.items()}
    now = _date(lower.get("date", ""))
    if now is None:
        now = now_wall
    for name in _RETRY_AFTER:
        if value := lower.get(name):
            milliseconds = _number(value) if name.endswith("-ms") else None
            seconds = seconds_until(value, now) if milliseconds is None else milliseconds / 1000
            if seconds is not None and seconds <= _MAX_SECONDS:
                return seconds
    for found in (
        _duration(delay.lower()) if isinstance(delay, str) else None,
        _in_text(text, now),
        _resets(lower, now),
    ):
        if found is not None and found <= _MAX_SECONDS:
            return found
    return None


def _in_text(text: str, now: float) -> float | None:
    """Return the wait that a message names."""
    text = text[:4000]
    if match := _TEXT_WAITS.search(text):
        time = match["time"] or match["time2"] or match["time3"]
        return _duration(time)
    if match := _TEXT_DATE.search(text):
        return seconds_until(f"{match[1]}T{match[2]}Z", now)
    return None


def _resets(headers: Mapping[str, str], now: float) -> float | None:
    """Return the longest reset of the dimensions of which nothing remains; a reset without `remaining` counts too."""
    found = []
    if match := _RATELIMIT_T.search(headers.get("ratelimit", "")):
        found.append(float(match[1]))
    for name, value in headers.items():
        if _RESET.fullmatch(name) is None:
            continue
        remaining = _number(headers.get(name.replace("reset", "remaining"), "0"))
        if remaining is None or remaining >= 1:
            continue
        seconds = seconds_until(value, now)
        limit = _number(headers.get(name.replace("reset", "limit"), ""))
        if seconds is not None and limit and _UNTIL_FULL.fullmatch(name) and _HAS_UNIT.search(value.lower()):
            seconds /= limit
        # A limit of 0 or -1 with a reset of 0 is no value (Azure).
        if seconds is not None and (limit is None or limit > 0) and (seconds > 0 or limit is not None):
            found.append(seconds)
    return max(found, default=None)


def seconds_until(value: str, now: float) -> float | None:
    """Return the seconds that a header's value means: a number, a duration, or a time compared with `now` (Unix time).

    None: it means none of them.
    """
    number = _number(value)
    if number is None:
        duration = _duration(value.lower())
        if duration is not None:
            return duration
        date = _date(value)
        return None if date is None else max(0.0, date - now)
    for unix_time in (number, number / 1000):
        if unix_time > _YEAR and abs(unix_time - now) < _YEAR:
            # A time that is long over was computed with another clock: it tells nothing.
            return max(0.0, unix_time - now) if unix_time > now - _PAST_SECONDS else None
    return number if number <= _MAX_SECONDS else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _duration(text: str) -> float | None:
    """Return the seconds of "1h2m3.4s", "20ms", "2 minutes" or .NET's "2.03:12:41"."""
    text = text[:80].strip()
    if match := re.fullmatch(_CLOCK, text):
        days, hours, minutes, seconds = (float(group or 0) for group in match.groups())
        return days * 86400 + hours * 3600 + minutes * 60 + seconds
    if re.fullmatch(_DURATION, text) is None:
        return None
    total = 0.0
    for number, unit in _PART.findall(text):
        total += float(number) * _UNITS[unit]
    return total


@lru_cache(4)  # it changes once a second
def date_header(text: str) -> float | None:
    """Return the Unix time of an answer's `Date`; None if it has none."""
    return _date(text) if text else None


def _date(text: str) -> float | None:
    """Return the Unix time of an HTTP date or of an RFC 3339 date with its time zone."""
    text = text[:40]
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):  # the standard library raises any of these
        pass
    try:
        date = datetime.fromisoformat(text)
        return date.timestamp() if date.tzinfo is not None else date.replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None
