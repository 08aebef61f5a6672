"""The profile of a simulated provider: its limits, failures and latencies. It can be read from options or from JSON."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf, isfinite
from typing import Any, TypeVar, cast

T = TypeVar("T")

#: How a simulated provider reports its limits in headers. `true`, and what real headers get wrong: another number, a
#: day's limit read as a minute's, `-1`, values that never change, those of a gateway's own key.
LIMIT_HEADERS = (
    "true", "x5", "x0.5", "x0.1", "day-as-minute", "per-second", "-1", "frozen", "gateway", "epoch-s", "epoch-ms",
)  # fmt: skip


def _option(default: T, help: str, *, flag: str = "") -> T:
    return field(default=default, metadata={"help": help, "flag": flag})


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The behaviour of one provider. The default profile has no limits and no failures, and answers at once.

    The quotas apply to each model separately. All random values derive from `seed`: the same calls at the same times
    have the same outcomes.
    """

    requests_per_second: float = _option(inf, "requests/s that the token bucket refills", flag="--requests-per-second")
    burst_requests: float = _option(1.0, "requests that the bucket holds", flag="--burst")
    tokens_per_second: float = _option(inf, "LLM tokens/s, input and output together, charged when a request arrives")
    burst_tokens: float = _option(10_000.0, "LLM tokens that the bucket holds")
    window_requests: float = _option(inf, "requests in each fixed window, the first of which begins with the provider")
    window_seconds: float = _option(60.0, "length of the fixed window")
    sliding_requests: float = _option(inf, "requests in any stretch of the sliding window's length")
    sliding_seconds: float = _option(60.0, "length of the sliding window")
    concurrency: float = _option(inf, "requests in flight")
    growth_base_per_second: float = _option(
        inf, "growth rule: accepted requests of the last second <= BASE + factor x accepted/s over the time before"
    )
    growth_factor: float = _option(2.0, "growth rule: its factor")
    growth_memory_seconds: float = _option(10.0, "growth rule: the time before the last second that it looks at")
    refusals_cost_quota: bool = _option(False, "a refused request uses up quota too")
    punish_seconds: float = _option(0.0, "blackout that each refusal begins, also one within a blackout")
    others_share: float = _option(0.0, "share of the rates and windows that other tenants take, 0 to below 1")
    others_steady: bool = _option(False, "other tenants come at even intervals instead of by chance")
    billing_refused: bool = _option(False, "the account is out of money")

    outages: tuple[tuple[float, float], ...] = _option((), "outages as FROM-TO in seconds, such as 60-120, repeatable")
    outage_status: int = _option(0, "status in an outage: 0 breaks the connection, 503 is no capacity, 500 an error")
    error_share: float = _option(0.0, "share of accepted requests that end in a 500, 0 to 1")
    reset_share: float = _option(0.0, "share of accepted requests whose connection is reset in the middle, 0 to 1")
    moderation_share: float = _option(0.0, "share of accepted requests that content inspection refuses, 0 to 1")
    in_stream_errors: bool = _option(False, "errors of a streaming request come as a frame inside its 200 stream")
    vague_refusals: bool = _option(False, "a refusal says `Throttling` and not which limit it was")
    wordless_refusals: bool = _option(False, "a refusal is a 503 with a page that names no limit, as nginx's")
    retry_after: str = _option("", "Retry-After of a refusal: nothing, `honest`, or any text to be sent as it is")

    limit_headers: str = _option("", "limits in the headers of answers: nothing, or one of " + ", ".join(LIMIT_HEADERS))
    headers_vanish_seconds: float = _option(inf, "time after which answers no longer have them")

    latency_seconds: float = _option(0.0, "median time to a whole answer")
    latency_sigma: float = _option(0.0, "its spread: sigma of the logarithm")
    refusal_latency_seconds: float = _option(0.0, "time to a refusal")
    refusal_latency_spread_seconds: float = _option(0.0, "a refusal's time is even within plus or minus this")
    first_token_seconds: float = _option(-1.0, "median time to a stream's first content; negative: the latency")
    stream_tokens_per_second: float = _option(inf, "pace of a stream after its first content")
    answer_tokens: int = _option(40, "LLM tokens of an answer, unless max_tokens is less")

    changes: tuple[tuple[float, Mapping[str, object]], ...] = _option(
        (), "what is different from a time on: SECONDS:field=value,field=value, repeatable"
    )
    seed: int = _option(0, "what chance begins with")

    def __post_init__(self) -> None:
        """Check the values. Raises `ValueError` with the name of the invalid field."""
        for name in _NAMES:
            value = getattr(self, name)
            if not isinstance(value, int | float) or name == "seed":
                continue
            if name.endswith("_share") and not 0 <= value <= 1:
                raise ValueError(f"{name} must be within 0 and 1, not {value}")
            if name.endswith(("_per_second", "_requests", "_tokens")) and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
            if name != "first_token_seconds" and not value >= 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
            if name.endswith("_seconds") and not isfinite(value) and name != "headers_vanish_seconds":
                raise ValueError(f"{name} must be a number of seconds, not {value}")
        if self.limit_headers and self.limit_headers not in LIMIT_HEADERS:
            raise ValueError(f"limit_headers must be one of {', '.join(LIMIT_HEADERS)}, not {self.limit_headers}")
        if self.outage_status and not 400 <= self.outage_status <= 599:
            raise ValueError(f"outage_status must be 0 or within 400 and 599, not {self.outage_status}")
        for start, end in self.outages:
            if not 0 <= start < end:
                raise ValueError(f"outages must begin at 0 or later and end after that, not {start}-{end}")
        if self.others_share == 1:
            raise ValueError("others_share must be below 1: nothing would be left")
        for name in ("window_seconds", "sliding_seconds", "growth_memory_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for _, change in self.changes:
            if change.keys() & {"changes", "outages", "seed"}:
                raise ValueError("changes cannot hold changes, outages or a seed")
            changed(self, change)


_NAMES = tuple(item.name for item in fields(Profile))
_DEFAULTS: dict[str, object] = {item.name: item.default for item in fields(Profile)}


def changed(profile: Profile, values: Mapping[str, object]) -> Profile:
    """Return the profile with some fields replaced.

    The new values may be Python values, values from JSON, or text. None stands for the field's default.
    Raises `ValueError` with the name of an invalid or unknown field.
    """
    unknown = values.keys() - _DEFAULTS.keys()
    if unknown:
        raise ValueError(f"no such field of a profile: {', '.join(sorted(unknown))}")
    known: dict[str, Any] = {name: _read(name, value) for name, value in values.items()}
    return replace(profile, changes=(), **known) if "changes" not in known else replace(profile, **known)


def _read(name: str, value: object) -> object:
    default = _DEFAULTS[name]
    try:
        if value is None:
            return default
        if name == "outages":
            return tuple(_outage(item) for item in cast("Iterable[object]", value))
        if name == "changes":
            return tuple(_change(item) for item in cast("Iterable[object]", value))
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        kind = cast("type[int | float | str]", type(default))
        return kind(cast("Any", value))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{name} cannot be {value!r}") from error


def _outage(item: object) -> tuple[float, float]:
    start, end = item.split("-") if isinstance(item, str) else cast("Iterable[Any]", item)
    return float(start), float(end)


def _change(item: object) -> tuple[float, Mapping[str, object]]:
    if isinstance(item, str):
        at, _, rest = item.partition(":")
        return float(at), dict(cast("tuple[str, str]", part.split("=", 1)) for part in rest.split(","))
    at, values = cast("Iterable[Any]", item)
    return float(at), dict(values)


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add one option for each field of a profile to a command: `--latency 1.27`, `--outages 60-120`, …"""
    for item in fields(Profile):
        flag = item.metadata["flag"] or "--" + item.name.removesuffix("_seconds").replace("_", "-")
        about = item.metadata["help"].replace("%", "%%")
        if isinstance(item.default, bool):
            parser.add_argument(flag, dest=item.name, action="store_true", help=about)
        elif isinstance(item.default, tuple):
            parser.add_argument(flag, dest=item.name, action="append", default=[], metavar="SPAN", help=about)
        else:
            metavar = "SECONDS" if item.name.endswith("_seconds") else "TEXT" if item.type == "str" else "N"
            shown = "unlimited" if item.default == inf else item.default
            parser.add_argument(
                flag, dest=item.name, type=type(item.default), default=item.default, metavar=metavar,
                help=f"{about} (default: {shown})" if shown != "" else about,
            )  # fmt: skip


def profile_from(args: argparse.Namespace) -> Profile:
    """Return the profile that the options of `add_arguments` describe.

    Raises `ValueError` with the name of an invalid field.
    """
    return changed(Profile(), {name: getattr(args, name) for name in _NAMES})
