"""A provider that means harm: the model's name chooses what it answers. Run it with `python -m attacks.upstream`.

Any other model is answered after LATENCY_SECONDS with one sentence, as by a provider that is well.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
from collections.abc import Awaitable, Callable

from attacks.sockets import KIB, MIB

#: Seconds. A vision-language model takes 0.3 s or more: so short a latency makes a delay in the sidecar visible.
LATENCY_SECONDS = 0.02
SENTENCE = {
    "id": "1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "A gate."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1225, "completion_tokens": 30, "total_tokens": 1255},
}
_MODEL = re.compile(rb'"model" ?: ?"([^"]*)"')
_LENGTH = re.compile(rb"\r\ncontent-length: ?(\d+)", re.IGNORECASE)
#: Bytes of a body among whose first or last the model's name is.
_MODEL_WITHIN = 4 * KIB
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Upstream:
    """The provider, while the block lasts. `origin` is its URL."""

    async def __aenter__(self) -> Upstream:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=MIB)
        self.origin = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                model = await _model(reader, head)
                if head.startswith(b"GET"):
                    await _send(writer, _whole(_model_list()))
                else:
                    await ANSWERS.get(model, _well)(writer)
        writer.transport.abort()
        self._tasks.discard(task)


async def _model(reader: asyncio.StreamReader, head: bytes) -> str:
    """Read the body without keeping it. Return the model that it names."""
    length = _LENGTH.search(head)
    left = int(length[1]) if length else 0
    first = last = b""
    while left and (piece := await reader.read(min(left, MIB))):
        left -= len(piece)
        first, last = first or piece[:_MODEL_WITHIN], (last + piece)[-_MODEL_WITHIN:]
    found = _MODEL.search(first) or _MODEL.search(last)
    return found[1].decode() if found else ""


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def _whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@functools.cache
def _model_list() -> bytes:
    """3 MB of models."""
    return json.dumps({"data": [{"id": f"model-{number}" + "-" * 140} for number in range(18_000)]}).encode()


async def _well(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(LATENCY_SECONDS)
    await _send(writer, _whole(json.dumps(SENTENCE).encode()))


async def _hang(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def _filled(writer: asyncio.StreamWriter, field: bytes, piece: bytes, end: bytes, size: int) -> None:
    """Send an answer with a further field, filled with `piece` up to `size` bytes. It never holds the whole answer."""
    start = json.dumps(SENTENCE).encode()[:-1] + b"," + field
    piece *= 256 * KIB // len(piece)
    count = size // len(piece)
    length = len(start) + count * len(piece) + len(end)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length
    await _send(writer, head + start)
    for _ in range(count):
        await _send(writer, piece)
    await _send(writer, end)


async def _endless(writer: asyncio.StreamWriter, head: bytes, piece: bytes) -> None:
    await _send(writer, head)
    while True:
        await _send(writer, piece)


_WORDS = _chunk(b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"word " * 800))
ANSWERS: dict[str, Callable[[asyncio.StreamWriter], Awaitable[None]]] = {
    "hang": _hang,
    "tiny-objects": functools.partial(_filled, field=b'"a":[', piece=b"{},", end=b"{}]}", size=60 * MIB),
    "big-10": functools.partial(_filled, field=b'"a":"', piece=b"a", end=b'"}', size=10 * MIB),
    "big-60": functools.partial(_filled, field=b'"a":"', piece=b"a", end=b'"}', size=60 * MIB),
    "endless-words": functools.partial(_endless, head=_STREAM, piece=_WORDS * 16),
    "blank-lines": functools.partial(_endless, head=_STREAM, piece=_chunk(b"\n" * 64 * KIB)),
    "endless-1xx": functools.partial(_endless, head=b"", piece=b"HTTP/1.1 100 Continue\r\n\r\n" * 2000),
}


async def main() -> None:
    """Print the origin, then answer until the process is killed."""
    async with Upstream() as upstream:
        print(upstream.origin, flush=True)  # noqa: T201
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
