"""Reads the limits that a provider reports in the headers of its answers: limit, window, remaining and reset.

Every answer pays for this, so a header that is not in the table costs one look-up, and a reset is read only if its
value is needed. The values can be wrong (cached, those of another key): the reader only drops what cannot be a limit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import inf
from typing import Literal, NamedTuple

from backends.base import ReportedLimit
from backends.remote.public_words import public_header
from backends.remote.waits import date_header, seconds_until

#: A limit outside of these numbers is no limit.
_MIN_LIMIT, _MAX_LIMIT = 1.0, 1e9
#: Seconds of each unit of time in a header's name.
_WINDOWS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0, "month": 30 * 86400.0, "year": 365 * 86400.0}
_MINUTE = 60.0
#: A derived window that differs from a usual window by at most this share is that window: providers round the reset.
_ROUNDING = 0.2
#: Seconds. A shorter reset is rounded too much to show the window: resets have whole milliseconds.
_MIN_RESET = 0.002
#: Seconds. A longer reset, a negative one, `nan` and `inf` are no values. (A year is the longest window.)
_MAX_RESET = 366 * 86400.0
#: Share of a limit. While more remains, the reset is not needed.
_LITTLE = 0.02
#: Maximum number of limits that a reader remembers. More come only from a provider that varies the names.
_MAX_KNOWN = 64

_ROLE = r"(?P<role>limit|remaining|reset)"
_KIND = r"(?P<kind>requests|req|tokens)"
_WINDOW = r"(?P<count>\d{1,6})?-?(?P<window>second|minute|hour|day|month|year)s?"


class _Row(NamedTuple):
    """One spelling. `tokens`: it counts LLM tokens, unless the name itself says what it counts."""

    names: re.Pattern[str]
    tokens: bool = False
    window: float | None = None
    """Seconds of the window, if neither the name nor a policy nor the reset shows it; None: unknown."""
    refills: bool | None = None
    """Whether the limit refills continuously; None: the form of the reset shows it."""


#: Every spelling, the most common first. Input and output tokens alone (Anthropic) are no dimension of ours.
_TABLE = (
    # OpenAI, Azure, Groq, xAI, and LiteLLM, which repeats the provider's own behind `llm_provider-`. The reset gives
    # the window. Azure and xAI send no reset: their limits are per minute. developers.openai.com "Rate limits",
    # console.groq.com/docs/rate-limits, docs.litellm.ai/docs/proxy/response_headers
    _Row(re.compile(rf"(?:llm_provider-)?x-ratelimit-{_ROLE}-{_KIND}"), window=_MINUTE),
    # Cerebras (`-requests-day`), Mistral (`-req-minute`, `-tokens-5-minute`).
    # inference-docs.cerebras.ai/support/rate-limits, github.com/mistralai/client-ts/issues/169
    _Row(re.compile(rf"(?:llm_provider-)?x-ratelimit-{_ROLE}-{_KIND}-{_WINDOW}")),
    # Anthropic: a bucket that is refilled continuously, per minute. docs.anthropic.com/en/api/rate-limits
    _Row(re.compile(rf"(?:llm_provider-)?anthropic-ratelimit-{_KIND}-{_ROLE}"), window=_MINUTE, refills=True),
    # Kong; developer.konghq.com/plugins/rate-limiting
    _Row(re.compile(rf"x-ratelimit-{_ROLE}-{_WINDOW}")),
    # Kong's and APISIX's plugins for models count LLM tokens: `-30-azure` is a window of 30 s.
    _Row(re.compile(rf"x-ai-ratelimit-{_ROLE}(?:-{_WINDOW})?(?:-[a-z][a-z0-9_]*)?"), tokens=True),
    _Row(re.compile(rf"x-ai-ratelimit-{_ROLE}-(?P<seconds>\d{{1,6}})(?:-[a-z0-9_]+)?"), tokens=True),
    # Envoy, Together, OpenRouter; IETF drafts up to 06 without `x-`. The window is in a policy behind the limit.
    _Row(re.compile(rf"(?:x-)?rate-?limit-{_ROLE}")),
    # Together's LLM tokens, per second; docs.together.ai "Rate limits"
    _Row(re.compile(rf"x-tokenlimit-{_ROLE}"), tokens=True, window=1.0),
    # Mistral's older names
    _Row(re.compile(rf"(?:x-)?ratelimitbysize-{_ROLE}(?:-{_WINDOW})?"), tokens=True),
    # LiteLLM's own limits, of a key, a team or a model, per minute
    _Row(re.compile(rf"x-ratelimit-[a-z_]+-{_ROLE}-{_KIND}"), window=_MINUTE),
    # IETF drafts from 07 on: all values in `RateLimit`, the windows in `RateLimit-Policy`
    _Row(re.compile(r"ratelimit(?P<structured>)|ratelimit-policy(?P<policy>)")),
)  # fmt: skip

#: One policy of a structured value: `100;w=60`, `"default";q=100;w=60`.
_POLICY = re.compile(r"""(?:^|,)\s*(?:"[^"]{0,80}"|(?P<number>\d{1,10}))(?P<rest>[^,]{0,200})""")
_PARAMETER = re.compile(r"\b(?P<name>limit|remaining|reset|q|r|t|w)\s*=\s*(?P<value>\d{1,10})")


class _Name(NamedTuple):
    """What a header's name says."""

    series: str
    """The name with `limit` for its role: it is the same for the headers that belong together. `/status` shows it, so
    each part that is no known word is a hash."""
    role: int
    tokens: bool
    window: float | None
    """The window that the name gives."""
    row: _Row


#: What a header contains. `_VALUE` and `_POLICIES` are the two headers of the newer IETF drafts.
_LIMIT, _REMAINING, _RESET, _POLICIES, _VALUE = range(5)
_ROLES = {"limit": _LIMIT, "remaining": _REMAINING, "reset": _RESET}


class _Known:
    """What is known of one limit while its number stays the same."""

    __slots__ = (
        "dimension", "enough", "limit", "maximum", "refills", "row", "series", "shown", "used", "window",
    )  # fmt: skip

    def __init__(self, name: _Name, limit: float | None, window: float | None) -> None:
        self.series, self.row = name.series, name.row
        self.dimension: Literal["request_rate", "token_rate"] = "token_rate" if name.tokens else "request_rate"
        self.limit = limit if limit is not None and _MIN_LIMIT <= limit <= _MAX_LIMIT else None
        """None: no valid limit."""
        self.window = window
        self.shown = window is not None
        """True: the name or a policy gives the window, so the reset need not."""
        self.used = 0.0
        """The used share of the limit when the reset was last read. It is read again when this share has doubled."""
        self.refills = name.row.refills or False
        self.maximum = self.limit or 0.0
        self.enough = inf
        """While more than this remains, the reset is not needed."""


#: Makes the tuple without the generated `__new__`, which takes twice as long.
_new: Callable[[type[ReportedLimit], tuple[object, ...]], ReportedLimit] = tuple.__new__


class LimitReader:
    """Reads the limits that one provider reports. Remembers each limit's window, so that it is derived seldom."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], _Known] = {}

    def read(self, headers: Mapping[str, str]) -> tuple[ReportedLimit, ...]:
        """Return the valid limits that the headers of an answer report. Never raises."""
        found: dict[str, list[str]] | None = None
        for given, value in headers.items():
            name = _name_of(given)
            if name is not None:
                if found is None:
                    found = {}
                values = found.get(name[0])
                if values is None:
                    values = found[name[0]] = ["", "", "", "", "", given]
                values[name[1]] = value
        if found is None:
            return ()
        limits = []
        for series, values in found.items():
            if values[_VALUE] or values[_POLICIES]:
                values[_LIMIT], values[_REMAINING], values[_RESET] = _structured(values[_VALUE], values[_POLICIES])
            key = series, values[_LIMIT], values[_POLICIES]
            known = self._known.get(key)
            if known is None:
                known = self._learn(key, values, headers)
            elif known.enough < inf:
                try:
                    remaining = float(values[_REMAINING])
                except ValueError:
                    continue
                if known.enough < remaining <= known.maximum:
                    same = known.series, known.dimension, known.maximum, known.window, remaining, None, known.refills
                    limits.append(_new(ReportedLimit, same))
                    continue
            if known.limit is not None and (limit := _reported(known, values, headers)) is not None:
                limits.append(limit)
        return tuple(limits)

    def _learn(self, key: tuple[str, str, str], values: list[str], headers: Mapping[str, str]) -> _Known:
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        name = _name_of(values[5])
        if name is None:
            raise RuntimeError("a header without a limit was found")
        text = values[_LIMIT]
        limit = _number(text)
        policies = values[_POLICIES] or (text if ";" in text else headers.get("ratelimit-policy", ""))
        known = self._known[key] = _Known(name, limit, name.window or _policy_window(policies, limit))
        return known


def _reported(known: _Known, values: list[str], headers: Mapping[str, str]) -> ReportedLimit | None:
    """Return one limit; None if what remains of it is no valid value."""
    limit, remaining, reset = known.limit or 0.0, None, None
    if text := values[_REMAINING]:
        remaining = _number(text)
        if remaining is None or not 0 <= remaining <= limit:
            return None
    window, text = known.window, values[_RESET]
    if not known.shown:
        row = known.row
        if not text:
            window = row.window
        elif row.window is None:  # the reset is the end of the window, and the longest is the window
            reset = _reset(text, headers)
            window = known.window = max(window or 0.0, _usual(reset)) if reset else window
        elif row.refills is None:
            # A duration ("6m0s") is the time until the quota is full (OpenAI, Groq); a number is the window's end. The
            # more was used, the more exact is the window.
            known.refills = text[-1] == "s"
            if known.refills and remaining is not None and 1.0 - remaining / limit > 2.0 * known.used:
                reset, known.used = _reset(text, headers), 1.0 - remaining / limit
                if reset is not None and reset >= _MIN_RESET:
                    window = known.window = _usual(reset / known.used)
            window = window or row.window
        else:
            window = row.window
    if text and reset is None and remaining is not None and not known.refills and remaining <= _LITTLE * limit:
        reset = _reset(text, headers)
    if remaining is not None and window is not None and (known.shown or known.row.window is not None):
        known.window = window
        known.enough = 0.0 if known.refills else _LITTLE * limit
        if known.refills and known.row.refills is None:
            known.enough = max(limit * (1.0 - 2.0 * known.used), 0.0)
    return ReportedLimit(known.series, known.dimension, limit, window, remaining, reset, known.refills)


def arrived_at(headers: Mapping[str, str]) -> float | None:
    """Return the Unix time in seconds at which the provider counted the request (DashScope); None: not reported."""
    text = headers.get("req-arrive-time")
    return float(text) / 1000 if text is not None and text.isdecimal() and len(text) == 13 else None


@lru_cache(512)
def _name_of(given: str) -> _Name | None:
    lower = given.lower()
    if "limit" not in lower or len(lower) > 100:
        return None
    for row in _TABLE:
        match = row.names.fullmatch(lower)
        if match is None:
            continue
        parts = match.groupdict()
        if "structured" in parts:
            return _Name("ratelimit", _POLICIES if parts["policy"] is not None else _VALUE, False, None, row)
        role, kind, unit = parts["role"], parts.get("kind"), parts.get("window")
        window = _WINDOWS[unit] * float(parts.get("count") or 1) if unit else float(parts.get("seconds") or 0)
        series = public_header(f"{lower[: match.start('role')]}limit{lower[match.end('role') :]}")
        return _Name(series, _ROLES[role], kind == "tokens" if kind else row.tokens, window or None, row)
    return None


def _structured(value: str, policies: str) -> tuple[str, str, str]:
    """Return limit, remaining and reset of IETF's `RateLimit` with `RateLimit-Policy`; empty: not there."""
    found = dict(_PARAMETER.findall(value[:400]))
    limit = found.get("limit") or _first_quota(policies)
    return limit, found.get("remaining") or found.get("r", ""), found.get("reset") or found.get("t", "")


@lru_cache(64)
def _first_quota(policies: str) -> str:
    match = _POLICY.search(policies[:400])
    return "" if match is None else match["number"] or dict(_PARAMETER.findall(match["rest"])).get("q", "")


def _policy_window(policies: str, limit: float | None) -> float | None:
    """Return the window in seconds of the policy with this limit (`10, 10;w=1, 1000;w=3600`); None: there is none."""
    for match in _POLICY.finditer(policies[:400]):
        parameters = dict(_PARAMETER.findall(match["rest"]))
        if "w" in parameters and limit == float(match["number"] or parameters.get("q", -1)):
            return float(parameters["w"]) or None
    return None


def _number(text: str) -> float | None:
    """Return the first number of a value; None if there is none."""
    try:
        return float(text)
    except ValueError:
        match = re.match(r"\s*(\d{1,12})\s*[,;]", text)
        return float(match[1]) if match else None


def _reset(text: str, headers: Mapping[str, str]) -> float | None:
    """Return the seconds until a reset: from 0 to `_MAX_RESET`; None if it is no valid value."""
    seconds: float | None
    try:  # the usual forms first, because they are read for each answer
        seconds = float(text[:-2]) / 1000 if text[-2:] == "ms" else float(text[:-1]) if text[-1:] == "s" else None
    except ValueError:
        seconds = None
    if seconds is None:
        now = date_header(headers.get("Date", ""))
        seconds = seconds_until(text.strip(), time.time() if now is None else now)
    return seconds if seconds is not None and 0.0 <= seconds <= _MAX_RESET else None


def _usual(window: float) -> float:
    """Return the usual window nearest to a derived one, because the reset is rounded; else the derived one."""
    nearest = min(_WINDOWS.values(), key=lambda usual: abs(usual - window))
    return nearest if abs(nearest - window) <= _ROUNDING * nearest else window
