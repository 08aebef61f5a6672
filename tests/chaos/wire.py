"""A TCP proxy that breaks connections as networks, load balancers and terminating pods do."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Way = Literal["reset", "close", "garbage", "stall"]
STALL_SECONDS = 0.3
GARBAGE = b"\x00\xffgarbage"


@dataclass(frozen=True, slots=True)
class Fault:
    """How a connection ends, and after how many bytes of answers.

    0 is before the first byte of the first answer; a small number is within the headers of that answer.
    """

    way: Way
    after_bytes: int


class Wire:
    """Forwards to `port`. `choose` returns the fault of each new connection, or None. `faults` counts the faults."""

    def __init__(self, port: int, choose: Callable[[], Fault | None]) -> None:
        self._target = port
        self._choose = choose
        self._tasks: set[asyncio.Task[None]] = set()
        self.faults = 0

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        back, forth = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            up = asyncio.create_task(_forward(reader, forth))
            down = asyncio.create_task(self._answer(back, writer, self._choose()))
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            for half in (up, down):
                half.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
        finally:
            forth.transport.abort()
            writer.close()
            self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault | None) -> None:
        if fault is None:
            return await _forward(reader, writer)
        left = fault.after_bytes
        while data := await reader.read(65536):
            writer.write(data[:left] if len(data) > left else data)
            if len(data) > left:
                break
            left -= len(data)
        else:
            return None
        self.faults += 1
        if fault.way == "garbage":
            writer.write((GARBAGE + b"\r\n\r\n") * 4)
            await writer.drain()
        elif fault.way == "stall":
            await asyncio.sleep(STALL_SECONDS)
        if fault.way in ("reset", "stall"):
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            writer.transport.abort()
        return None


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
