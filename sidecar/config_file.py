"""Loads the settings again while the sidecar runs: after SIGHUP, and when the file of `--config` has changed.

Either all changes are applied or none: an error, or a change that needs a restart, gives one log line and changes
nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sidecar.observe.metrics import Metrics
from sidecar.settings import PREFIX, Settings, SettingsError

log = logging.getLogger("sidecar")

#: Seconds between two looks at the file. A changed file is loaded when it was the same in two looks, so that a file
#: that is still being written is not loaded.
CHECK_SECONDS = 1.0
#: The settings that change without a restart. The others belong to parts that exist since the start: listeners,
#: backends, queues, limits.
RELOADABLE = frozenset(
    {
        "dashscope_model",
        "deadline",
        "stream_idle",
        "stream_max",
        "drain_timeout",
        "max_body_bytes",
        "key_header",
        "api_key",
        "default_max_tokens",
        "default_temperature",
        "default_top_p",
        "passthrough",
        "access_log",
        "log_format",
        "log_level",
    }
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the settings came from at the start."""

    file: Path
    load: Callable[[], Settings]
    """Merges option, environment and file again. Raises `SettingsError`."""


class ConfigFile:
    """Watches the file, and applies its changes."""

    def __init__(self, source: Source, current: Settings, apply: Callable[[Settings], None], metrics: Metrics) -> None:
        """`apply` gets settings that differ from the current ones only in `RELOADABLE`."""
        self._source = source
        self._current = current
        self._apply = apply
        self._metrics = metrics
        self._loaded_state = self._state()

    def __repr__(self) -> str:
        return f"<ConfigFile {str(self._source.file)!r}>"

    async def run(self) -> None:
        """Look at the file once a second, until cancelled."""
        seen = self._loaded_state
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            state = self._state()
            if state != self._loaded_state and state == seen:
                self.reload()
            seen = state

    def reload(self) -> None:
        """Load the settings and apply what has changed."""
        self._loaded_state = self._state()
        try:
            new = self._source.load()
        except SettingsError as error:
            self._refuse(str(error))
            return
        except Exception as error:  # a defect in reading must not end the sidecar, which serves with what it has
            log.exception("a defect in the sidecar")
            self._refuse(f"they cannot be read: {type(error).__name__}")
            return
        changed = {field for field in Settings.model_fields if getattr(new, field) != getattr(self._current, field)}
        if "api_key" in changed and new.api_key is None:  # an emptied file must not open the listener
            self._refuse(f"{PREFIX}API_KEY is missing now: to remove it needs a restart; to change it needs none")
            return
        if needs_restart := changed - RELOADABLE:
            names = ", ".join(sorted(PREFIX + field.upper() for field in needs_restart))
            self._refuse(f"{names} can change only with a restart")
            return
        self._current = new
        self._apply(new)
        self._metrics.config_reloaded(success=True)
        names = ", ".join(sorted(PREFIX + field.upper() for field in changed)) or "nothing"
        log.info("the settings are loaded again; changed: %s", names)

    def _refuse(self, why: str) -> None:
        self._metrics.config_reloaded(success=False)
        log.error("the settings are not loaded again, and nothing has changed: %s", why)

    def _state(self) -> tuple[int, int, int] | None:
        """Return what shows a change of the file; None while it is missing. Kubernetes replaces a link to it."""
        try:
            found = self._source.file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
