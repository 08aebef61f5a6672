"""Writes log lines in a thread of its own, so that a full pipe or a slow disk never blocks the event loop.

A write to stderr can block: the pipe's reader may have stopped, or the disk may hang. A non-blocking stderr is no
solution, because other processes can share its file description. So logging only puts each line into a bounded queue,
and one thread writes the lines in their order. A line that the queue or stderr does not accept is dropped and counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import sys
import threading
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

log = logging.getLogger("sidecar")

#: Maximum number of lines that wait for stderr: about 1 MB, because a line of the access log has about 500 bytes.
MAX_LINES = 2000
#: Seconds that the end of the process waits for a place in the queue, and then for the thread.
FLUSH_SECONDS = 1.0


class LogWriter:
    """The queue and the thread. The thread starts with the first line, and is a daemon: it never delays the exit."""

    def __init__(self, descriptor: int | None) -> None:
        """`descriptor` is the file descriptor to write to; None if stderr is closed: then every line is dropped."""
        self.descriptor = descriptor
        self._queue: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self._thread: threading.Thread | None = None
        self._not_queued = 0  # each counter is written at one place only: no lock is needed
        self._not_written = 0
        self._reported = 0

    def __repr__(self) -> str:
        return f"<LogWriter descriptor={self.descriptor} waiting={self._queue.qsize()} dropped={self.dropped}>"

    @property
    def dropped(self) -> int:
        """The number of lines that were dropped since the start."""
        return self._not_queued + self._not_written

    def put(self, line: str) -> None:
        """Add a line without its line break. Never blocks; a line for which there is no room is dropped."""
        try:
            self._queue.put_nowait(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
                self._thread.start()
        except (queue.Full, RuntimeError):  # RuntimeError: the process has no room for a thread
            self.drop()

    def drop(self) -> None:
        """Count a line that cannot even be queued."""
        self._not_queued += 1

    def close(self) -> None:
        """Write the lines that wait, and how many were lost, for at most 2 x `FLUSH_SECONDS`.

        A later line starts a new thread.
        """
        if self._thread is not None:
            self._report_lost()
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=FLUSH_SECONDS)
            thread.join(FLUSH_SECONDS)

    def _write_all(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._write(f"{line}\n".encode(errors="backslashreplace"))
            except OSError:  # a closed pipe, a full disk
                self._not_written += 1
            else:
                if self._queue.empty():
                    self._report_lost()

    def _report_lost(self) -> None:
        if self._reported != self.dropped:
            self._reported, since = self.dropped, self._reported
            log.warning("log lines that stderr did not accept and that are lost: %d", self._reported - since)

    def _write(self, data: bytes) -> None:
        if self.descriptor is None:
            raise OSError
        while data:
            try:
                data = data[os.write(self.descriptor, data) :]
            except BlockingIOError:  # a process that shares the file description has made it non-blocking
                select.select([], [self.descriptor], [])


#: The writer of this process. Python has no `sys.__stderr__` if the process was started with stderr closed. Then a file
#: or a connection can get the number 2, so nothing may be written to it.
STDERR = LogWriter(None if sys.__stderr__ is None else sys.__stderr__.fileno())


class LineHandler(logging.Handler):
    """Formats each record in the thread that logs it, and passes the line to `STDERR`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the line on. A record that cannot be formatted is counted; logging's own report of it could block."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  a value's own `__str__` can fail in any way
            STDERR.drop()
        else:
            STDERR.put(line)


class DroppedLines(Collector):
    """The metric `sidecar_log_lines_dropped_total`."""

    def collect(self) -> Iterator[Metric]:
        """Return the number of lines that this process has dropped."""
        yield CounterMetricFamily("sidecar_log_lines_dropped", "Log lines that stderr did not accept.", STDERR.dropped)
