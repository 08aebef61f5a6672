"""Which of a provider's response headers may reach the caller."""

from __future__ import annotations

from collections.abc import Mapping

_PASSED = frozenset({"content-type", "content-language", "x-request-id", "request-id", "traceparent", "retry-after"})
_PASSED_PREFIXES = ("x-dashscope-", "openai-", "x-ratelimit-")


def end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    """Keep what means something to the caller: the type, request ids, the provider's own headers.

    An allow-list, so that `Set-Cookie`, hop-by-hop headers, lengths, encodings and whatever a gateway adds tomorrow
    stay behind.
    """
    return {name: value for name, value in headers.items() if _is_passed(name.lower())}


def _is_passed(name: str) -> bool:
    return name in _PASSED or name.startswith(_PASSED_PREFIXES)
