"""Bounds the number of values in a JSON text before it is parsed.

A parser makes an object of 30 to 230 bytes for each value, and three bytes of text can be a value (`{}` and a comma).
So 14 MB of JSON could become 600 MB of objects, and parsing it would block the event loop for seconds. A bound on bytes
alone would have to be much smaller than a frame.
"""

from __future__ import annotations

#: Maximum number of values (objects, lists, strings, numbers) of one text. 100,000 objects with one field each need
#: 29 MB and 16 ms to parse (`bench/cost/json_values.py`). A chat of a million LLM tokens has some thousand values.
MAX_VALUES = 100_000


def may_have_too_many_values(data: bytes) -> bool:
    """Return whether parsing `data` could make more than about MAX_VALUES objects, or its strings look as if it could.

    Takes 1 ms for 1 MB.
    """
    return len(data) > MAX_VALUES and _structure(data, 0, len(data)) > MAX_VALUES


def has_too_many_values(data: bytes) -> bool:
    """Return whether parsing `data` could make more than about MAX_VALUES objects. Never raises.

    Takes about 3 ms for 1 MB of JSON, at most 9 ms if it has very many short strings (`bench/cost/json_values.py`).
    """
    if not may_have_too_many_values(data):
        return False
    # The text of a string may contain commas and brackets: count only outside of strings. Without escapes, each quote
    # begins or ends a string.
    data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    values = start = 0
    while values <= MAX_VALUES:
        quote = data.find(b'"', start)
        if quote < 0:
            return values + _structure(data, start, len(data)) > MAX_VALUES
        values += _structure(data, start, quote)
        start = data.find(b'"', quote + 1) + 1
        if start == 0:  # a string without an end: the parser will say so
            return False
    return True


def _structure(data: bytes, start: int, end: int) -> int:
    """Count what begins a value: each comma, and each bracket (the first value behind it has no comma)."""
    return data.count(b",", start, end) + data.count(b"{", start, end) + data.count(b"[", start, end)
