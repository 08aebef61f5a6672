"""Headers: which of a provider's may reach the caller, and how a message's head is written."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

_PASSED = frozenset({"content-type", "content-language", "x-request-id", "request-id", "traceparent", "retry-after"})
_PASSED_PREFIXES = ("x-dashscope-", "openai-", "x-ratelimit-")


@lru_cache(512)
def spelled(name: str) -> str:
    """A header's name as all of ours are spelled, `Like-This`, however it came."""
    return name.title()


def end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    """Keep what means something to the caller: the type, request ids, the provider's own headers.

    An allow-list, so that `Set-Cookie`, hop-by-hop headers, lengths, encodings and whatever a gateway adds tomorrow
    stay behind. Names are spelled `Like-This`, however they came: ours can take the place of the provider's.
    """
    return {name: value for given, value in headers.items() if (name := _passed_as(given)) is not None}


@lru_cache(512)
def _passed_as(given: str) -> str | None:
    name = given.lower()
    return spelled(given) if name in _PASSED or name.startswith(_PASSED_PREFIXES) else None


def head_of(first_line: str, headers: Mapping[str, str], more: str = "") -> bytes:
    """The head of an HTTP message. Raises `ValueError` for a line break in it, which would begin another header.

    `more` are headers that are written already, each behind a line break.
    """
    head = first_line
    for name, value in headers.items():
        head += f"\r\n{name}: {value}"
    if not len(headers) == head.count("\n") == head.count("\r"):
        raise ValueError("a line break in a header would begin another one")
    return f"{head}{more}\r\n\r\n".encode(errors="surrogateescape")
