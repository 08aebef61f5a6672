"""The admin listener: probes for kubelet, metrics for Prometheus, status for people. It serves no inference."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from backends.http1.interface import Answer, Handler, HttpRequest
from sidecar.admin.health import Health
from sidecar.admin.live import BackendHistory, History, Tick
from sidecar.admin.paced import Paced
from sidecar.admin.status import Status, UpstreamReport
from sidecar.foreign_pages import ForeignPages
from sidecar.observe.sampler import Sampler
from sidecar.observe.time_series import FIELDS

log = logging.getLogger("sidecar")

#: The files of the live page: path → file name in `page/` and content type.
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_PAGE_FOLDER = Path(__file__).with_name("page")
#: The paths that are answered under any name of the machine: probes and Prometheus use the names that they are given.
_ANY_HOST = frozenset({"/metrics", "/startupz", "/readyz", "/livez"})
#: The paths that a page could read, or use, by DNS rebinding.
_OWN_PAGE = frozenset({"/", "/status", "/history", "/events", "/drain"})
#: Maximum number of open live views. Each one needs a connection and some JSON every second.
MAX_VIEWERS = 16
_JSON = {"Content-Type": "application/json"}


class AdminServer:
    """Handles every request to the admin listener."""

    def __init__(
        self,
        registry: CollectorRegistry,
        health: Health,
        status: Callable[[], Status],
        drain: Callable[[], None],
        sampler: Sampler,
        *,
        foreign_pages: ForeignPages,
    ) -> None:
        """`status` returns the data of `GET /status`. `drain` starts the drain and returns immediately."""
        self._registry = registry
        self._health = health
        self._status = status
        self._drain = drain
        self._sampler = sampler
        self._foreign_pages = foreign_pages
        self._paced = Paced()
        self._viewers = 0
        self._paths: dict[str, tuple[str, Handler]] = {
            "/metrics": ("GET", self._metrics),
            "/startupz": ("GET", self._startupz),
            "/readyz": ("GET", self._readyz),
            "/livez": ("GET", self._livez),
            "/status": ("GET", self._get_status),
            "/history": ("GET", self._get_history),
            "/events": ("GET", self._get_events),
            "/drain": ("POST", self._post_drain),
            **dict.fromkeys(PAGE, ("GET", self._get_page)),
        }

    def __repr__(self) -> str:
        return f"<AdminServer viewers={self._viewers} {self._health!r}>"

    async def __call__(self, http: HttpRequest) -> Answer:
        """Handle one request."""
        path = http.raw_path.partition("?")[0]
        method, handle = self._paths.get(path, ("", None))
        if handle is None:
            known = ", ".join(path for path in self._paths if path not in PAGE)
            return await _text(http, 404, f"there is nothing at {path[:200]!r}; the admin listener has {known}")
        if http.method != method and (http.method, method) != ("HEAD", "GET"):
            allow = "GET, HEAD" if method == "GET" else method
            return await _text(http, 405, f"{path} takes {allow}", {"Allow": allow})
        refusal = self._foreign_pages.refusal(
            http.headers,
            navigable=path == "/" and http.method == "GET",
            own_page=path in _OWN_PAGE,
            any_host=path in _ANY_HOST,
        )
        if refusal is not None:
            return await _text(http, 403, f"forbidden_origin: {refusal}")
        return await handle(http)

    async def _metrics(self, http: HttpRequest) -> Answer:
        encode, content_type = choose_encoder(",".join(http.headers.getall("Accept", [])))
        content_type, body = self._paced.get("metrics", lambda: (content_type, encode(self._registry)))
        return await _respond(http, 200, body, {"Content-Type": content_type})

    async def _startupz(self, http: HttpRequest) -> Answer:
        started = self._health.started
        return await _text(
            http, 200 if started else 503, "started" if started else self._health.unready_reason() or "starting"
        )

    async def _readyz(self, http: HttpRequest) -> Answer:
        """Name a throttled or failing upstream in the body only: it does not make the pod unready."""
        reason = self._health.unready_reason()
        if reason is not None:
            return await _text(http, 503, reason)
        upstream = [line for line in map(_upstream_line, self._paced.get("readyz", self._status).backends) if line]
        return await _text(http, 200, "\n".join(["ready", *upstream]))

    async def _livez(self, http: HttpRequest) -> Answer:
        return await _text(http, 200, "alive")

    async def _get_status(self, http: HttpRequest) -> Answer:
        return await _respond(http, 200, self._paced.get("status", lambda: orjson.dumps(self._status())), _JSON)

    async def _get_page(self, http: HttpRequest) -> Answer:
        """Serve a file of the live page. Its policy forbids external resources and embedding in another page."""
        name, content_type = PAGE[http.raw_path.partition("?")[0]]
        body = (_PAGE_FOLDER / name).read_bytes()  # a few kilobytes, which the operating system caches
        headers = {
            "Content-Type": f"{content_type}; charset=utf-8",
            "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
        }
        return await _respond(http, 200, body, headers)

    async def _get_history(self, http: HttpRequest) -> Answer:
        return await _respond(http, 200, self._paced.get("history", lambda: orjson.dumps(self._history())), _JSON)

    async def _get_events(self, http: HttpRequest) -> Answer:
        """Send server-sent events: `start` with the status and all time series, then `tick` once a second."""
        if self._viewers >= MAX_VIEWERS:
            return await _text(http, 503, f"{MAX_VIEWERS} live views are open, as many as there may be")
        self._viewers += 1
        try:
            headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            answer = http.answer(200, headers, length=None)
            if http.method != "HEAD":
                answer.write(b"retry: 1000\n" + _event("start", self._history()))
                await answer.drain()
                while await self._sampler.next_sample():
                    points = {name: series.recent[-1] for name, series in self._sampler.time_series.items()}
                    answer.write(_event("tick", Tick(self._status(), points)))
                    await answer.drain()
            answer.write_eof()
            await answer.drain()
            return answer
        finally:
            self._viewers -= 1

    def _history(self) -> History:
        """Return the status and the time series of every backend."""
        series = self._sampler.time_series
        return History(
            self._status(), FIELDS, {name: BackendHistory([*one.recent], one.whole) for name, one in series.items()}
        )

    async def _post_drain(self, http: HttpRequest) -> Answer:
        """Start the drain. Only callers on this machine may do so."""
        if not _is_loopback(http.remote):
            return await _text(http, 403, "drain is taken from loopback only")
        self._drain()
        return await _text(http, 202, "draining")


def _event(name: str, data: History | Tick) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))


async def _respond(http: HttpRequest, status: int, body: bytes, headers: Mapping[str, str]) -> Answer:
    answer = http.answer(status, {**headers}, length=len(body))
    answer.write_whole(body)
    await answer.drain()
    return answer


async def _text(http: HttpRequest, status: int, text: str, more: Mapping[str, str] = MappingProxyType({})) -> Answer:
    headers = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store", **more}
    return await _respond(http, status, f"{text}\n".encode(), headers)


def _upstream_line(backend: UpstreamReport) -> str:
    held = [(one.model, one.hold.reason) for one in backend.models if one.hold is not None]
    return "\n".join(f"{backend.name} on hold for {model}: {reason}" for model, reason in held)


def _is_loopback(remote: str) -> bool:
    try:
        address = ipaddress.ip_address(remote)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
