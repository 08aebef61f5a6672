"""Log lines: JSON for collectors, or one human line each on a terminal. Always to stderr, stdout is for commands."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal

import orjson

from sidecar.observe.format import visible

#: What a record has by itself; anything else was given with `extra` and is told.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line."""
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _OWN},
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # half a character, as a header's bytes that are no UTF-8 become
            return json.dumps(line, default=str)


class HumanFormatter(logging.Formatter):
    """Time, level when it matters, and the message, with control characters made visible: a line is an event."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        extra = (f" {name}={value}" for name, value in vars(record).items() if name not in _OWN)
        text = record.getMessage() + "".join(extra)
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{visible(text)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(kind: Literal["json", "human"] | None, level: str) -> None:
    """Send this process's log to stderr. `kind` None: human on a terminal, else JSON."""
    handler = logging.StreamHandler(sys.stderr)
    human = kind == "human" or (kind is None and sys.stderr.isatty())
    handler.setFormatter(HumanFormatter() if human else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel("WARNING")
