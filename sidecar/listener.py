"""One HTTP listener on aiohttp's low-level server: no router, no middlewares, no traceback for who sends garbage."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

#: Answers a request with a `web.StreamResponse`, or with as much of one as aiohttp asks for: see `api.answer`.
Handler = Callable[[web.BaseRequest], Awaitable[Any]]

#: A connection that was idle for so long is closed. Longer than any client's own limit (httpx 5 s, aiohttp 15 s), so
#: that it is the client who closes, and never under a request that is on its way.
KEEPALIVE_SECONDS = 75.0
#: Seconds for which the rest of a refused body is read and thrown away: a caller who is still sending sees a reset
#: instead of the answer if the connection is closed under it.
LINGER_SECONDS = 2.0
#: Bytes that a connection's reader holds before the sender has to wait: a frame's worth.
READ_BUFFER_BYTES = 256 * 1024
#: A new connection that has sent no whole request head after so many seconds is closed: who opens many and says nothing
#: must not use up the process's descriptors.
FIRST_REQUEST_SECONDS = 10.0


class _Protocol(web.RequestHandler):
    """One connection. What is no HTTP gets one JSON answer and is closed."""

    __slots__ = ("_silence",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start to wait for the first request; close at once what is one connection too many."""
        super().connection_made(transport)
        self._silence = asyncio.get_running_loop().call_later(FIRST_REQUEST_SECONDS, self.force_close)
        server = self._manager
        assert isinstance(server, _Server)  # noqa: S101  it made this object
        if len(server.connections) > server.most_connections:
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wait no more."""
        self._silence.cancel()
        super().connection_lost(exc)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on after a pause. aiohttp calls this after every read of a body, and would parse nothing each time."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def heard(self) -> None:
        """The head of a request is there: from now on the keep-alive time holds."""
        self._silence.cancel()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what the parser could not read. aiohttp would log it with its bytes, which may hold a key."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun, there is no room for an error")
        text = f"this is not a valid HTTP request ({type(exc).__name__}): this port speaks plain HTTP, without TLS"
        text = text if status < 500 else "internal error"
        code = "invalid_request" if status < 500 else "internal_error"
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {"error": {"message": text, "type": kind, "code": code, "param": None}}
        response = web.Response(status=status, body=orjson.dumps(body), content_type="application/json")
        response.force_close()
        return response


class _Server(web.Server):
    most_connections = 0

    def _make_request(self, *args: Any) -> web.BaseRequest:
        args[2].heard()
        return super()._make_request(*args)

    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class Listener:
    """Addresses that share one handler. The handler's task is cancelled when its caller hangs up."""

    def __init__(self, handler: Handler, *, most_connections: int) -> None:
        server = _Server(
            handler,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE_SECONDS,
            lingering_time=LINGER_SECONDS,
            read_bufsize=READ_BUFFER_BYTES,
        )
        server.most_connections = most_connections
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        self._socket_path: Path | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen on a TCP address; returns the port. Raises `OSError`."""
        if self._runner.server is None:
            await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=1024)
        await site.start()
        return site.port

    async def open_unix(self, path: Path) -> None:
        """Listen on a unix socket too, in the place of a stale one. Raises `OSError`."""
        await web.UnixSite(self._runner, path, backlog=1024).start()
        self._socket_path = path

    async def close(self) -> None:
        """Stop listening and close every connection; requests under way have a second."""
        await self._runner.cleanup()
        if self._socket_path is not None:
            await asyncio.to_thread(self._socket_path.unlink, missing_ok=True)
