"""Log lines for stderr: JSON for log collectors, plain text for a terminal. Only commands write to stdout."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Literal

import orjson

from sidecar.observe.format import visible
from sidecar.observe.log_writer import STDERR, LineHandler

#: Attributes that every log record has. All other attributes were passed with `extra` and are part of the line.
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats each record as one line with a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for a record."""
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES},
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # a lone surrogate: bytes of a header that are not UTF-8
            return json.dumps(line, default=str)


class HumanFormatter(logging.Formatter):
    """Formats a record as time, level (unless INFO) and message. Control characters are escaped: one line per event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for a record."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        extra = (f" {name}={value}" for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES)
        text = record.getMessage() + "".join(extra)
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{visible(text)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(kind: Literal["json", "human"] | None, level: str) -> None:
    """Send this process's log to stderr. If `kind` is None: human-readable on a terminal, otherwise JSON."""
    handler = LineHandler()
    human = kind == "human" or (kind is None and STDERR.descriptor is not None and os.isatty(STDERR.descriptor))
    handler.setFormatter(HumanFormatter() if human else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel("WARNING")
