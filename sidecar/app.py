"""The one place where the parts are put together, started and stopped. Reads in the order in which it happens."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal

from backends.base import BackendError
from backends.http1.server import Listener
from sidecar import __version__
from sidecar.assembly import StartError, assemble
from sidecar.settings import Settings

log = logging.getLogger("sidecar")

_LAG_STEP_SECONDS = 0.25
#: Connections at a time of the data listener, and of the admin listener, which other pods can reach.
_MAX_CALLERS = 4096
_MAX_WATCHERS = 128
#: Objects that may live on before the garbage collector looks at them. What a request leaves behind for a while, such
#: as what was sent and when, is no garbage; Python's own 700 are soon there.
_GARBAGE_OBJECTS = 10_000
#: What answers to requests that the drain's time was too short for may take.
_LAST_WORDS_SECONDS = 2.0


class Sidecar:
    """One running sidecar. To be made in the event loop that runs it."""

    def __init__(self, settings: Settings) -> None:
        """Put the parts together; nothing is opened yet. Raises `StartError`."""
        self.settings = settings
        self.data_port = self.admin_port = 0
        """Where it listens, once started."""
        self._loop = asyncio.get_running_loop()
        self._drain_requested = asyncio.Event()
        self.parts = parts = assemble(settings, self.drain)
        self.routes, self.data = parts.routes, parts.data
        self._data_listener = Listener(parts.data, most_connections=_MAX_CALLERS)
        self._admin_listener = Listener(parts.admin, most_connections=_MAX_WATCHERS)

    async def run(self) -> None:
        """Serve until told to drain, by a signal or by `drain`; then finish what was accepted. Raises `StartError`."""
        try:
            if not await self._start_unless_told():
                return
            async with asyncio.TaskGroup() as tasks:
                observers = [tasks.create_task(self._watch_lag()), tasks.create_task(self.parts.sampler.run())]
                if self.parts.state_file is not None:
                    observers.append(tasks.create_task(self.parts.state_file.run()))
                await self._drain_requested.wait()
                await self._finish()
                for observer in observers:
                    observer.cancel()
        finally:
            await self.close()

    async def _start_unless_told(self) -> bool:
        """Start; False if told to stop meanwhile: a model that is still being loaded is not waited for."""
        starting = asyncio.ensure_future(self.start())
        told = asyncio.ensure_future(self._drain_requested.wait())
        try:
            await asyncio.wait((starting, told), return_when=asyncio.FIRST_COMPLETED)
            return starting.done() and starting.result() is None
        finally:
            starting.cancel()
            told.cancel()
            await asyncio.gather(starting, told, return_exceptions=True)

    async def start(self) -> None:
        """Open the admin listener, then the backends, then the data listener, so that probes see each step."""
        settings = self.settings
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal)
        self.admin_port = await _open(self._admin_listener, settings.admin_host, settings.admin_port, "admin_port")
        for route in self.parts.all_routes:
            try:
                await route.backend.start()
            except BackendError as error:
                is_detector = route in self.parts.detectors
                at = f"DETECTOR_MODEL={settings.detector_model}" if is_detector else f"BACKEND={route.name}"
                raise StartError(f"SIDECAR_{at} cannot start: {error.message}") from error
        self.data_port = await _open(self._data_listener, settings.host, settings.port, "port")
        if settings.unix_socket is not None:
            try:
                await self._data_listener.open_unix(settings.unix_socket)
            except OSError as error:
                raise StartError(f"SIDECAR_UNIX_SOCKET={settings.unix_socket}: {_reason(error)}") from error
        self.parts.health.started = True
        gc.collect()
        gc.freeze()  # what start-up made is never garbage: no collection need walk it again
        gc.set_threshold(_GARBAGE_OBJECTS)
        names = ",".join(route.name for route in self.routes)
        if "simulated" in names:
            log.warning("SIMULATED: the backend 'simulated' makes its answers up; SIDECAR_DASHSCOPE_API_KEY ends that")
        log.info(
            "vlm-sidecar %s serves %s on %s:%d, probes and metrics on %s:%d",
            __version__, names, settings.host, self.data_port, settings.admin_host, self.admin_port,
        )  # fmt: skip

    def drain(self) -> None:
        """Take nothing new from now on; `run` ends when what was accepted is done. Again is nothing."""
        if not self._drain_requested.is_set():
            log.info("draining; requests under way: %d", self.data.in_progress)
            self.parts.health.draining = True
            for route in self.parts.all_routes:
                route.admission.draining = True
            self._drain_requested.set()

    def _on_signal(self) -> None:
        if self._drain_requested.is_set():
            log.warning("told to stop a second time: giving up what is under way, requests: %d", self.data.in_progress)
            self.data.abort_all()
        self.drain()

    async def _finish(self) -> None:
        """Wait for what was accepted; give an answer, if not the one hoped for, to what takes too long."""
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.data.wait_until_idle()
        except TimeoutError:
            log.warning("SIDECAR_DRAIN_TIMEOUT is over with %d requests under way", self.data.in_progress)
            self.data.abort_all()
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await self.data.wait_until_idle()

    async def close(self) -> None:
        """Let go of everything, in the reverse order of `start`."""
        await self._data_listener.close()
        if self.parts.state_file is not None:
            self.parts.state_file.save()
        for route in reversed(self.parts.all_routes):
            await route.backend.close()
        if self.parts.spans is not None:
            await self.parts.spans.close()
        self.parts.sampler.close()
        await self._admin_listener.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)

    async def _watch_lag(self) -> None:
        observe = self.parts.metrics.event_loop_lag.observe
        while True:
            due = self._loop.time() + _LAG_STEP_SECONDS
            await asyncio.sleep(_LAG_STEP_SECONDS)
            observe(max(self._loop.time() - due, 0.0))


async def _open(listener: Listener, host: str, port: int, setting: str) -> int:
    try:
        return await listener.open(host, port)
    except OSError as error:
        raise StartError(f"SIDECAR_{setting.upper()}={port} on {host}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    """What the system says, without the addresses that asyncio puts into it."""
    return error.strerror.rpartition(": ")[2] if error.strerror else str(error)
