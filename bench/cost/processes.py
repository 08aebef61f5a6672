"""Start the processes to be measured, wait until they listen, read their use of resources, and end them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 60.0
#: Prefixes of environment variables that measured processes must not inherit: settings, proxies between them and the
#: upstream, and PYTHONDONTWRITEBYTECODE. Without bytecode files each start compiles all its imports, while an installed
#: sidecar has these files.
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
_NOT_OURS = ("SIDECAR_", "TRIO_", "DASHSCOPE", "PYTHONDONTWRITEBYTECODE", *_PROXIES)


class NotStarted(Exception):
    """A program did not start to listen; the message says why."""


@contextlib.contextmanager
def process(command: list[str], port: int) -> Iterator[int]:
    """Run a command until the block ends. Yields its process id when it listens on `port`. Raises `NotStarted`."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
    environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryFile() as log:  # not a pipe: nobody reads it, and a full pipe would block the program
        child = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
        )
        try:
            _wait(child, command, port, log)
            yield child.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _wait(child: subprocess.Popen[bytes], command: list[str], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if child.poll() is not None or time.monotonic() > deadline:
            child.kill()
            log.seek(0)
            end_of_log = log.read().decode(errors="replace").strip()[-500:]
            raise NotStarted(f"{' '.join(command[:3])} … does not listen on {port}: {end_of_log}")
        time.sleep(0.02)


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keep every core awake until the block ends, with loops at idle priority, so that all other processes run first.

    A virtual machine returns an idle core to its host. To wake the core takes longer than a proxy works on one event.
    Without this, a measurement with one connection would mainly measure that wake-up.
    """
    loop = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"
    children = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def wire(*arguments: object) -> list[str]:
    """Return the command line of one end of a measured connection (see `bench/cost/wire.py`)."""
    return [sys.executable, "-m", "bench.cost.wire", *map(str, arguments)]


def sidecar(port: int, upstream: int, *options: str, admin: int = 0) -> list[str]:
    """Return the command line of a sidecar in front of an upstream."""
    return [
        sys.executable, "-m", "sidecar", "serve", "--port", str(port), "--admin-host", "127.0.0.1",
        "--admin-port", str(admin), "--log-level", "error", "--backend", "dashscope",
        "--dashscope-url", f"http://127.0.0.1:{upstream}/v1", *options,
    ]  # fmt: skip


def tree(pid: int) -> list[int]:
    """Return the ids of the process and all its descendants."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(one for path in children for child in path.read_text().split() for one in tree(int(child)))]


def cpu_seconds(pid: int) -> float:
    """Return the processor seconds of the process and its descendants: all threads, user and kernel time."""
    nanoseconds = 0
    for one in tree(pid):
        for path in Path(f"/proc/{one}/task").glob("*/schedstat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                nanoseconds += int(path.read_text().split()[0])
    return nanoseconds / 1e9


def resident_bytes(pid: int) -> int:
    """Return the resident memory of the process and its descendants in bytes."""
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in tree(pid))
    return pages * os.sysconf("SC_PAGE_SIZE")
