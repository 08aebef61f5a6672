"""Finds settings that have no effect, and signs that a real backend was intended."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from sidecar.settings.fields import FOREIGN_NAMES, NOT_YET, PREFIX, Settings
from sidecar.settings.sources import SERVICE_LINK, SettingsError, named, with_unusable_ports_removed, without_waiting

_KNOWN = [PREFIX + field.upper() for field in (*Settings.model_fields, *NOT_YET) if field != "upstream"]
#: The names that Kubernetes creates for a service, for example one whose name begins with `sidecar` or `trio`.
_SERVICE_NAME = re.compile(r"(?:\w+_)?(?:SERVICE_(?:HOST|PORT(?:_\w+)?)|PORT_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)")
_SERVICE_PORT = re.compile(r"(?:\w+_)?PORT")
#: The settings that only a real backend uses.
_REAL_BACKEND = ("local_model", "dashscope_native_url", "dashscope_model")
#: Bytes of the longest `.env` file that is searched for names.
_MAX_DOTENV_BYTES = 64 * 1024
_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?(\w+)\s*=\s*(.*)")


def missing_folder(settings: Settings, origins: Mapping[str, str]) -> str | None:
    """Return one line if the state file cannot be written, because its folder does not exist.

    This is no error: a volume may be mounted later, and without the file the limits are only learned again.
    """
    file = settings.state_file
    if file is None or file.parent.is_dir():
        return None
    name = named("state_file", origins["state_file"])
    return f"{name}={file}: the folder {str(file.parent)!r} does not exist; create it, or learned limits are not kept"


def open_to_all(settings: Settings, origins: Mapping[str, str]) -> str | None:
    """Return one line if other machines can reach the data listener and callers need no key."""
    if settings.api_key is not None or _is_local(settings.host):
        return None
    name = named("host", origins["host"])
    return (
        f"{name}={settings.host}: other machines may reach the data listener, and callers need no key: everybody who "
        "reaches it can spend the provider's account; set SIDECAR_API_KEY, or SIDECAR_HOST=127.0.0.1"
    )


def _is_local(host: str) -> bool:
    """Return whether a listener at this host takes connections only from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost" or host.lower().endswith(".localhost")


def notices(environ: Mapping[str, str], folder: Path) -> Iterator[str]:
    """Yield one line for each group of names that have no effect. No line contains a value of the operator's.

    `folder` is the working folder: trio-core reads a `.env` file there.
    """
    usable = with_unusable_ports_removed(environ)
    for name in sorted(environ.keys() - usable.keys()):
        yield f"{name}=tcp://… is ignored: Kubernetes creates it for a service of that name"
    for name, value in sorted(environ.items()):
        if not name.upper().startswith(PREFIX) or name in _KNOWN or _is_of_a_service(name, value):
            continue
        near = get_close_matches(name.upper(), _KNOWN, 1)
        advice = f"{near[0]} is one" if near else "the README lists them all"
        yield f"{name} is no setting and has no effect; {advice}"
    if unused := sorted(name for name in environ if _is_unused_of_trio(name, environ[name])):
        yield f"not used by the sidecar: {', '.join(unused)}; docs/trio-core.md lists the names of trio-core that are"
    in_file = sorted(_names_in_dotenv(folder) - {name.upper() for name in environ})
    if in_file:
        yield f"the sidecar does not read .env in the working folder, which sets {', '.join(in_file)}"


def refuse_unintended_simulation(
    settings: Settings, origins: Mapping[str, str], environ: Mapping[str, str], folder: Path
) -> None:
    """Raise `SettingsError` if answers would be made up although something shows that a real backend was intended.

    Answers are made up if no backend is named and neither a URL nor a key is set. An operator who wants that names the
    backend `simulated`.
    """
    if settings.backend is not None or settings.backend_names != ["simulated"]:
        return
    if in_file := sorted(_names_in_dotenv(folder) - {name.upper() for name in environ}):
        raise SettingsError(
            f".env in the working folder sets {', '.join(in_file)}, but the sidecar does not read this file: put the "
            "values into the environment (set -a; . ./.env; set +a), or set SIDECAR_BACKEND=simulated"
        )
    for field in _REAL_BACKEND:
        if field in origins:
            backend = (
                "SIDECAR_BACKEND=local"
                if field == "local_model"
                else "SIDECAR_DASHSCOPE_URL or SIDECAR_DASHSCOPE_API_KEY"
            )
            raise SettingsError(
                f"{named(field, origins[field])} is set, but no backend would use it: set {backend}, or "
                "SIDECAR_BACKEND=simulated for answers that are made up"
            )


def _is_unused_of_trio(name: str, value: str) -> bool:
    upper = name.upper()
    is_set = bool(value.strip()) and not _is_of_a_service(name, value)
    return upper.startswith("TRIO_") and upper not in FOREIGN_NAMES and is_set


def _is_of_a_service(name: str, value: str) -> bool:
    """Return whether Kubernetes creates such a variable for a service."""
    is_port = _SERVICE_PORT.fullmatch(name) is not None and SERVICE_LINK.fullmatch(value) is not None
    return is_port or _SERVICE_NAME.fullmatch(name) is not None


def _names_in_dotenv(folder: Path) -> set[str]:
    """Return the names of settings that a `.env` file gives a value, in upper case. Without such a file: none."""
    try:
        with open(folder / ".env", "rb", opener=without_waiting) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                return set()
            text = opened.read(_MAX_DOTENV_BYTES).decode(errors="replace")
    except OSError:
        return set()
    found = (_ASSIGNMENT.fullmatch(line) for line in text.splitlines())
    names = {match[1].upper() for match in found if match is not None and match[2].strip().strip("'\"")}
    return {name for name in names if name.startswith(("TRIO_", PREFIX)) or name == "DASHSCOPE_API_KEY"}
