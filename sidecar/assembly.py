"""Builds the parts of a sidecar from its settings. Nothing is opened or started here: `app.py` does that."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector

from backends.base import Backend
from backends.detector import DetectorBackend
from backends.http1.answer_bytes import AnswerBytes
from backends.keyfile import KeyFile
from backends.picture_memory import PICTURES
from backends.registry import backend_class
from sidecar import __version__
from sidecar.admin.health import Health
from sidecar.admin.server import AdminServer
from sidecar.admin.status import status_of
from sidecar.admission import Admission, UpstreamSettings
from sidecar.api.call import CallSettings, Sampling
from sidecar.api.server import DataServer
from sidecar.dispatch.dispatcher import Dispatcher
from sidecar.dispatch.model_list import ModelList
from sidecar.dispatch.stream_bounds import StreamSettings
from sidecar.foreign_pages import ForeignPages
from sidecar.observe import logging as logs
from sidecar.observe.gauges import AdmissionGauges
from sidecar.observe.held_bytes import HeldBytes
from sidecar.observe.metrics import Metrics
from sidecar.observe.sampler import Sampler
from sidecar.settings import Settings
from sidecar.state_file import StateFile

if TYPE_CHECKING:
    from sidecar.observe.otel import Spans

log = logging.getLogger("sidecar")

#: Maximum number of frames that wait for the detector. In a longer queue, detections would come too late to be useful.
_DETECTOR_QUEUE = 64


class StartError(Exception):
    """The sidecar cannot start. The message is one line that names the setting."""


@dataclass(slots=True)
class Parts:
    """One sidecar, ready to be started."""

    health: Health
    metrics: Metrics
    sampler: Sampler
    admission: Admission
    backends: list[Backend]
    """The backends that `SIDECAR_BACKEND` names, in order."""
    detector: Backend | None
    detector_admission: Admission | None
    """The detector has a queue of its own."""
    data: DataServer
    models: ModelList
    admin: AdminServer
    state_file: StateFile | None
    spans: Spans | None
    """None unless OpenTelemetry's variables name an endpoint."""
    held_bytes: HeldBytes
    answers: AnswerBytes
    """Bounds the answers that are read, and what callers do not read."""

    @property
    def all_backends(self) -> list[Backend]:
        """All backends, including the detector; `app.py` starts and closes them."""
        return [*self.backends, *([self.detector] if self.detector is not None else [])]

    def configure(self, settings: Settings) -> None:
        """Apply settings that can change without a restart: see `config_file.RELOADABLE`."""
        self.data.configure(
            _call_settings(settings, self.backends, traced=self.spans is not None),
            api_key=settings.api_key,
            access_log=settings.access_log,
        )
        logs.set_up(settings.log_format, settings.log_level)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self.health.draining = self.admission.draining = True
        if self.detector_admission is not None:
            self.detector_admission.draining = True


def assemble(settings: Settings, drain: Callable[[], None]) -> Parts:
    """Build every part, in the event loop that will run them. `drain` begins the drain. Raises `StartError`."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    spans = _spans()
    metrics = Metrics(registry, None if spans is None else spans.finished)
    metrics.build_info.labels(__version__, platform.python_version()).set(1)
    queued: list[Callable[[], int]] = []
    quarter = settings.quarter_of_queue_bytes
    answers = AnswerBytes(settings.queue_bytes)
    backends = [_backend(settings, name, metrics, queued, answers) for name in settings.backend_names]
    admission = Admission(
        [_upstream(settings, backend, tier) for tier, backend in enumerate(backends, 1)],
        queue_size=settings.queue_size,
        queue_bytes=settings.queue_bytes - quarter * (1 if settings.detector_model is None else 2),
        bytes_in_flight=settings.queue_bytes - quarter,
        answer_bytes=answers.held_bytes,
    )
    answers.in_flight = admission.bytes_in_flight
    queued.append(admission.waiting)
    admissions = [admission]
    detector = None if settings.detector_model is None else make_detector(settings.detector_model)
    detector_admission = detector_dispatcher = None
    if detector is not None:
        detector_settings = UpstreamSettings(detector.name, concurrency=detector.slots, paced=False)
        detector_admission = Admission([detector_settings], queue_size=_DETECTOR_QUEUE, queue_bytes=quarter)
        detector_dispatcher = Dispatcher(detector_admission, [detector], metrics)
        admissions.append(detector_admission)
    health = Health()
    health.backend_reason = lambda: _no_backend_is_ready(backends)
    registry.register(AdmissionGauges(admissions))
    held_bytes = HeldBytes(admissions)
    held_bytes.sources += [answers.by_place, lambda: {"pictures": PICTURES.bytes}]
    registry.register(held_bytes)
    sampler = Sampler(metrics, admissions)
    models = ModelList(admission, backends, metrics)
    foreign_pages = ForeignPages(settings.allowed_hosts.split(","))
    data = DataServer(
        Dispatcher(admission, backends, metrics),
        _call_settings(settings, backends, traced=spans is not None),
        models,
        foreign_pages=foreign_pages,
        detector=detector_dispatcher,
        api_key=settings.api_key,
        access_log=settings.access_log,
    )
    admin = AdminServer(
        registry, health, lambda: status_of(health, admissions, sampler), drain, sampler, foreign_pages=foreign_pages
    )
    state_file = _state_file(settings, admission, backends)
    return Parts(
        health, metrics, sampler, admission, backends, detector, detector_admission, data, models, admin, state_file,
        spans, held_bytes, answers,
    )  # fmt: skip


def _call_settings(settings: Settings, backends: Sequence[Backend], *, traced: bool) -> CallSettings:
    """Return the settings that apply to callers."""
    backend = backends[0]
    return CallSettings(
        deadline=settings.deadline,
        stream=StreamSettings(settings.stream_idle, settings.stream_max),
        max_body_bytes=settings.max_body_bytes,
        key_header=settings.key_header,
        default_model=backend.model_id or settings.dashscope_model,
        passthrough=settings.passthrough and backend.name == "dashscope",
        no_native_api=_no_native_api(backends),
        sampling=Sampling(settings.default_max_tokens, settings.default_temperature, settings.default_top_p),
        traced=traced,
    )


def _no_native_api(backends: Sequence[Backend]) -> str:
    """Return why no backend passes on the paths of DashScope's own API; empty if one does."""
    if any(backend.has_native_api for backend in backends):
        return ""
    names = ",".join(backend.name for backend in backends)
    if "dashscope" not in names:
        return f"SIDECAR_BACKEND={names} is not DashScope"
    return "SIDECAR_DASHSCOPE_NATIVE_URL, which names its base URL, is not set"


def _no_backend_is_ready(backends: Sequence[Backend]) -> str | None:
    """Return the reason of the first backend if no backend can serve, else None."""
    reasons = [backend.unready_reason() for backend in backends]
    return None if None in reasons else reasons[0]


def _backend(
    settings: Settings, name: str, metrics: Metrics, queued: Sequence[Callable[[], int]], answers: AnswerBytes
) -> Backend:
    """Make a backend.

    `queued` is still empty. Later it gets the function that counts waiting requests, because admission is created after
    the backends.
    """
    if name != "local":
        return make_backend(settings, name, answers=answers)
    # The engine's thread calls this function. It reads a few list lengths once, so it needs no lock.
    observe = metrics.batch_size.labels(name).observe
    return make_backend(settings, name, queued=lambda: queued[0]() if queued else 0, on_batch=observe)


def _upstream(settings: Settings, backend: Backend, tier: int) -> UpstreamSettings:
    """Return a backend's settings for admission.

    A backend with a fixed number of slots has no quota, so nothing is learned.
    """
    return UpstreamSettings(
        backend.name,
        tier,
        requests_per_second=_per_second(settings.requests_per_minute),
        tokens_per_second=_per_second(settings.tokens_per_minute),
        concurrency=settings.max_concurrency or backend.slots,
        refusal_budget=settings.refusal_budget,
        paced=backend.slots is None,
        only_model=backend.model_id,
        unready_reason=backend.unready_reason,
    )


def make_backend(
    settings: Settings,
    name: str,
    *,
    queued: Callable[[], int] = lambda: 0,
    on_batch: Callable[[int], None] = lambda _: None,
    answers: AnswerBytes | None = None,
) -> Backend:
    """Make a backend from the settings; it is not started. Raises `StartError` that names the setting.

    `queued` and `on_batch` are for the local backend: see `LocalBackend`. `answers` is for a backend over HTTP.
    """
    make = backend_class(name)
    backend: Backend
    match name:
        case "dashscope":
            try:
                backend = make(
                    base_url=settings.dashscope_url, native_url=settings.dashscope_native_url, key=_key(settings),
                    answers=answers,
                )  # fmt: skip
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
    """Make the detector of a model; nothing is loaded yet."""
    return DetectorBackend(model)


def _state_file(settings: Settings, admission: Admission, backends: Sequence[Backend]) -> StateFile | None:
    """Load the file of learned limits into admission. Return None if no file is set."""
    if settings.state_file is None:
        return None
    state_file = StateFile(settings.state_file, admission, {backend.name: backend.account for backend in backends})
    state_file.load()
    return state_file


def _spans() -> Spans | None:
    """Make the exporter of spans if OpenTelemetry's variables name an endpoint. Without the extra, only warn."""
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return None
    try:
        from sidecar.observe.otel import Spans  # noqa: PLC0415  some megabytes that few users want
    except ImportError as error:
        log.warning("an OTLP endpoint is set, but no spans are sent (%s): install vlm-sidecar[otel]", error)
        return None
    return Spans()


def _key(settings: Settings) -> Callable[[], str | None]:
    """Return the function that reads the provider's key.

    The key file has priority over the key setting, because the file can be replaced while the sidecar runs.
    """
    if settings.dashscope_api_key_file is None:
        return lambda: settings.dashscope_api_key
    try:
        return KeyFile(settings.dashscope_api_key_file)
    except (OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{settings.dashscope_api_key_file}: {error.strerror}; name a file that the sidecar may read"
        raise StartError(f"SIDECAR_DASHSCOPE_API_KEY_FILE: {reason}") from error


def _per_second(per_minute: float | None) -> float:
    return inf if per_minute is None else per_minute / 60
