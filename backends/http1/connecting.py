"""How both HTTP implementations connect to an upstream: timeouts and socket options. `proxies.py` finds the proxy."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

#: Seconds within which a connection must be established: name, TCP and TLS together.
CONNECT_SECONDS = 5.0
#: Seconds for which a resolved address is used for new connections. An upstream with a new address is found again
#: within this time.
DNS_SECONDS = 10
#: Seconds for which a pooled connection may be idle. nginx and the usual load balancers close it after 60 to 75 s.
IDLE_SECONDS = 45.0
#: Bytes of an answer that are buffered before the reader consumes them. If the reader stops, a stream keeps at most
#: twice this number in memory.
READ_AHEAD_BYTES = 64 * 1024
#: Bytes. A longer body is written in slices of this size, each after the previous slice was sent. If the whole body
#: were written at once, TLS would make a second copy of it.
SLICE_BYTES = 256 * 1024
#: TCP keep-alive as DashScope's own SDK sets it: idle seconds, interval in seconds, number of probes. The last option
#: is in milliseconds: if the other end acknowledges no sent data for this time, the kernel closes the connection (its
#: default is a quarter of an hour). A shorter time would be wrong: a busy server can leave the end of a large body
#: unread for a while, and the kernel cannot distinguish a busy server from a dead one.
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 45_000))

_AddressInfo = tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[object, ...]]


def make_socket(address: _AddressInfo) -> socket.socket:
    """Return the socket of a new connection, with TCP keep-alive. This is the `socket_factory` of aiohttp."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):  # macOS has another name for the first option
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made


def in_slices(body: bytes) -> bytes | AsyncIterator[bytes]:
    """Return a short body unchanged. Return a long body as an iterator of slices.

    A slice is made only when the previous slice was consumed.
    """
    return body if len(body) <= SLICE_BYTES else _slices(body)


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), SLICE_BYTES):
        yield body[start : start + SLICE_BYTES]
