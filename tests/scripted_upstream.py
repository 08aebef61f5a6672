"""A provider on a real socket that runs the script of a test and records every request."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

#: Seconds. The longest wait for a client to close its connection.
BOUND = 10.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One received request, and the number of its connection."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int


class Link:
    """The server's end of one connection."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.reader = reader
        self.writer = writer
        self.is_open = True

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(
        self, body: bytes | dict | list, status: int = 200, content_type: str = "application/json", headers: str = ""
    ) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        await self.send(head.encode() + body)

    async def start_stream(self, content_type: str = "text/event-stream") -> None:
        await self.send(
            f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )

    async def chunk(self, data: bytes) -> None:
        """Send one chunk of a chunked body. An empty chunk ends the body."""
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def close(self) -> None:
        self.is_open = False
        self.writer.close()

    def reset(self) -> None:
        """Close with an RST, like a load balancer that no longer knows the connection."""
        self.is_open = False
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the client has closed its end of the connection."""
        self.is_open = False
        try:
            async with asyncio.timeout(BOUND):
                while await self.reader.read(65536):
                    pass
        except ConnectionError:
            pass


Script = Callable[[Link, Seen], Awaitable[None]]


class Upstream:
    """`script` answers each request. `seen` and `links` record requests and connections.

    `arrived` is set when the first request arrives. `failures` holds the exceptions of the script.
    """

    def __init__(self, script: Script | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        self.script: Script = script or _chat
        self.host = host
        self.port = port
        self.seen: list[Seen] = []
        self.links: list[Link] = []
        self.arrived = asyncio.Event()
        self.failures: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.drop()
        await self._server.wait_closed()
        assert self.failures == [], "the script itself failed"

    def drop(self) -> None:
        """Abort every connection immediately."""
        for link in self.links:
            link.writer.transport.abort()

    def stop(self) -> None:
        """Accept no more connections, and abort the existing connections."""
        self._server.close()
        self.drop()

    @property
    def origin(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        link = Link(len(self.links), reader, writer)
        self.links.append(link)
        try:
            while link.is_open:
                request = await _read_request(link)
                self.seen.append(request)
                self.arrived.set()
                await self.script(link, request)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client closed the connection, or the test is over
        except BaseException as error:  # noqa: BLE001
            self.failures.append(error)
        finally:
            self._tasks.discard(task)
            if link.is_open:
                writer.close()


async def _read_request(link: Link) -> Seen:
    head = (await link.reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.rstrip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await link.reader.readexactly(int(headers.get("content-length", 0)))
    return Seen(method, path, headers, body, link.number)


CHAT_ANSWER = {
    "id": "chat-1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "A gate."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1225, "completion_tokens": 30, "total_tokens": 1255},
}


async def _chat(link: Link, request: Seen) -> None:
    await link.answer(CHAT_ANSWER)
