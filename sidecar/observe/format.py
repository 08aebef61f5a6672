"""Formats numbers and names for people, in the same way in every view."""

from __future__ import annotations


def number(value: float) -> str:
    """Return a number with three significant digits: 0.25, 16.2k, 1.3M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return a duration in the largest unit in which its value is at least 2: 119 s, 2 min, 3 h."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


#: Characters of the longest name that is shown.
_NAME_CHARACTERS = 64


def shown_name(name: str) -> str:
    """Return a name that a caller chose (a camera, a model) as printable ASCII of at most 64 characters."""
    escaped = name if name.isascii() and name.isprintable() else name.encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= _NAME_CHARACTERS else f"{escaped[: _NAME_CHARACTERS - 3]}..."


def visible(text: str) -> str:
    """Return text of a caller or provider on one line, with control characters escaped: a line break becomes `\\n`.

    So the text cannot move the cursor of a terminal.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
