"""Merges the sources of settings: option, environment, file, default. Every error is one plain line."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from backends.registry import NAMES
from sidecar.settings.fields import FOREIGN_NAMES, NOT_YET, PASSWORD, PREFIX, SECRETS, Settings

#: Bytes of the longest file with settings. A longer file is a mistake in its name.
_MAX_FILE_BYTES = 1 << 20
#: Characters of a value that an error shows.
_SHOWN_CHARACTERS = 80
#: The value of a variable that Kubernetes creates for a service, for example `SIDECAR_PORT` for a service `sidecar`.
SERVICE_LINK = re.compile(r"(?:tcp|udp|sctp)://\S+", re.IGNORECASE)
#: A secret, or the file of a secret. Blank values are errors: otherwise an empty variable would open the listener.
_NEVER_BLANK = SECRETS | {"dashscope_api_key_file"}


class SettingsError(Exception):
    """A setting cannot be used. The message is one line that names the setting."""


def load(
    options: Mapping[str, Any], environ: Mapping[str, str] = os.environ, file: Path | None = None
) -> tuple[Settings, dict[str, str]]:
    """Merge the sources. Return the settings, and for each field that was set the name of its source.

    Raises `SettingsError`.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def set_field(field: str, value: Any, origin: str) -> None:
        values[field] = value
        origins[field] = origin

    for field, value in (_read(file) if file is not None else {}).items():
        if field in NOT_YET:
            name = "[upstream.NAME]" if field == "upstream" else PREFIX + field.upper()
            raise SettingsError(f"{name} (from {file}): {NOT_YET[field]}")
        set_field(field, value, f"{file}")
    for field, why in NOT_YET.items():
        if environ.get(PREFIX + field.upper()):
            raise SettingsError(f"{PREFIX + field.upper()}: {why}")
    environ = with_unusable_ports_removed(environ)
    for name, field in FOREIGN_NAMES.items():
        if value := _foreign(environ, name).strip():
            set_field(field, value, name)
    for field in Settings.model_fields:
        name = PREFIX + field.upper()
        if (value := environ.get(name)) is None:
            continue
        if value.strip():
            set_field(field, value, name)
        elif field in _NEVER_BLANK:
            raise SettingsError(f"{name}: is empty: give the secret, or remove the variable")
    for field, value in options.items():
        set_field(field, value, option_name(field))
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise SettingsError(_one_line(error, origins)) from None
    _check(settings, origins)
    return settings, origins


def option_name(field: str) -> str:
    """Return the command-line option of a setting."""
    return "--" + field.replace("_", "-")


def with_unusable_ports_removed(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the ports that Kubernetes creates for a service, such as `tcp://10.0.0.7:8100`.

    Kubernetes sets `SIDECAR_PORT` in every pod if a service is named `sidecar`, and `SIDECAR_ADMIN_PORT` if one is
    named `sidecar-admin`.
    """
    ports = (f"{PREFIX}PORT", f"{PREFIX}ADMIN_PORT")
    return {name: value for name, value in environ.items() if name not in ports or not SERVICE_LINK.fullmatch(value)}


def _foreign(environ: Mapping[str, str], name: str) -> str:
    """Return the value of another program's variable. trio-core reads its names in upper and lower case."""
    if name in environ or not name.startswith("TRIO_"):
        return environ.get(name, "")
    return next((value for given, value in environ.items() if given.upper() == name), "")


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text_of(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and thousands of brackets
        raise SettingsError(f"--config {file}: is not TOML: {str(error)[:_SHOWN_CHARACTERS]}") from None


def without_waiting(name: str, flags: int) -> int:
    """Open a file for `open`, without waiting for the other end if it is a pipe."""
    return os.open(name, flags | os.O_NONBLOCK)


def _text_of(file: Path) -> str:
    """Read a regular file. A pipe without a writer would stop the start for ever, so it is refused."""
    with open(file, "rb", opener=without_waiting) as opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_FILE_BYTES:
            raise OSError(0, f"it must be a regular file of at most {_MAX_FILE_BYTES} bytes")
        return opened.read().decode()


def _one_line(error: ValidationError, origins: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    where = origins.get(field, PREFIX + field.upper())
    if first["type"] == "extra_forbidden":
        near = get_close_matches(field, Settings.model_fields, 1)
        return f"{where}: {field} is no setting{f'; {near[0]} is one' if near else ''}; the README lists them all"
    # The fields' own checks raise every error; pydantic's own texts are for programmers.
    why = first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else "cannot be used"
    shown = "" if field in SECRETS else f" (it is {_shown(first['input'])})"
    return f"{named(field, where)}: {why}{shown}"


def _shown(value: Any) -> str:
    return repr(PASSWORD.sub("***", str(value))[:_SHOWN_CHARACTERS])


def named(field: str, where: str) -> str:
    """Return the setting's name, and its source if that has another name."""
    name = PREFIX + field.upper()
    return name if where == name else f"{name} (from {where})"


def _check(settings: Settings, origins: Mapping[str, str]) -> None:
    """Check what a single value does not show. Raises `SettingsError`."""

    def fail(field: str, why: str) -> NoReturn:
        raise SettingsError(f"{named(field, origins.get(field, PREFIX + field.upper()))}: {why}")

    names = settings.backend_names
    choices = ", ".join(NAMES)
    for name in names:
        if not name:
            fail("backend", f"has a comma without a name beside it ({settings.backend!r}); choose from {choices}")
        if name not in NAMES:
            fail("backend", f"there is no backend {name!r}; choose from {choices}")
    if len(set(names)) < len(names):
        fail("backend", f"names a backend twice ({settings.backend!r}); name each once")
    if "local" in names and not settings.local_model:
        fail("local_model", "the local backend needs the folder of a model")
    if (file := settings.state_file) is not None:
        try:
            is_other = file.exists() and not file.is_file()
        except OSError as error:
            fail("state_file", f"{_shown(file)} cannot be used: {error.strerror}; name another file")
        if is_other:
            fail("state_file", f"{str(file)!r} is not a regular file; name another file")
