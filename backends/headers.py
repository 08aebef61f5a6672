"""Headers: which of a provider's may reach the caller, and how a message's head is written."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

_PASSED = frozenset({"content-type", "content-language", "x-request-id", "request-id", "traceparent", "retry-after"})
_PASSED_PREFIXES = ("x-dashscope-", "openai-", "x-ratelimit-")


def end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    """Keep what means something to the caller: the type, request ids, the provider's own headers.

    An allow-list, so that `Set-Cookie`, hop-by-hop headers, lengths, encodings and whatever a gateway adds tomorrow
    stay behind.
    """
    return {name: value for name, value in headers.items() if _is_passed(name)}


@lru_cache(512)
def _is_passed(name: str) -> bool:
    name = name.lower()
    return name in _PASSED or name.startswith(_PASSED_PREFIXES)


def head_of(first_line: str, headers: Mapping[str, str]) -> bytes:
    """The head of an HTTP message. Raises `ValueError` for a line break in it, which would begin another header."""
    lines = [first_line, *map(": ".join, headers.items()), "\r\n"]
    head = "\r\n".join(lines)
    if not len(lines) == head.count("\n") == head.count("\r"):
        raise ValueError("a line break in a header would begin another one")
    return head.encode(errors="surrogateescape")
