"""Keeps learned limits over a restart, in one small file: `SIDECAR_STATE_FILE`.

A restart without the file costs one burst of refusals. A restart under load with an outdated limit costs more, so the
sidecar starts with a smaller share of an older limit. Each limit has its own age: the time since it was last learned. A
limit that was only loaded and saved again, without traffic, keeps its age.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from sidecar.admission import Admission

log = logging.getLogger("sidecar")

#: Version of the file format. The sidecar ignores a file with another version.
VERSION = 1
SAVE_EVERY_SECONDS = 30.0
#: Maximum number of limits in the file: the most recently learned ones. The bound is needed because callers can name
#: any number of models.
MAX_LIMITS = 256
#: Maximum age of a limit in seconds, and the share of the limit that the sidecar starts with. An older limit is not
#: used. Source: docs/limiting.md, "Limits per account and model, and the state file".
SHARES = ((3600.0, 0.8), (86_400.0, 0.5))

#: The learned limits of one model, by dimension: `{"requests": {"limit": 10.0, "burst": 5.0, "uncertainty": 0.01}}`.
Learned = dict[str, dict[str, float]]


class StateFile:
    """Loads and saves the learned limits of all upstreams.

    Each upstream comes with a function that returns the name of its account: backend, host and a fingerprint of the
    key. `save` calls the function each time, because the key may have been rotated.
    """

    def __init__(self, path: Path, admission: Admission, accounts: Mapping[str, Callable[[], str]]) -> None:
        """`accounts` maps the name of each upstream to the function that returns its account."""
        self._path = path
        self._admission = admission
        self._accounts = accounts
        self._known: dict[tuple[str, str], tuple[float, Learned]] = {}  # (account, model): time of learning, limits
        self._last_learned: dict[tuple[str, str], Learned] = {}  # limits at the last save or load
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<StateFile {str(self._path)!r} limits={len(self._known)} upstreams={len(self._accounts)}>"

    def load(self) -> None:
        """Load the file into admission. A damaged file, or one of another version, is ignored with a warning."""
        try:
            self._known = _read(self._path)
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn("cannot be read", error.strerror)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._warn("is ignored", error if isinstance(error, _OtherVersionError) else "it is damaged")
        now = time.time()
        for upstream, account in self._accounts.items():
            name = account()
            for (owner, model), (at, learned) in self._known.items():
                if owner == name and (share := _share(now - at)):
                    self._admission.recall(upstream, {model: learned}, share)
        self._last_learned = self._current()

    def save(self) -> None:
        """Write the file atomically. If nothing was learned since the last save, write nothing."""
        if (data := self._new_content()) is not None:
            self._write(data)

    async def run(self) -> None:
        """Save every 30 s until cancelled, in a thread so that the disk does not block the event loop."""
        while True:
            await asyncio.sleep(SAVE_EVERY_SECONDS)
            if (data := self._new_content()) is not None:
                writing = asyncio.ensure_future(asyncio.to_thread(self._write, data))
                try:
                    await asyncio.shield(writing)
                finally:
                    await writing  # after a cancel, `save` is called again; this older write must end before it

    def _new_content(self) -> bytes | None:
        """Return the file's new content; None if no limit has changed."""
        now = time.time()
        current = self._current()
        changed = {key: learned for key, learned in current.items() if self._last_learned.get(key) != learned}
        self._last_learned = current
        if not changed:
            return None
        self._known |= {key: (now, learned) for key, learned in changed.items()}
        usable = [item for item in self._known.items() if _share(now - item[1][0])]
        self._known = dict(sorted(usable, key=lambda item: item[1][0])[-MAX_LIMITS:])
        limits = [
            {"account": account, "model": model, "learned_at": at, **learned}
            for (account, model), (at, learned) in self._known.items()
        ]
        return orjson.dumps({"version": VERSION, "limits": limits})

    def _current(self) -> dict[tuple[str, str], Learned]:
        """Return what is known now, by account and model."""
        return {
            (name, model): learned
            for upstream, account in self._accounts.items()
            for name in (account(),)
            for model, learned in self._admission.learned(upstream).items()
        }

    def _write(self, data: bytes) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(data)
            temporary.replace(self._path)
        except OSError as error:
            self._warn("cannot be written", error.strerror)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # on a full disk, an empty file can remain

    def _warn(self, problem: str, reason: object) -> None:
        """Log each kind of problem once. After a failed write, the next one (30 s later) will probably fail too."""
        if problem not in self._warned:
            self._warned.add(problem)
            log.warning("SIDECAR_STATE_FILE=%s %s: %s", self._path, problem, reason)


class _OtherVersionError(ValueError):
    """Another version of the sidecar wrote the file."""


def _share(age: float) -> float:
    """Return the share of a limit to start with at this age (seconds); 0 if the limit is too old.

    An age down to -60 s is valid, because the clock may have been set back.
    """
    return next((share for max_age, share in SHARES if -60.0 <= age <= max_age), 0.0)


def _read(path: Path) -> dict[tuple[str, str], tuple[float, Learned]]:
    """Return the limits in the file.

    Raises `OSError`, and `ValueError`, `KeyError`, `TypeError` or `AttributeError` for invalid content.
    """
    data = orjson.loads(path.read_bytes())
    if data["version"] != VERSION:
        raise _OtherVersionError(f"its version is {data['version']!r:.20}, and {VERSION} is the one that is known")
    return {
        (str(entry.pop("account")), str(entry.pop("model"))): (float(entry.pop("learned_at")), _learned(entry))
        for entry in data["limits"]
    }


def _learned(dimensions: dict[str, Any]) -> Learned:
    learned = {
        dimension: {name: _positive(value) for name, value in values.items()}
        for dimension, values in dimensions.items()
    }
    for dimension, values in learned.items():
        if not values.keys() >= ({"limit"} if dimension == "concurrency" else {"limit", "burst", "uncertainty"}):
            raise ValueError(dimension)
    return learned


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < 1e12:
        raise ValueError(value)
    return number
