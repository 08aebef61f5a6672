"""An API key in a file, which can be rotated while the process runs."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

_log = logging.getLogger(__name__)

_KEY = re.compile(r"[\x21-\x7e]+")


class KeyFile:
    """Reads a key from a file, and reads it again when the file changes.

    The file may be a symbolic link: Kubernetes rotates a Secret by replacing a link. The file is checked at most once
    per second. While the file is missing or contains no key, the last key stays in use.
    """

    def __init__(self, path: Path) -> None:
        """Read the key. Raises `OSError` if the file cannot be read, `ValueError` if it contains no key."""
        self._path = path
        self._state = _state(path)
        self._checked_at = time.monotonic()
        self._key = _key_in(path)

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
            except (OSError, ValueError) as error:
                _log.warning("the API key file has changed but cannot be used, the last key stays in use: %s", error)
        return self._key


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _key_in(path: Path) -> str:
    key = path.read_text("latin-1").strip()  # latin-1 decodes every byte; the pattern below rejects non-ASCII
    if not _KEY.fullmatch(key):
        raise ValueError(f"{path} holds no API key: one line of visible ASCII characters is expected")
    return key
