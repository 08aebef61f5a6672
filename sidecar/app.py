"""The one place where the parts are put together, started and stopped. Reads in the order in which it happens."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import platform
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector

from backends.base import BackendError
from backends.detector.backend import DetectorBackend
from backends.http1.server import Listener
from backends.keyfile import KeyFile
from backends.registry import backend_class
from sidecar import __version__
from sidecar.admin.health import Health
from sidecar.admin.server import AdminServer
from sidecar.admin.status import status_of
from sidecar.admission import Admission
from sidecar.api.call import Limits
from sidecar.api.server import DataServer
from sidecar.dispatch.dispatcher import Dispatcher, Route
from sidecar.observe.gauges import AdmissionGauges
from sidecar.observe.metrics import Telemetry
from sidecar.observe.sampler import Watch
from sidecar.settings import Settings
from sidecar.state_file import Memory

if TYPE_CHECKING:
    from sidecar.observe.otel import Spans

log = logging.getLogger("sidecar")

#: Frames that wait for the detector: more would wait for longer than a detection is worth.
_DETECTOR_QUEUE = 64
_LAG_STEP_SECONDS = 0.25
#: Connections at a time of the data listener, and of the admin listener, which other pods can reach.
_MOST_CALLERS = 4096
_MOST_WATCHERS = 128
#: Objects that may live on before the garbage collector looks at them. What a request leaves behind for a while, such
#: as what was sent and when, is no garbage; Python's own 700 are soon there.
_GARBAGE_OBJECTS = 10_000
#: What answers to requests that the drain's time was too short for may take.
_LAST_WORDS_SECONDS = 2.0


class StartError(Exception):
    """What keeps the sidecar from starting, in one line that names the setting."""


class Sidecar:
    """One running sidecar. To be made in the event loop that runs it."""

    def __init__(self, settings: Settings) -> None:
        """Put the parts together; nothing is opened yet. Raises `StartError`."""
        self.settings = settings
        self.data_port = self.admin_port = 0
        """Where it listens, once started."""
        self._loop = asyncio.get_running_loop()
        self._told_to_drain = asyncio.Event()
        registry = CollectorRegistry()
        self._spans = _spans()
        self._telemetry = Telemetry(registry, None if self._spans is None else self._spans.finished)
        self._telemetry.build_info.labels(__version__, platform.python_version()).set(1)
        self.health = Health()
        self.routes = [_route(settings, name, self._telemetry) for name in settings.backend_names]
        self.detectors = _detectors(settings)
        self.health.backend_reason = self._no_backend_is_ready
        admissions = {route.name: route.admission for route in self._all_routes()}
        registry.register(AdmissionGauges(admissions))
        ProcessCollector(registry=registry)
        self.watch = Watch(self._telemetry, admissions)
        self._memory = _memory(settings, self.routes)
        self.data = DataServer(
            Dispatcher(self.routes, self._telemetry),
            Limits(
                deadline=settings.deadline,
                max_body_bytes=settings.max_body_bytes,
                key_header=settings.key_header,
                default_model=getattr(self.routes[0].backend, "model_id", settings.dashscope_model),
                passthrough=settings.passthrough and self.routes[0].name == "dashscope",
                traced=self._spans is not None,
            ),
            detector=Dispatcher(self.detectors, self._telemetry) if self.detectors else None,
            api_key=settings.api_key,
            access_log=settings.access_log,
        )
        self._data_listener = Listener(self.data, most_connections=_MOST_CALLERS)
        admin = AdminServer(
            registry,
            self.health,
            lambda: status_of(self.health, admissions, self.watch),
            self.drain,
            self.watch,
        )
        self._admin_listener = Listener(admin, most_connections=_MOST_WATCHERS)

    def _all_routes(self) -> list[Route]:
        return [*self.routes, *self.detectors]

    async def run(self) -> None:
        """Serve until told to drain, by a signal or by `drain`; then finish what was accepted. Raises `StartError`."""
        try:
            if not await self._start_unless_told():
                return
            async with asyncio.TaskGroup() as tasks:
                observers = [tasks.create_task(self._watch_lag()), tasks.create_task(self.watch.run())]
                if self._memory is not None:
                    observers.append(tasks.create_task(self._memory.run()))
                await self._told_to_drain.wait()
                await self._finish()
                for observer in observers:
                    observer.cancel()
        finally:
            await self.close()

    async def _start_unless_told(self) -> bool:
        """Start; False if told to stop meanwhile: a model that is still being loaded is not waited for."""
        starting = asyncio.ensure_future(self.start())
        told = asyncio.ensure_future(self._told_to_drain.wait())
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
        for route in self._all_routes():
            try:
                await route.backend.start()
            except BackendError as error:
                is_detector = route in self.detectors
                at = f"DETECTOR_MODEL={settings.detector_model}" if is_detector else f"BACKEND={route.name}"
                raise StartError(f"SIDECAR_{at} cannot start: {error.message}") from error
        self.data_port = await _open(self._data_listener, settings.host, settings.port, "port")
        if settings.unix_socket is not None:
            try:
                await self._data_listener.open_unix(settings.unix_socket)
            except OSError as error:
                raise StartError(f"SIDECAR_UNIX_SOCKET={settings.unix_socket}: {_reason(error)}") from error
        self.health.started = True
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
        if not self._told_to_drain.is_set():
            log.info("draining; requests under way: %d", self.data.under_way)
            self.health.draining = True
            for route in self._all_routes():
                route.admission.draining = True
            self._told_to_drain.set()

    def _on_signal(self) -> None:
        if self._told_to_drain.is_set():
            log.warning("told to stop a second time: giving up what is under way, requests: %d", self.data.under_way)
            self.data.give_up()
        self.drain()

    async def _finish(self) -> None:
        """Wait for what was accepted; give an answer, if not the one hoped for, to what takes too long."""
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.data.idle()
        except TimeoutError:
            log.warning("SIDECAR_DRAIN_TIMEOUT is over with %d requests under way", self.data.under_way)
            self.data.give_up()
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await self.data.idle()

    async def close(self) -> None:
        """Let go of everything, in the reverse order of `start`."""
        await self._data_listener.close()
        if self._memory is not None:
            self._memory.save()
        for route in reversed(self._all_routes()):
            await route.backend.close()
        if self._spans is not None:
            await self._spans.close()
        self.watch.close()
        await self._admin_listener.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)

    def _no_backend_is_ready(self) -> str | None:
        """Why the first backend can serve nothing, when none can."""
        reasons = [route.ready_reason() for route in self.routes]
        return None if None in reasons else reasons[0]

    async def _watch_lag(self) -> None:
        observe = self._telemetry.event_loop_lag.observe
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


def _spans() -> Spans | None:
    """What sends spans, if OpenTelemetry's own variables say where to. Its absence is no reason not to serve."""
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return None
    try:
        from sidecar.observe.otel import Spans  # noqa: PLC0415  some megabytes that few want
    except ImportError as error:
        log.warning("an OTLP endpoint is set, but no spans are sent (%s): install vlm-sidecar[otel]", error)
        return None
    return Spans()


def _detectors(settings: Settings) -> list[Route]:
    """The detector behind a queue of its own, if there is one."""
    if settings.detector_model is None:
        return []
    detector = DetectorBackend(settings.detector_model)
    return [Route(detector, Admission(queue_size=_DETECTOR_QUEUE, concurrency=detector.slots, paced=False))]


def _route(settings: Settings, name: str, telemetry: Telemetry) -> Route:
    """A backend and the admission in front of it. What has slots of its own needs no pace, and no limit is learned."""
    backend = make_backend(settings, name)
    slots: int | None = getattr(backend, "slots", None)
    admission = Admission(
        queue_size=settings.queue_size,
        queue_bytes=settings.queue_bytes,
        requests_per_second=_per_second(settings.requests_per_minute),
        tokens_per_second=_per_second(settings.tokens_per_minute),
        concurrency=settings.max_concurrency or slots,
        refusal_budget=settings.refusal_budget,
        paced=slots is None,
        only_model=getattr(backend, "model_id", None),
    )
    if name != "local":
        return Route(backend, admission)
    queue = admission.lane(backend.model_id).queue
    backend.queued = lambda: len(queue)  # from the engine's thread: one look at one number
    backend.on_batch = telemetry.batch_size.labels(name).observe
    return Route(backend, admission, backend.ready_reason)


def make_backend(settings: Settings, name: str) -> Any:
    """Make a backend as the settings say; it is not started. Raises `StartError` that names the setting."""
    backend = backend_class(name)
    if name == "dashscope":
        try:
            return backend(
                base_url=settings.dashscope_url, native_url=settings.dashscope_native_url, key=_key(settings)
            )
        except ValueError as error:
            raise StartError(f"SIDECAR_DASHSCOPE_URL: {error}") from error
    if name == "local":
        try:
            return backend(
                settings.local_model,
                device=settings.local_device,
                max_batch=settings.local_max_batch,
                batch_wait_seconds=settings.local_batch_wait,
                image_urls=settings.local_image_urls.split(),
            )
        except ValueError as error:
            raise StartError(f"SIDECAR_LOCAL_IMAGE_URLS: {error}") from error
    return backend()


def _memory(settings: Settings, routes: Sequence[Route]) -> Memory | None:
    """The file of learned limits, already recalled from; None where none is set."""
    if settings.state_file is None:
        return None
    memory = Memory(settings.state_file, [(_account(route), route.admission) for route in routes])
    memory.load()
    return memory


def _account(route: Route) -> Callable[[], str]:
    """Whose limits a route's are: the backend says it, where there is more to it than its name."""
    account: Callable[[], str] = getattr(route.backend, "account", lambda: route.name)
    return account


def _key(settings: Settings) -> Callable[[], str | None]:
    """Where the provider's key comes from; the file is stronger, since who mounts one wants it rotated."""
    if settings.dashscope_api_key_file is None:
        return lambda: settings.dashscope_api_key
    try:
        return KeyFile(settings.dashscope_api_key_file)
    except (OSError, ValueError) as error:
        reason = f"{settings.dashscope_api_key_file}: {error.strerror}" if isinstance(error, OSError) else error
        raise StartError(f"SIDECAR_DASHSCOPE_API_KEY_FILE: {reason}") from error


def _per_second(per_minute: float | None) -> float:
    return float("inf") if per_minute is None else per_minute / 60
