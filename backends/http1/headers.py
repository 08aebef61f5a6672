"""How the headers of an HTTP/1.1 message are written."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache


@lru_cache(512)
def canonical_name(name: str) -> str:
    """Return a header's name in the spelling `Like-This`."""
    return name.title()


def head_of(first_line: str, headers: Mapping[str, str], more: str = "") -> bytes:
    """Return the head of an HTTP message. Raises `ValueError` for a line break in it, which would begin another header.

    `more` contains headers that are already written, each after a line break.
    """
    head = first_line
    for name, value in headers.items():
        head += f"\r\n{name}: {value}"
    if not len(headers) == head.count("\n") == head.count("\r"):
        raise ValueError("a line break in a header would begin another one")
    return f"{head}{more}\r\n\r\n".encode(errors="surrogateescape")
