"""Where learned limits survive a restart: one small file, `SIDECAR_STATE_FILE`.

A restart without it costs one burst of refusals; a restart under load with a limit that no longer holds costs more, so
what is remembered is believed the less the older it is. Each limit has an age of its own: one that nothing was learned
of since keeps the age at which it was, however often the sidecar starts.
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

VERSION = 1
SAVE_EVERY_SECONDS = 30.0
#: Limits in the file at most, the newest: callers name models as they like.
MAX_LIMITS = 256
#: Seconds up to which an age counts, and the share of a limit that is used then. docs/limiting.md, "StateFile".
SHARES = ((3600.0, 0.8), (86_400.0, 0.5))

#: What was learned about one model, by dimension: `{"requests": {"limit": 10.0, "burst": 5.0, "uncertainty": 0.01}}`.
Learned = dict[str, dict[str, float]]


class StateFile:
    """The file, and whose limits are in it.

    An upstream's limits are those of an account, named by its function: backend, host and a fingerprint of the key. It
    is asked at each saving, since a key may be rotated meanwhile.
    """

    def __init__(self, path: Path, admission: Admission, accounts: Mapping[str, Callable[[], str]]) -> None:
        """`accounts` gives, by the upstream's name, the function that names its account."""
        self._path = path
        self._admission = admission
        self._accounts = accounts
        self._known: dict[tuple[str, str], tuple[float, Learned]] = {}  # account, model: since when, what
        self._seen: dict[tuple[str, str], Learned] = {}  # as the admissions had it when last looked at
        self._warned: set[str] = set()

    def load(self) -> None:
        """Recall what the file has. One that is damaged or of another version is passed over with a warning."""
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
            for (whose, model), (at, learned) in self._known.items():
                if whose == name and (share := _share(now - at)):
                    self._admission.recall(upstream, {model: learned}, share)
        self._seen = self._current()

    def save(self) -> None:
        """Write what is known now, whole or not at all. Nothing is written where nothing was learned."""
        if (data := self._news()) is not None:
            self._write(data)

    async def run(self) -> None:
        """Save now and then, beside the event loop, until cancelled."""
        while True:
            await asyncio.sleep(SAVE_EVERY_SECONDS)
            if (data := self._news()) is not None:
                writing = asyncio.ensure_future(asyncio.to_thread(self._write, data))
                try:
                    await asyncio.shield(writing)
                finally:
                    await writing  # whoever cancels this saves once more, and must not be overtaken

    def _news(self) -> bytes | None:
        """The file's new content; None if it would say the same."""
        now = time.time()
        current = self._current()
        news = {whose: learned for whose, learned in current.items() if self._seen.get(whose) != learned}
        self._seen = current
        if not news:
            return None
        self._known |= {whose: (now, learned) for whose, learned in news.items()}
        of_use = [one for one in self._known.items() if _share(now - one[1][0])]
        self._known = dict(sorted(of_use, key=lambda one: one[1][0])[-MAX_LIMITS:])
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
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            beside.write_bytes(data)
            beside.replace(self._path)
        except OSError as error:
            self._warn("cannot be written", error.strerror)
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)  # a full disk takes a file's name and not its content

    def _warn(self, what: str, why: object) -> None:
        """Once for each: a file that cannot be written now will not be in 30 s."""
        if what not in self._warned:
            self._warned.add(what)
            log.warning("SIDECAR_STATE_FILE=%s %s: %s", self._path, what, why)


class _OtherVersionError(ValueError):
    """The file is of another version of the sidecar."""


def _share(age: float) -> float:
    """The share of a limit that counts at this age in seconds; 0 for none. A clock may have been set back a little."""
    return next((share for most, share in SHARES if -60.0 <= age <= most), 0.0)


def _read(path: Path) -> dict[tuple[str, str], tuple[float, Learned]]:
    """Raises `OSError`, or one of `ValueError`, `KeyError`, `TypeError` and `AttributeError` for another content."""
    data = orjson.loads(path.read_bytes())
    if data["version"] != VERSION:
        raise _OtherVersionError(f"its version is {data['version']!r:.20}, and {VERSION} is the one that is known")
    return {
        (str(one.pop("account")), str(one.pop("model"))): (float(one.pop("learned_at")), _learned(one))
        for one in data["limits"]
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
