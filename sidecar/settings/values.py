"""The kinds of values that settings have: each kind checks a value and says in one plain sentence what it must be.

A value is text (from an option or the environment) or a TOML value (text, number, boolean). Each function below
returns a function for `BeforeValidator`: it returns the checked value, or raises `ValueError`. Its text follows the
setting's name, for example "must be a whole number from 0 to 65535, such as 8100".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator

#: Seconds in one unit of time.
_SECONDS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
#: Bytes in one unit of size. `Mi` is how Kubernetes writes MiB.
_BYTES = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmg", 1)},
    **{f"{letter}i{b}": 1024**power for power, letter in enumerate("kmg", 1) for b in ("b", "")},
}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)", re.IGNORECASE)
_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")

Check = Callable[[Any], Any]


def _quantity(value: Any, units: dict[str, Any]) -> float | None:
    """Return a number, or a number with a unit, in the base unit. Return None if the value is neither."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return inf
    found = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        return None
    factor = units.get(found[2].lower()) if found[2] else 1
    return None if factor is None else round(float(found[1]) * factor, 9)


def seconds_of(text: str) -> float:
    """Return a duration in seconds: a number of seconds, or a number with a unit. Raises `ValueError`."""
    seconds = _quantity(text, _SECONDS)
    if seconds is None or not isfinite(seconds) or seconds <= 0:
        raise ValueError("must be a time above 0, such as 30s, 1m or 500ms")
    return seconds


def duration(*, least: float | None = None, most: float = inf) -> Check:
    """Check a duration in seconds. With `least` it may be that short; without, it must be above 0."""
    bound = "above 0" if least is None else f"of at least {least:g}"
    upto = "" if most == inf else f" and at most {most:g} s"

    def check(value: Any) -> float:
        seconds = _quantity(value, _SECONDS)
        if seconds is None or not isfinite(seconds) or seconds > most or seconds < (least or 0.0):
            raise ValueError(f"must be a time {bound}{upto}, such as 30s, 1m or 500ms; a number alone means seconds")
        if least is None and seconds == 0:
            raise ValueError(f"must be a time {bound}{upto}, such as 30s, 1m or 500ms; a number alone means seconds")
        return seconds

    return check


def size() -> Check:
    """Check a number of bytes, at least 1."""

    def check(value: Any) -> int:
        found = _quantity(value, _BYTES)
        if found is None or not 1 <= found < inf or found != int(found):
            raise ValueError("must be a size of at least 1 byte, such as 14MiB or 14MB; a number alone means bytes")
        return int(found)

    return check


def whole(least: int, most: int | None = None, *, example: str = "", auto: bool = False) -> Check:
    """Check a whole number. With `auto`, the word `auto` gives None: the sidecar learns the value."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    wanted = f"must be a whole number {bounds}{f', such as {example}' if example else ''}{', or auto' if auto else ''}"

    def check(value: Any) -> int | None:
        if auto and _is_auto(value):
            return None
        number = value
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", value):
            number = int(value)
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= (most or inf):
            raise ValueError(wanted)
        return number

    return check


def number(
    above: float | None = None, *, least: float | None = None, most: float = inf, example: str = "", auto: bool = False
) -> Check:
    """Check a number. With `auto`, the word `auto` gives None: the sidecar learns the value."""
    low = f"above {above:g}" if above is not None else f"of at least {least:g}" if least is not None else ""
    high = "" if most == inf else f"{' and ' if low else ''}at most {most:g}"
    wanted = f"must be a number {low}{high}{f', such as {example}' if example else ''}{', or auto' if auto else ''}"

    def check(value: Any) -> float | None:
        if auto and _is_auto(value):
            return None
        found = _quantity(value, {})
        fits = found is not None and isfinite(found) and found <= most
        if found is None or not fits or (above is not None and found <= above) or (least is not None and found < least):
            raise ValueError(wanted)
        return found

    return check


def _is_auto(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() == "auto")


def choice(*words: str) -> Check:
    """Check one of several words, in upper or lower case."""

    def check(value: Any) -> str | None:
        if value is not None and str(value).strip().lower() not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return None if value is None else str(value).strip().lower()

    return check


def _flag(value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in _YES + _NO:
        raise ValueError("must be true or false")
    return word in _YES


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a text that is not empty")
    return value.strip()


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _text_or_nothing(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text")  # noqa: TRY004  pydantic turns only a ValueError into an error of the field
    return value


def _path(value: Any) -> Path | None:
    if value is None or isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("must be the path of a file")
    return Path(value)


def _url(value: Any) -> str | None:
    """Check a base URL, below which the sidecar requests paths."""
    if value is None:
        return None
    text = value.strip() if isinstance(value, str) else ""
    wanted = "must be a URL that begins with http:// or https://, such as http://127.0.0.1:8000/v1"
    if not text.startswith(("http://", "https://")):
        raise ValueError(wanted)
    try:
        parts = urlsplit(text)
        if not parts.hostname or parts.port == 0:
            raise ValueError(wanted)  # noqa: TRY301
    except ValueError:  # a port that is no number, a bracket that is not closed
        raise ValueError(wanted) from None
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise ValueError("must be a base URL without a query and without a fragment: paths are put behind it")
    return text


def _key(value: Any) -> str | None:
    """Remove the line break that `echo` and files add to a key.

    Raises `ValueError` if a header cannot carry the key, or if it is blank: a blank key never means "no key".
    """
    if value is None:
        return None
    key = value.strip() if isinstance(value, str) else "not a text"
    if not key:
        raise ValueError("is empty: give the secret, or remove the setting")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("must be one line of visible ASCII characters")
    return key


def _header_name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9-]+", value.strip()):
        raise ValueError("must be the name of a header: letters, digits and '-', such as X-Camera-Id")
    return value.strip()


def _host_names(value: Any) -> str:
    names = [name.strip().removesuffix(".") for name in str(value).split(",") if name.strip()]
    if not all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names):
        raise ValueError("must be host names without scheme and port, such as cams.example.com,video.example.com")
    return ",".join(names)


Duration = Annotated[float, BeforeValidator(duration())]
DurationOrZero = Annotated[float, BeforeValidator(duration(least=0))]
Bytes = Annotated[int, BeforeValidator(size())]
Port = Annotated[int, BeforeValidator(whole(0, 65535, example="8100"))]
Count = Annotated[int, BeforeValidator(whole(1))]
CountOrAuto = Annotated[int | None, BeforeValidator(whole(1, auto=True))]
NumberOrAuto = Annotated[float | None, BeforeValidator(number(0, auto=True))]
Flag = Annotated[bool, BeforeValidator(_flag)]
Text = Annotated[str, BeforeValidator(_text)]
TextOrNone = Annotated[str | None, BeforeValidator(_text_or_none)]
TextOrNothing = Annotated[str, BeforeValidator(_text_or_nothing)]
File = Annotated[Path | None, BeforeValidator(_path)]
Url = Annotated[str, BeforeValidator(_url)]
UrlOrNone = Annotated[str | None, BeforeValidator(_url)]
Key = Annotated[str | None, BeforeValidator(_key)]
HostNames = Annotated[str, BeforeValidator(_host_names)]
HeaderName = Annotated[str, BeforeValidator(_header_name)]
LogFormat = Annotated[Literal["json", "human"] | None, BeforeValidator(choice("json", "human"))]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"], BeforeValidator(choice("debug", "info", "warning", "error"))
]

#: What the help of a command shows in the place of a value: the first kind that a setting has.
METAVARS: tuple[tuple[Any, str], ...] = (
    (CountOrAuto, "N|auto"),
    (NumberOrAuto, "N|auto"),
    (Duration, "TIME"),
    (Bytes, "SIZE"),
    (File, "FILE"),
)
