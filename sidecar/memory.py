"""Where learned limits survive a restart: one small file, `SIDECAR_STATE_FILE`.

A restart without it costs one burst of refusals; a restart under load with a limit that no longer holds costs more, so
what is remembered is believed the less the older it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from .admission import Admission

log = logging.getLogger("sidecar")

VERSION = 1
SAVE_EVERY_SECONDS = 30.0
#: Seconds up to which an age counts, and the share of a limit that is used then.
SHARES = ((3600.0, 0.8), (86_400.0, 0.5))


class Memory:
    """The file, and whose limits are in it: admissions by account (backend and address, never a key)."""

    def __init__(self, path: Path, admissions: Mapping[str, Admission]) -> None:
        self._path = path
        self._admissions = admissions

    def load(self) -> None:
        """Recall what the file has. A file that is damaged, too old or of another version is passed over, and told."""
        try:
            data = orjson.loads(self._path.read_bytes())
            if data["version"] != VERSION:
                log.warning("SIDECAR_STATE_FILE=%s is of version %.20r: ignored", self._path, data["version"])
                return
            age = time.time() - float(data["saved_at"])
            share = next((share for most, share in SHARES if -60.0 <= age <= most), None)
            if share is None:
                log.info("SIDECAR_STATE_FILE=%s is %.0f hours old: ignored", self._path, age / 3600)
                return
            for account, admission in self._admissions.items():
                admission.recall(_checked(data["accounts"].get(account, {})), share)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("SIDECAR_STATE_FILE=%s cannot be read: %s", self._path, error.strerror)
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("SIDECAR_STATE_FILE=%s is damaged: ignored", self._path)

    def save(self) -> None:
        """Write what is known now, whole or not at all."""
        accounts = {
            account: learned for account, admission in self._admissions.items() if (learned := admission.learned())
        }
        if not accounts:
            return
        data = orjson.dumps({"version": VERSION, "saved_at": time.time(), "accounts": accounts})
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            beside.write_bytes(data)
            beside.replace(self._path)
        except OSError as error:
            log.warning("SIDECAR_STATE_FILE=%s cannot be written: %s", self._path, error.strerror)

    async def run(self) -> None:
        """Save now and then, until cancelled."""
        while True:
            await asyncio.sleep(SAVE_EVERY_SECONDS)
            self.save()


def _checked(models: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Positive numbers where numbers belong, or `ValueError`, `TypeError` or `AttributeError`."""
    checked: dict[str, dict[str, dict[str, float]]] = {}
    for model, dimensions in models.items():
        checked[model] = {
            dimension: {name: _positive(value) for name, value in values.items()}
            for dimension, values in dimensions.items()
        }
        for dimension, values in checked[model].items():
            if "limit" not in values or (dimension != "concurrency" and "burst" not in values):
                raise ValueError(dimension)
    return checked


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < 1e12:
        raise ValueError(value)
    return number
