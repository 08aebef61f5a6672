"""What every attacker needs: raw connections that read only when they are told to, and loops that last some seconds."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

CHAT = "/v1/chat/completions"
CROPS = "/api/inference/crop-describe"
KIB, MIB = 1024, 1024 * 1024
#: Seconds between two looks at a connection that the attacker does not read.
LOOK_SECONDS = 0.5
#: Seconds until an attacker tries again after its connection was refused or cut.
AGAIN_SECONDS = 0.02


@contextlib.asynccontextmanager
async def connected(port: int, receive_buffer: int | None = None) -> AsyncIterator[socket.socket]:
    """Open a connection whose bytes nobody reads unless the attack does. `receive_buffer` is in bytes."""
    with socket.socket() as raw:
        raw.setblocking(False)
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
        yield raw


async def send(raw: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(raw, data)


async def until_closed(raw: socket.socket) -> None:
    """Read and discard until the other side closes the connection."""
    while await asyncio.get_running_loop().sock_recv(raw, 64 * KIB):
        pass


async def until_cut(raw: socket.socket) -> None:
    """Wait, without reading, until the other side has closed the connection."""
    ends = select.poll()
    ends.register(raw, select.POLLRDHUP | select.POLLERR)
    while not ends.poll(0):  # noqa: ASYNC110  no event exists for a connection that is not read
        await asyncio.sleep(LOOK_SECONDS)


def post(path: str, body: bytes | int, headers: str = "", method: str = "POST", keep: bool = False) -> bytes:
    """Return the head of a request, and its body. If `body` is a number, only the head: it announces so many bytes."""
    length, body = (body, b"") if isinstance(body, int) else (len(body), body)
    connection = "" if keep else "Connection: close\r\n"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{connection}Content-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


@contextlib.asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run this while the block runs. Its errors do not matter: a refused caller cannot send the rest of its body.

    (A `TaskGroup` would raise such an error in place of a cancellation, and the attack would never end.)
    """
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))
        _ = task.cancelled() or task.exception()


async def ask(port: int, request: bytes) -> None:
    """Send a request and read its answer. A caller that is refused while it sends reads the refusal."""
    async with connected(port) as raw, meanwhile(send(raw, request)):
        await until_closed(raw)


async def repeated(seconds: float, count: int, once: Callable[[int], Awaitable[None]]) -> None:
    """Run `once(number)` again and again in `count` tasks, for this number of seconds."""

    async def attacker(number: int) -> None:
        while True:
            with contextlib.suppress(OSError):  # refused or cut
                await once(number)
            await asyncio.sleep(AGAIN_SECONDS)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(attacker(number))
