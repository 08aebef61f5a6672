"""Starts and stops one sidecar. The functions are in the order in which they run."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
from functools import partial

from backends.base import BackendError
from backends.http1 import descriptors
from backends.http1.implementation import choose
from backends.http1.interface import Listener
from backends.picture_memory import give_large_pieces_back
from sidecar import __version__
from sidecar.assembly import StartError, assemble
from sidecar.config_file import ConfigFile, Source
from sidecar.settings import Settings

log = logging.getLogger("sidecar")

#: Seconds between two measurements of the event loop's lag.
_LAG_STEP_SECONDS = 0.25
#: Idle connections of callers that are closed each time that the process has no descriptor left.
_CLOSED_AT_ONCE = 16
#: Python's garbage collector runs after this number of new objects. Requests create objects that are still in use for a
#: while (for example the times of sending), so Python's default of 700 would start many collections that find nothing.
_GARBAGE_OBJECTS = 10_000
#: Seconds to answer the requests that are still running when SIDECAR_DRAIN_TIMEOUT has passed.
_LATE_ANSWER_SECONDS = 2.0


class Sidecar:
    """One running sidecar. Create it in the event loop that runs it."""

    def __init__(self, settings: Settings, source: Source | None = None) -> None:
        """Build the parts, without opening or starting them. Raises `StartError`.

        `source` loads the settings again, if they come from a file.
        """
        self.settings = settings
        self.data_port = self.admin_port = 0
        """The ports of the listeners after the start; 0 before."""
        self._loop = asyncio.get_running_loop()
        self._drain_requested = asyncio.Event()
        self.parts = parts = assemble(settings, self.drain)
        self.admission, self.data = parts.admission, parts.data
        self._config_file = None if source is None else ConfigFile(source, settings, self._configure, parts.metrics)
        self._data_listener: Listener | None = None
        self._admin_listener: Listener | None = None
        """The start creates them: only then it is known which implementation of HTTP works."""

    def __repr__(self) -> str:
        ports = f"data_port={self.data_port} admin_port={self.admin_port}"
        return f"<Sidecar {','.join(self.admission.names)} {ports} {self.parts.health!r}>"

    async def run(self) -> None:
        """Serve until a signal or `drain` requests a drain; then finish the accepted requests. Raises `StartError`."""
        try:
            if not await self._start_unless_drained():
                return
            async with asyncio.TaskGroup() as tasks:
                observers = [tasks.create_task(self._measure_lag()), tasks.create_task(self.parts.sampler.run())]
                if self.parts.state_file is not None:
                    observers.append(tasks.create_task(self.parts.state_file.run()))
                if self._config_file is not None:
                    observers.append(tasks.create_task(self._config_file.run()))
                await self._drain_requested.wait()
                await self._finish()
                for observer in observers:
                    observer.cancel()
        finally:
            await self.close()

    async def _start_unless_drained(self) -> bool:
        """Start. Return False if a drain is requested before the start ends, for example while a model is loading."""
        starting = asyncio.ensure_future(self.start())
        drain_requested = asyncio.ensure_future(self._drain_requested.wait())
        try:
            await asyncio.wait((starting, drain_requested), return_when=asyncio.FIRST_COMPLETED)
            return starting.done() and starting.result() is None
        finally:
            starting.cancel()
            drain_requested.cancel()
            await asyncio.gather(starting, drain_requested, return_exceptions=True)

    async def start(self) -> None:
        """Open the admin listener, then the backends, then the data listener, so that probes can see each step."""
        settings = self.settings
        give_large_pieces_back()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` starts a process that ignores it
            self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        http = await choose()
        self.parts.metrics.set_http_implementation(http.name)
        exhausted, limit = self.parts.metrics.exhausted, descriptors.limit()
        self._admin_listener = http.listener(
            self.parts.admin,
            max_connections=descriptors.admin_connections(limit),
            closes_busy=True,  # a probe must always get its answer
            on_full=partial(exhausted, "admin_connections"),
            answers=self.parts.answers,
        )
        self.admin_port = await _open(self._admin_listener, settings.admin_host, settings.admin_port, "SIDECAR_ADMIN_")
        for backend in self.parts.all_backends:
            try:
                await backend.start()
            except BackendError as error:
                is_detector = backend is self.parts.detector
                at = f"DETECTOR_MODEL={settings.detector_model}" if is_detector else f"BACKEND={backend.name}"
                raise StartError(f"SIDECAR_{at} cannot start: {error.message}") from error
        self._data_listener = http.listener(
            self.parts.data,
            max_connections=_max_data_connections(limit),
            on_full=partial(exhausted, "data_connections"),
            max_held_bytes=settings.quarter_of_queue_bytes,
            answers=self.parts.answers,
        )
        self.parts.held_bytes.sources.append(self._data_listener.held_bytes)
        self.data_port = await _open(self._data_listener, settings.host, settings.port, "SIDECAR_")
        if settings.unix_socket is not None:
            try:
                await self._data_listener.open_unix(settings.unix_socket)
            except OSError as error:
                reason = f"{_reason(error)}; name a path in a folder that exists and that the sidecar may write"
                raise StartError(f"SIDECAR_UNIX_SOCKET={settings.unix_socket}: {reason}") from error
        self.parts.health.started = True
        gc.collect()
        gc.freeze()  # objects of the start are never garbage: later collections can skip them
        gc.set_threshold(_GARBAGE_OBJECTS)
        names = ",".join(self.admission.names)
        if "simulated" in names:
            log.warning("SIMULATED: the backend 'simulated' makes its answers up; SIDECAR_DASHSCOPE_API_KEY ends that")
        log.info(
            "vlm-sidecar %s serves %s on %s:%d, probes and metrics on %s:%d",
            __version__, names, _in_url(settings.host), self.data_port, _in_url(settings.admin_host), self.admin_port,
        )  # fmt: skip

    def drain(self) -> None:
        """Refuse new requests. `run` returns when the accepted requests are finished. A second call does nothing."""
        if not self._drain_requested.is_set():
            log.info("draining; requests under way: %d", self.data.in_progress)
            self.parts.drain()
            self._drain_requested.set()

    def _on_signal(self) -> None:
        if self._drain_requested.is_set():
            log.warning("told to stop a second time: giving up what is under way, requests: %d", self.data.in_progress)
            self.data.abort_all()
        self.drain()

    def _on_hangup(self) -> None:
        """Load the settings again, or drain if they do not come from a file: then a terminal was closed."""
        if self._config_file is None:
            self.drain()
        else:
            self._config_file.reload()

    def _configure(self, settings: Settings) -> None:
        self.settings = settings
        self.parts.configure(settings)

    async def _finish(self) -> None:
        """Wait for the accepted requests. Those that are not finished after the drain timeout get an error."""
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.data.wait_until_idle()
        except TimeoutError:
            log.warning("SIDECAR_DRAIN_TIMEOUT is over with %d requests under way", self.data.in_progress)
            self.data.abort_all()
            async with asyncio.timeout(_LATE_ANSWER_SECONDS):
                await self.data.wait_until_idle()

    async def close(self) -> None:
        """Release all resources, in the reverse order of `start`."""
        if self._data_listener is not None:
            await self._data_listener.close()
        if self.parts.state_file is not None:
            self.parts.state_file.close()
        await self.parts.models.close()
        for backend in reversed(self.parts.all_backends):
            await backend.close()
        if self.parts.spans is not None:
            await self.parts.spans.close()
        self.parts.sampler.close()
        if self._admin_listener is not None:
            await self._admin_listener.close()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.remove_signal_handler(number)

    async def _measure_lag(self) -> None:
        """Measure the event loop's lag, and look for a free descriptor.

        Without one, the event loop closes new connections without a message, also those of probes.
        """
        observe = self.parts.metrics.event_loop_lag.observe
        while True:
            due = self._loop.time() + _LAG_STEP_SECONDS
            await asyncio.sleep(_LAG_STEP_SECONDS)
            observe(max(self._loop.time() - due, 0.0))
            if descriptors.none_is_left() and self._data_listener is not None:
                self._data_listener.close_idle(_CLOSED_AT_ONCE)
                self.parts.metrics.exhausted("descriptors")


def _max_data_connections(limit: int) -> int:
    """Return the maximum number of callers' connections. Raises `StartError` if the process may open too few files."""
    in_use = descriptors.in_use()
    connections = descriptors.data_connections(limit, in_use)
    if connections < 1:
        least = descriptors.smallest_limit(in_use)
        raise StartError(f"the process may open only {limit} files (ulimit -n): it needs at least {least}")
    if connections < descriptors.MAX_DATA_CONNECTIONS:
        log.info(
            "the process may open %d files (ulimit -n): at most %d callers' connections, and %d on the admin port",
            limit, connections, descriptors.admin_connections(limit),
        )  # fmt: skip
    return connections


#: The errors of an address that this machine does not have, or of a host name without an address.
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_PORT_ADVICE = {
    errno.EADDRINUSE: "stop what uses it, or choose another port",
    errno.EACCES: "a port below 1024 needs a privilege; choose another one",
}


async def _open(listener: Listener, host: str, port: int, prefix: str) -> int:
    """Open a listener. `prefix` begins the names of its two settings. Raises `StartError` that names the wrong one."""
    try:
        return await listener.open(host, port)
    except UnicodeError as error:
        raise StartError(f"{prefix}HOST={host[:80]}: this is no host name; name an address of this machine") from error
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno in _NOT_OURS:
            raise StartError(
                f"{prefix}HOST={host}: this machine has no such address ({_reason(error)}); "
                "name one of its own, such as 127.0.0.1, or 0.0.0.0 for all"
            ) from error
        advice = _PORT_ADVICE.get(error.errno or 0, "choose another port")
        raise StartError(f"{prefix}PORT={port} on {_in_url(host)}: {_reason(error)}; {advice}") from error


def _in_url(host: str) -> str:
    """Return a host as it is written before a port: an IPv6 address has brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _reason(error: OSError) -> str:
    """Return the system's error text, without the addresses that asyncio adds to it."""
    return error.strerror.rpartition(": ")[2] if error.strerror else str(error)
