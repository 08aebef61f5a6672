"""The headers that are forwarded: from the caller to the provider, and from the provider to the caller.

Both are allow-lists. So `Set-Cookie`, credentials, hop-by-hop headers, lengths, encodings and any header that a gateway
may add in the future are not forwarded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from backends.http1.headers import canonical_name

_TO_PROVIDER = frozenset({"traceparent", "tracestate"})
_TO_PROVIDER_PREFIXES = ("x-dashscope-",)
_TO_CALLER = frozenset({"content-type", "content-language", "request-id", "traceparent", "retry-after"})
_TO_CALLER_PREFIXES = ("x-dashscope-", "openai-", "x-ratelimit-")
#: Headers in which providers send their own id of a request. The first one that is present counts.
_REQUEST_IDS = (
    "x-request-id", "request-id", "x-dashscope-request-id", "apim-request-id", "x-amzn-requestid", "x-amzn-request-id",
    "x-ms-request-id", "x-siliconcloud-trace-id", "x-trace-id", "x-generation-id", "cf-ray",
)  # fmt: skip
#: The name under which callers get that id: `X-Request-Id` is the caller's own.
UPSTREAM_REQUEST_ID = "X-Upstream-Request-Id"
_ID = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")


def to_provider(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the caller's headers that the provider gets. A value that is not ASCII is left out."""
    return {name: value for name, value in headers.items() if _goes_to_provider(name) and value.isascii()}


def to_caller(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the provider's headers that the caller gets: content type, request id and the provider's own headers.

    The names are spelled `Like-This`, so that a header of the sidecar can replace one of the provider. The provider's
    request id gets the name `X-Upstream-Request-Id`.
    """
    passed = {name: value for given, value in headers.items() if (name := _name_for_caller(given)) is not None}
    if request_id := upstream_request_id(headers):
        passed[UPSTREAM_REQUEST_ID] = request_id
    return passed


def upstream_request_id(headers: Mapping[str, str]) -> str:
    """Return the provider's own id of the request; empty if it sent none that is a plain token."""
    ids = {kind: value for given, value in headers.items() if (kind := _kind_of_id(given)) is not None}
    return next((value for _, value in sorted(ids.items()) if _ID.fullmatch(value)), "") if ids else ""


@lru_cache(512)
def _goes_to_provider(name: str) -> bool:
    name = name.lower()
    return name in _TO_PROVIDER or name.startswith(_TO_PROVIDER_PREFIXES)


@lru_cache(512)
def _kind_of_id(given: str) -> int | None:
    name = given.lower()
    return _REQUEST_IDS.index(name) if name in _REQUEST_IDS else None


@lru_cache(512)
def _name_for_caller(given: str) -> str | None:
    name = given.lower()
    return canonical_name(given) if name in _TO_CALLER or name.startswith(_TO_CALLER_PREFIXES) else None
