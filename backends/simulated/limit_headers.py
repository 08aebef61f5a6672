"""The headers in which a simulated provider reports its limits, true or wrong as real providers' headers are wrong."""

from __future__ import annotations

from email.utils import formatdate
from math import ceil

from backends.simulated.quota import Quota

#: Unix time at the start of the loop's clock. It is fixed, so that answers depend only on the loop's clock.
_EPOCH = 1_767_225_600
_FACTORS = {"x5": 5.0, "x0.5": 0.5, "x0.1": 0.1}
#: The gateway's own limit as a multiple of the provider's.
_GATEWAY = 3.0


def limit_headers(variant: str, quota: Quota, now: float, calls: int) -> dict[str, str]:
    """Return the headers that report the limits of `quota`. `calls`: the calls so far, which a gateway counts too."""
    headers = {}
    for counts_tokens, report in quota.reports(now):
        kind = "tokens" if counts_tokens else "requests"
        factor = _FACTORS.get(variant, 1.0)
        limit, remaining, reset = factor * report.limit, factor * report.remaining, report.reset
        match variant:
            case "per-second":  # Together
                names = "x-tokenlimit" if counts_tokens else "x-ratelimit"
                per_second = report.limit / report.window
                headers[f"{names}-limit"] = _whole(per_second)
                headers[f"{names}-remaining"] = _whole(min(report.remaining, per_second))
                headers[f"{names}-reset"] = "1"
                continue
            case "epoch-s" | "epoch-ms":
                unit = 1000 if variant == "epoch-ms" else 1
                headers["Date"] = formatdate(_EPOCH + now, usegmt=True)
                headers[f"x-ratelimit-limit-{kind}-minute"] = _whole(limit / report.window * 60)
                headers[f"x-ratelimit-remaining-{kind}-minute"] = _whole(remaining)
                headers[f"x-ratelimit-reset-{kind}-minute"] = _whole((_EPOCH + now + reset) * unit)
                continue
            case "day-as-minute":  # Groq's requests, without a reset
                limit, remaining, reset = limit / report.window * 86400, limit / report.window * 86400 - calls, -1.0
            case "gateway":  # LiteLLM: a minute's count of its own, without a reset
                limit = _GATEWAY * limit / report.window * 60
                remaining, reset = limit - calls % limit, -1.0
            case "-1":
                limit = remaining = -1.0
        if not report.refills and reset >= 0:  # Envoy
            headers["x-ratelimit-limit"] = f"{_whole(limit)}, {_whole(limit)};w={_whole(report.window)}"
            headers["x-ratelimit-remaining"] = _whole(remaining)
            headers["x-ratelimit-reset"] = str(ceil(reset))
            continue
        headers[f"x-ratelimit-limit-{kind}"] = _whole(limit)
        headers[f"x-ratelimit-remaining-{kind}"] = _whole(remaining)
        if reset >= 0:
            headers[f"x-ratelimit-reset-{kind}"] = f"{reset:.3f}s"
    return headers


def _whole(number: float) -> str:
    return str(int(number + 1e-6))
