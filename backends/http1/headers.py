"""Write the head of an HTTP/1.1 message: its first line and its headers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache


@lru_cache(512)
def canonical_name(name: str) -> str:
    """Return a header's name in the spelling of this project, `Like-This`."""
    return name.title()


def head_of(first_line: str, headers: Mapping[str, str], more: str = "") -> bytes:
    """Return the head of an HTTP message.

    `more` contains headers that are already encoded, each with a line break before it. Raises `ValueError` if a header
    contains a line break, because it would start another header.
    """
    head = "\r\n".join([first_line, *[f"{name}: {value}" for name, value in headers.items()]])
    if not len(headers) == head.count("\n") == head.count("\r"):
        raise ValueError("a line break in a header would begin another one")
    return f"{head}{more}\r\n\r\n".encode(errors="surrogateescape")
