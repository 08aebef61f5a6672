"""Connections to an upstream, as `backends/dashscope.py` needs them: watched, kept alive, and big bodies in slices."""

from __future__ import annotations

import asyncio
import socket
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from backends.base import Timings

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import AddrInfoType, Connection
    from aiohttp.tracing import Trace

#: Seconds a pooled connection may idle. nginx and the usual load balancers close at 60 to 75.
IDLE_SECONDS = 45.0
#: Seconds a resolved address is used for new connections: an upstream that moved is found again within this.
_DNS_SECONDS = 10
#: TCP keep-alive as DashScope's own SDK sets it: idle seconds, interval, probes.
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 3))
_SLICE = 256 * 1024


class Attempt:
    """What a connector tells the one who asked for a connection, through `ATTEMPT`."""

    __slots__ = ("new_only", "reused", "timings", "transport")

    def __init__(self, timings: Timings) -> None:
        self.timings = timings
        self.new_only = False
        """Do not take a connection from the pool."""
        self.reused = False
        """The connection came from the pool."""
        self.transport: asyncio.Transport | None = None
        """The connection, once there is one."""


#: The attempt that the running task makes. aiohttp hands a connector nothing of the caller's; a context variable
#: reaches it. `aiohttp.TraceConfig` would too, but two empty trace hooks add 15 µs of CPU to the 95 of a bare small
#: request; all of `DashScopeBackend.send` adds 9 (CPython 3.11, uvloop, best of nine rounds of 1000, 2 shared cores).
ATTEMPT: ContextVar[Attempt] = ContextVar("attempt")


class Connector(aiohttp.TCPConnector):
    """A pool without a limit (admission decides how many) that notes what it hands out in `ATTEMPT`."""

    def __init__(self) -> None:
        super().__init__(
            limit=0, keepalive_timeout=IDLE_SECONDS, ttl_dns_cache=_DNS_SECONDS, socket_factory=_watched_socket
        )

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout) -> Connection:
        """Take a connection from the pool or make one, and say when it was there and which it was."""
        attempt = ATTEMPT.get()
        attempt.transport = None
        while True:
            attempt.reused = True  # until a socket is made
            connection = await super().connect(req, traces, timeout)
            if not (attempt.reused and attempt.new_only):
                break
            connection.close()  # where one pooled connection was dead, the others are not to be trusted
        attempt.transport = connection.transport
        attempt.timings.work_started = asyncio.get_running_loop().time()
        return connection


def _watched_socket(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):  # macOS names the first one otherwise
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    ATTEMPT.get().reused = False
    return made


class Body(aiohttp.Payload):
    """The caller's bytes, written as they are and in slices, so that no second copy of a big frame is ever made."""

    _value: bytes
    _size: int

    def __init__(self, body: bytes) -> None:
        super().__init__(body, content_type="application/json")
        self._size = len(body)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Not needed to send, but every payload has it."""
        return self._value.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Write all of it, waiting whenever the socket is full."""
        if self._size <= _SLICE:
            await writer.write(self._value)
            return
        view = memoryview(self._value)
        for start in range(0, self._size, _SLICE):
            await writer.write(view[start : start + _SLICE])


def environment_proxy(url: URL) -> URL | None:
    """The proxy that `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` name for a URL, as the official SDKs obey them.

    Never for this machine itself. Read once: aiohttp's own `trust_env` asks a thread for it on every request, and
    takes passwords from `~/.netrc`.

    Raises:
        ValueError: the proxy is of a kind that cannot be spoken to.

    """
    host = url.host or ""
    if host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(host):
        return None
    named = getproxies().get(url.scheme)
    if not named:
        return None
    proxy = URL(named)
    if proxy.scheme not in ("http", "https") or not proxy.host:
        raise ValueError(f"{url.scheme.upper()}_PROXY: only http:// and https:// proxies work, not {proxy.scheme}://")
    return proxy
