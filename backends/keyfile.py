"""An API key in a file, which can be rotated while the process runs."""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from pathlib import Path

_log = logging.getLogger(__name__)

_KEY = re.compile(r"[\x21-\x7e]+")
#: Bytes. A longer file holds no key; the longest keys that providers use (signed tokens) have a few thousand.
MAX_BYTES = 64 * 1024


class KeyFile:
    """Reads a key from a file, and reads it again when the file changes.

    The file may be a symbolic link: Kubernetes rotates a Secret by replacing a link. The file is checked at most once
    per second. While the file is missing or contains no key, the last key stays in use, and the log says so once for
    each reason.
    """

    def __init__(self, path: Path) -> None:
        """Read the key. Raises `OSError` if the file cannot be read, `ValueError` if it is no file with a key."""
        self._path = path
        self._state = _state(path)
        self._checked_at = time.monotonic()
        self._key = _key_in(path)
        self._logged = ""

    def __call__(self) -> str:
        """Return the current key."""
        now = time.monotonic()
        if now - self._checked_at >= 1:
            self._checked_at = now
            try:
                state = _state(self._path)
                if state != self._state:
                    self._key = _key_in(self._path)
                    self._state = state
                self._logged = ""
            except (OSError, ValueError) as error:
                if str(error) != self._logged:
                    self._logged = str(error)
                    _log.warning("the API key file cannot be used now, the last key stays in use: %s", error)
        return self._key


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _key_in(path: Path) -> str:
    """Read the key. The open does not wait: a pipe (FIFO) without a writer would stop the process for ever."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is not a regular file: name a file that holds the key")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} is longer than {MAX_BYTES} bytes: a file with one key is expected")
    key = data.decode("latin-1").strip()  # latin-1 decodes every byte; the pattern below rejects non-ASCII
    if not _KEY.fullmatch(key):
        raise ValueError(f"{path} holds no API key: one line of visible ASCII characters is expected")
    return key
