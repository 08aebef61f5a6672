"""The admin listener: probes for kubelet, metrics for Prometheus, status for people. It never takes inference."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from .health import Health
from .history import FIELDS
from .watch import Watch

log = logging.getLogger("sidecar")

#: The files of the live page: path → file in `page/`, and its type.
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_PAGE_FOLDER = Path(__file__).with_name("page")
#: Live views at once: each costs a connection, and some JSON a second.
MOST_VIEWERS = 16


class AdminServer:
    """Answers every request of the admin listener."""

    def __init__(
        self,
        registry: CollectorRegistry,
        health: Health,
        status: Callable[[], dict[str, Any]],
        drain: Callable[[], None],
        watch: Watch,
    ) -> None:
        """`status` gives `GET /status`; `drain` begins the drain and returns at once; `watch` has the history."""
        self._registry = registry
        self._health = health
        self._status = status
        self._drain = drain
        self._watch = watch
        self._viewers = 0
        self._paths: dict[str, tuple[str, Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]]] = {
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

    async def __call__(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        path = http.raw_path.partition("?")[0]
        method, handle = self._paths.get(path, ("", None))
        if handle is None:
            known = ", ".join(path for path in self._paths if path not in PAGE)
            return _text(404, f"there is nothing at {path[:200]!r}; the admin listener has {known}")
        if http.method != method and (http.method, method) != ("HEAD", "GET"):
            return _text(405, f"{path} takes {method}")
        return await handle(http)

    async def _metrics(self, http: web.BaseRequest) -> web.StreamResponse:
        encode, content_type = choose_encoder(",".join(http.headers.getall("Accept", [])))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _startupz(self, http: web.BaseRequest) -> web.StreamResponse:
        started = self._health.started
        return _text(200 if started else 503, "started" if started else self._health.unready_reason() or "starting")

    async def _readyz(self, http: web.BaseRequest) -> web.StreamResponse:
        """A throttled or absent upstream is told in the body: the pod is as ready as it can be."""
        reason = self._health.unready_reason()
        if reason is not None:
            return _text(503, reason)
        upstream = [line for line in map(_upstream_line, self._status()["backends"]) if line]
        return _text(200, "\n".join(["ready", *upstream]))

    async def _livez(self, http: web.BaseRequest) -> web.StreamResponse:
        return _text(200, "alive")

    async def _get_status(self, http: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=orjson.dumps(self._status()), content_type="application/json")

    async def _get_page(self, http: web.BaseRequest) -> web.StreamResponse:
        """The live page, which may load nothing from anywhere else, nor be shown inside another one."""
        name, content_type = PAGE[http.raw_path.partition("?")[0]]
        body = (_PAGE_FOLDER / name).read_bytes()  # a few kilobytes that the system has in memory
        headers = {
            "Content-Type": f"{content_type}; charset=utf-8",
            "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
        }
        return web.Response(body=body, headers=headers)

    async def _get_history(self, http: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=orjson.dumps(self._told()), content_type="application/json")

    async def _get_events(self, http: web.BaseRequest) -> web.StreamResponse:
        """Server-sent events: `start` with everything since the start, then `tick` once a second."""
        if self._viewers >= MOST_VIEWERS:
            return _text(503, f"{MOST_VIEWERS} live views are open, as many as there may be")
        self._viewers += 1
        try:
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            )
            await response.prepare(http)
            if http.method == "HEAD":
                return response
            await response.write(b"retry: 1000\n" + _event("start", self._told()))
            while await self._watch.next_look():
                points = {name: history.recent[-1] for name, history in self._watch.history.items()}
                await response.write(_event("tick", {"status": self._status(), "points": points}))
            await response.write_eof()
            return response
        finally:
            self._viewers -= 1

    def _told(self) -> dict[str, Any]:
        """What there is to see, all of it: the status, and every backend's history as rows of `fields`."""
        return {
            "status": self._status(),
            "fields": FIELDS,
            "history": {
                name: {"recent": list(history.recent), "whole": history.whole}
                for name, history in self._watch.history.items()
            },
        }

    async def _post_drain(self, http: web.BaseRequest) -> web.StreamResponse:
        """From this machine only, and from no web page: a browser tells by these headers that it asks for one."""
        if not _is_loopback(http.remote):
            return _text(403, "drain is taken from loopback only")
        if "Origin" in http.headers or "Sec-Fetch-Site" in http.headers or not _names_this_host(http.host):
            return _text(403, "drain is not taken from a web page")
        self._drain()
        return _text(202, "draining")


def _event(name: str, data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers={"Cache-Control": "no-store"})


def _upstream_line(backend: dict[str, Any]) -> str:
    held = [lane for lane in backend["models"] if lane["hold"]]
    return "\n".join(f"{backend['name']} on hold for {lane['model']}: {lane['hold']['reason']}" for lane in held)


def _is_loopback(remote: str | None) -> bool:
    try:
        address = ipaddress.ip_address(remote or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _names_this_host(host: str) -> bool:
    """Whether `Host` is an address or localhost: any other name could be a page's own that resolves to us."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
