"""Builds the parts of a sidecar from its settings. `app.py` opens and starts them."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector

from backends.base import Backend
from backends.detector import DetectorBackend
from backends.keyfile import KeyFile
from backends.registry import backend_class
from sidecar import __version__
from sidecar.admin.health import Health
from sidecar.admin.server import AdminServer
from sidecar.admin.status import status_of
from sidecar.admission import Admission
from sidecar.api.call import CallSettings
from sidecar.api.server import DataServer
from sidecar.dispatch.dispatcher import Dispatcher, Route
from sidecar.observe.gauges import AdmissionGauges
from sidecar.observe.metrics import Metrics
from sidecar.observe.sampler import Sampler
from sidecar.settings import Settings
from sidecar.state_file import StateFile

if TYPE_CHECKING:
    from sidecar.observe.otel import Spans

log = logging.getLogger("sidecar")

#: Frames that may wait for the detector. In a longer queue, a frame would wait so long that its detections are useless.
_DETECTOR_QUEUE = 64


class StartError(Exception):
    """The sidecar cannot start. The message is one line that names the setting."""


@dataclass(slots=True)
class Parts:
    """The parts of one sidecar, built but not started."""

    health: Health
    metrics: Metrics
    sampler: Sampler
    routes: list[Route]
    """The backends that `SIDECAR_BACKEND` names, in order."""
    detectors: list[Route]
    """The detector, if there is one."""
    data: DataServer
    admin: AdminServer
    state_file: StateFile | None
    spans: Spans | None
    """None unless an OpenTelemetry variable (OTEL_…) sets an endpoint."""

    @property
    def all_routes(self) -> list[Route]:
        """All backends with their admission: those to start, drain and close."""
        return [*self.routes, *self.detectors]


def assemble(settings: Settings, drain: Callable[[], None]) -> Parts:
    """Build every part, in the event loop that will run them. `drain` starts the drain. Raises `StartError`."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    spans = _spans()
    metrics = Metrics(registry, None if spans is None else spans.finished)
    metrics.build_info.labels(__version__, platform.python_version()).set(1)
    routes = [_route(settings, name, metrics) for name in settings.backend_names]
    detectors = _detectors(settings)
    health = Health()
    health.backend_reason = lambda: _no_backend_is_ready(routes)
    admissions = {route.name: route.admission for route in [*routes, *detectors]}
    registry.register(AdmissionGauges(admissions))
    sampler = Sampler(metrics, admissions)
    data = DataServer(
        Dispatcher(routes, metrics),
        CallSettings(
            deadline=settings.deadline,
            max_body_bytes=settings.max_body_bytes,
            key_header=settings.key_header,
            default_model=routes[0].backend.model_id or settings.dashscope_model,
            passthrough=settings.passthrough and routes[0].name == "dashscope",
            traced=spans is not None,
        ),
        detector=Dispatcher(detectors, metrics) if detectors else None,
        api_key=settings.api_key,
        access_log=settings.access_log,
    )
    admin = AdminServer(registry, health, lambda: status_of(health, admissions, sampler), drain, sampler)
    state_file = _state_file(settings, routes)
    return Parts(health, metrics, sampler, routes, detectors, data, admin, state_file, spans)


def _no_backend_is_ready(routes: Sequence[Route]) -> str | None:
    """Return the first backend's reason if no backend can serve; otherwise None."""
    reasons = [route.backend.ready_reason() for route in routes]
    return None if None in reasons else reasons[0]


def _route(settings: Settings, name: str, metrics: Metrics) -> Route:
    """Build a backend and its admission. A backend with a fixed number of slots has no quota to learn."""
    queue_of_local: list[Any] = []
    # The engine calls `queued` in its own thread. Reading the length of one container needs no lock.
    backend = make_backend(
        settings,
        name,
        queued=lambda: len(queue_of_local[0]) if queue_of_local else 0,
        on_batch=metrics.batch_size.labels(name).observe if name == "local" else lambda _: None,
    )
    admission = Admission(
        queue_size=settings.queue_size,
        queue_bytes=settings.queue_bytes,
        requests_per_second=_per_second(settings.requests_per_minute),
        tokens_per_second=_per_second(settings.tokens_per_minute),
        concurrency=settings.max_concurrency or backend.slots,
        refusal_budget=settings.refusal_budget,
        paced=backend.slots is None,
        only_model=backend.model_id,
    )
    if name == "local":
        queue_of_local.append(admission.lane(backend.model_id or "").queue)
    return Route(backend, admission)


def make_backend(
    settings: Settings,
    name: str,
    *,
    queued: Callable[[], int] = lambda: 0,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Backend:
    """Build a backend from the settings, without starting it. Raises `StartError` that names the setting.

    `queued` and `on_batch` are for the local backend: see `LocalBackend`.
    """
    make = backend_class(name)
    backend: Backend
    match name:
        case "dashscope":
            try:
                backend = make(
                    base_url=settings.dashscope_url, native_url=settings.dashscope_native_url, key=_key(settings)
                )
            except ValueError as error:
                raise StartError(f"SIDECAR_DASHSCOPE_URL: {error}") from error
        case "local":
            try:
                backend = make(
                    settings.local_model,
                    device=settings.local_device,
                    max_batch=settings.local_max_batch,
                    batch_wait_seconds=settings.local_batch_wait,
                    image_urls=settings.local_image_urls.split(),
                    queued=queued,
                    on_batch=on_batch,
                )
            except ValueError as error:
                raise StartError(f"SIDECAR_LOCAL_IMAGE_URLS: {error}") from error
        case _:
            backend = make()
    return backend


def make_detector(model: Path) -> Backend:
    """Build the detector for a model file, without loading it."""
    return DetectorBackend(model)


def _detectors(settings: Settings) -> list[Route]:
    """Build the detector with its own queue, if a model is set."""
    if settings.detector_model is None:
        return []
    detector = make_detector(settings.detector_model)
    return [Route(detector, Admission(queue_size=_DETECTOR_QUEUE, concurrency=detector.slots, paced=False))]


def _state_file(settings: Settings, routes: Sequence[Route]) -> StateFile | None:
    """Load the state file into the admissions; return None if no file is set."""
    if settings.state_file is None:
        return None
    state_file = StateFile(settings.state_file, [(route.backend.account, route.admission) for route in routes])
    state_file.load()
    return state_file


def _spans() -> Spans | None:
    """Build the exporter of spans if an endpoint is set. If the extra `otel` is not installed, only log a warning."""
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return None
    try:
        from sidecar.observe.otel import Spans  # noqa: PLC0415  needs some megabytes of memory, and few users need it
    except ImportError as error:
        log.warning("an OTLP endpoint is set, but no spans are sent (%s): install vlm-sidecar[otel]", error)
        return None
    return Spans()


def _key(settings: Settings) -> Callable[[], str | None]:
    """Return the function that reads the provider's key.

    A key file wins over the value, because its key can be rotated.
    """
    if settings.dashscope_api_key_file is None:
        return lambda: settings.dashscope_api_key
    try:
        return KeyFile(settings.dashscope_api_key_file)
    except (OSError, ValueError) as error:
        reason = f"{settings.dashscope_api_key_file}: {error.strerror}" if isinstance(error, OSError) else error
        raise StartError(f"SIDECAR_DASHSCOPE_API_KEY_FILE: {reason}") from error


def _per_second(per_minute: float | None) -> float:
    return inf if per_minute is None else per_minute / 60
