"""Measure the cost of reading the limits in an answer's headers, as a ratio to choosing the headers for the caller.

    python -m bench.cost.limit_headers

Prints microseconds per answer (the bound is 5) and the ratio, for answers without such headers and with usual kinds.
"""

from __future__ import annotations

import time
import timeit

from multidict import CIMultiDict

from backends.forwarded_headers import to_caller
from backends.remote.limit_headers import LimitReader

#: Headers that a provider behind a content delivery network sends besides.
COMMON = {
    "Date": "Mon, 02 Mar 2026 08:15:04 GMT", "Content-Type": "application/json", "Transfer-Encoding": "chunked",
    "Connection": "keep-alive", "Server": "edge", "Vary": "Origin", "Strict-Transport-Security": "max-age=31536000",
    "X-Request-Id": "6f1c", "X-Content-Type-Options": "nosniff", "CF-RAY": "9-AMS", "Alt-Svc": "h3=x",
    "Set-Cookie": "a=b", "openai-version": "2020-10-01", "openai-processing-ms": "463",
}  # fmt: skip
KINDS: dict[str, dict[str, str]] = {
    "none": {},
    "OpenAI": {
        "x-ratelimit-limit-requests": "30000", "x-ratelimit-remaining-requests": "28411",
        "x-ratelimit-reset-requests": "3.178s", "x-ratelimit-limit-tokens": "4000000",
        "x-ratelimit-remaining-tokens": "3871204", "x-ratelimit-reset-tokens": "1.931s",
    },
    "Anthropic": {
        f"anthropic-ratelimit-{kind}-{role}": value
        for kind in ("requests", "tokens")
        for role, value in (("limit", "4000"), ("remaining", "3120"), ("reset", "2026-03-02T08:15:17Z"))
    },
    "Envoy": {
        "x-ratelimit-limit": "100, 100;w=60", "x-ratelimit-remaining": "37", "x-ratelimit-reset": "21",
    },
    "IETF": {"RateLimit": '"a";r=37;t=21', "RateLimit-Policy": '"a";q=100;w=60'},
}  # fmt: skip
_CALLS, _ROUNDS = 2000, 15


def costs() -> dict[str, tuple[float, float]]:
    """Return microseconds per answer and their ratio to `to_caller`, by kind. The best of several rounds counts."""
    found = {}
    for kind, more in KINDS.items():
        headers = CIMultiDict({**COMMON, **more})
        reader = LimitReader()
        reading, choosing = (
            min(timeit.repeat(call, timer=time.process_time, number=_CALLS, repeat=_ROUNDS)) / _CALLS * 1e6
            for call in (lambda: reader.read(headers), lambda: to_caller(headers))  # noqa: B023  called at once
        )
        found[kind] = reading, reading / choosing
    return found


if __name__ == "__main__":
    for kind, (microseconds, ratio) in costs().items():
        print(f"{kind:<10} {microseconds:5.2f} µs   {ratio:.2f} times to_caller")
