"""An API key that can be rotated under a running process."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

_log = logging.getLogger(__name__)

_KEY = re.compile(r"[\x21-\x7e]+")


class KeyFile:
    """A key in a file that is read again when it changes: a Kubernetes Secret is rotated by swapping a link.

    The file is looked at once a second at most. While it is missing or holds no key, the last one stays
    in use.
    """

    def __init__(self, path: Path) -> None:
        """Read the key. Raises OSError if the file cannot be read, ValueError if it holds no key."""
        self._path = path
        self._state = _state(path)
        self._looked = time.monotonic()
        self._key = _key_in(path)

    def __call__(self) -> str:
        """The key in force now."""
        now = time.monotonic()
        if now - self._looked >= 1:
            self._looked = now
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
    key = path.read_text("latin-1").strip()  # which takes any byte: what is none of ASCII's is found below
    if not _KEY.fullmatch(key):
        raise ValueError(f"{path} holds no API key: one line of visible ASCII characters is expected")
    return key
