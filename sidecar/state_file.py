"""Keeps learned limits over a restart, in one small file: `SIDECAR_STATE_FILE`.

A restart without the file costs one burst of refusals. A restart under load with an outdated limit costs more, so the
sidecar starts with a smaller share of an older limit. Each limit has its own age: the time since it was last learned. A
limit that was only loaded and saved again, without traffic, keeps its age. While the process runs, ages are measured
with the monotonic clock, so a jump of the wall clock changes none of them.

Only one process writes the file: the one that holds the lock (`flock`) on it. The file is replaced at each save, so the
lock moves to the new file each time. Another process only reads the file, until the first one has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from sidecar.admission import Admission

log = logging.getLogger("sidecar")

#: Version of the file format. The sidecar ignores a file with another version.
VERSION = 1
SAVE_EVERY_SECONDS = 30.0
#: Seconds between two log lines about the same problem.
WARN_EVERY_SECONDS = 3600.0
#: Maximum number of limits in the file: those of the models in use, then the most recently learned ones. The bound is
#: needed because callers can name any number of models.
MAX_LIMITS = 256
#: Maximum size in bytes of a file that is read. `MAX_LIMITS` limits need at most about 100 kB.
MAX_BYTES = 1024 * 1024
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
        self._known: dict[tuple[str, str], tuple[float, Learned]] = {}
        """(account, model): the time of learning on the monotonic clock, and the limits."""
        self._last_learned: dict[tuple[str, str], Learned] = {}  # limits at the last save or load
        self._is_unsaved = False  # whether something was learned that is not in the file
        self._locked: BinaryIO | None = None  # the file, while this process holds the lock on it
        self._said_shared = False
        self._warned_at: dict[str, float] = {}  # when each kind of problem was logged last, on the monotonic clock

    def __repr__(self) -> str:
        return f"<StateFile {str(self._path)!r} limits={len(self._known)} upstreams={len(self._accounts)}>"

    def load(self) -> None:
        """Load the file into admission. A damaged file, or one of another version, is ignored with a warning."""
        try:
            found = _read(self._path)
            self._lock()
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn("cannot be read", error.strerror)
            return
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._warn("is ignored", error if isinstance(error, _OtherVersionError) else "it is damaged")
            return
        wall, now = time.time(), time.monotonic()
        self._known = {key: (now - (wall - at), learned) for key, (at, learned) in found.items()}
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

    def close(self) -> None:
        """Save, and let another process write the file."""
        self.save()
        if self._locked is not None:
            self._locked.close()
            self._locked = None

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
        """Return the file's new content; None if the file has it."""
        now = time.monotonic()
        current = self._current()
        changed = {key: learned for key, learned in current.items() if self._last_learned.get(key) != learned}
        self._last_learned = current
        self._is_unsaved |= bool(changed)
        if not self._is_unsaved:
            return None
        self._known |= {key: (now, learned) for key, learned in changed.items()}
        usable = [item for item in self._known.items() if _share(now - item[1][0])]
        self._known = dict(sorted(usable, key=lambda item: (item[0] in current, item[1][0]))[-MAX_LIMITS:])
        wall = time.time()
        limits = [
            {"account": account, "model": model, "learned_at": wall - (now - at), **learned}
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
        """Replace the file, if no other process holds the lock on it. What cannot be written is tried again later."""
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            if not self._lock():
                return
            temporary.write_bytes(data)
            written = _open(temporary)
            _flock(written)
            try:
                temporary.replace(self._path)
            except OSError:
                written.close()
                raise
            if self._locked is not None:
                self._locked.close()
            self._locked, self._is_unsaved = written, False
        except OSError as error:
            self._warn("cannot be written", error.strerror)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # on a full disk, an empty file can remain

    def _lock(self) -> bool:
        """Lock the file. Return False if another process holds the lock; True also if no file exists. Raises `OSError`.

        A file system without locks never refuses one.
        """
        try:
            opened = _open(self._path)
        except FileNotFoundError:
            return True
        if self._locked is not None and os.path.samestat(os.fstat(self._locked.fileno()), os.fstat(opened.fileno())):
            opened.close()
            return True
        if not _flock(opened) or not os.path.samestat(os.fstat(opened.fileno()), self._path.stat()):
            opened.close()
            if not self._said_shared:
                self._said_shared = True
                log.warning("SIDECAR_STATE_FILE=%s is only read: another process writes it", self._path)
            return False
        if self._locked is not None:
            self._locked.close()
        self._locked = opened
        return True

    def _warn(self, problem: str, reason: object) -> None:
        """Log each kind of problem once an hour. After a failed write, the next one (30 s later) probably fails too."""
        now = time.monotonic()
        if now - self._warned_at.get(problem, -inf) >= WARN_EVERY_SECONDS:
            self._warned_at[problem] = now
            log.warning("SIDECAR_STATE_FILE=%s %s: %s", self._path, problem, reason)


class _OtherVersionError(ValueError):
    """Another version of the sidecar wrote the file."""


def _share(age: float) -> float:
    """Return the share of a limit to start with at this age (seconds); 0 if the limit is too old.

    An age down to -60 s is valid, because the clock may have been set back.
    """
    return next((share for max_age, share in SHARES if -60.0 <= age <= max_age), 0.0)


def _open(path: Path) -> BinaryIO:
    """Open the file without waiting: a pipe without a writer would stop the process for ever. Raises `OSError`."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def _flock(file: BinaryIO) -> bool:
    """Lock a file until it is closed. Return False if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _read(path: Path) -> dict[tuple[str, str], tuple[float, Learned]]:
    """Return the limits in the file.

    Raises `OSError`, and `ValueError`, `KeyError`, `TypeError` or `AttributeError` for invalid content.
    """
    with _open(path) as file:
        data = orjson.loads(file.read(MAX_BYTES))
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
