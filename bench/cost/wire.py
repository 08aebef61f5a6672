"""The client and the upstream of every measurement, as bare asyncio protocols, each in its own process.

    python -m bench.cost.wire upstream PORT
    python -m bench.cost.wire silent PORT                            # reads all requests and never answers
    python -m bench.cost.wire load PORT CONNECTIONS SECONDS < body   # prints its measurements as JSON
    python -m bench.cost.wire pace PORT PER_SECOND SECONDS < body    # likewise
    python -m bench.cost.wire pile PORT REQUESTS < body              # sends all requests at once and keeps waiting

The measured proxy is between them. The upstream answers immediately. To a streaming request it sends `EVENTS` events,
`EVENT_SECONDS` apart, and each event contains its send time. Both ends read the same clock of the machine, so the
client can compute the travel time of each event.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import TypeVar, cast

import uvloop

EVENTS = 40
EVENT_SECONDS = 0.005
ANSWER = json.dumps(
    {
        "id": "chat-1",
        "object": "chat.completion",
        "created": 1,
        "model": "qwen-vl-plus",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "A gate."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1225, "completion_tokens": 30, "total_tokens": 1255},
    }
).encode()
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chat-1","object":"chat.completion.chunk","created":1,"model":"qwen-vl-plus",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"%019d"},"finish_reason":null}]}\n\n'
)
#: Matches a body that requests a stream. Only bodies that arrive in one piece are searched: larger ones are frames.
_STREAM = re.compile(rb'"stream": ?true')
_SENT = re.compile(rb'"(\d{19})"')
_END = b"data: [DONE]"


class Upstream(asyncio.Protocol):
    """Answer every request. Parses HTTP only to find the end of a request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)
        self.buffer = bytearray()
        self.missing = -1
        self.streams = False
        self.events_left = 0

    def data_received(self, data: bytes) -> None:
        if self.missing < 0:
            self.buffer += data
            end = self.buffer.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            self.missing = content_length(self.buffer[:end]) - (len(self.buffer) - end)
            self.streams = self.missing == 0 and _STREAM.search(self.buffer, end) is not None
            self.buffer.clear()
        else:
            self.missing -= len(data)
        if self.missing == 0:
            self.missing = -1
            if self.streams:
                self.transport.write(STREAM_HEAD)
                self.events_left = EVENTS
                self.send_event()
            else:
                self.transport.write(WHOLE)

    def send_event(self) -> None:
        if self.transport.is_closing():  # the client has closed the connection
            return
        if self.events_left:
            self.events_left -= 1
            self.transport.write(chunk(EVENT % time.monotonic_ns()))
            asyncio.get_running_loop().call_later(EVENT_SECONDS, self.send_event)
        else:
            self.transport.write(chunk(_END + b"\n\n") + b"0\r\n\r\n")


class Client(asyncio.Protocol):
    """Send one request after another on one connection, and record the seconds that each took."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.seconds: list[float] = []
        self.buffer = bytearray()
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)

    def send(self) -> None:
        self.sent_at = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.has_ended():
            return
        self.seconds.append(time.perf_counter() - self.sent_at)
        if not self.buffer.startswith(b"HTTP/1.1 200 "):
            self.fail(f"not answered: {bytes(self.buffer[:300])!r}")
            self.transport.abort()
            return
        self.buffer.clear()
        self.next()

    def has_ended(self) -> bool:
        end = self.buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return False
        head = self.buffer[:end].lower()
        if b"content-length:" in head:
            return len(self.buffer) >= end + content_length(head)
        return self.buffer.endswith(b"0\r\n\r\n")

    def next(self) -> None:
        self.send()

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(f"the connection broke: {error}")

    def fail(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_exception(RuntimeError(why))


AnyClient = TypeVar("AnyClient", bound=Client)


class StreamClient(Client):
    """Record the time to the first event of each stream, and the travel time of each later event."""

    def __init__(self, request: bytes) -> None:
        super().__init__(request)
        self.first: list[float] = []
        self.delays: list[float] = []
        self.begun = False

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        for sent in _SENT.findall(data):
            if self.begun:
                self.delays.append((now - int(sent)) / 1e9)
            else:
                self.begun = True
                self.first.append(time.perf_counter() - self.sent_at)
        super().data_received(data)

    def next(self) -> None:
        self.begun = False
        self.send()


class PacedClient(Client):
    """Send a request only when `send` is called. `busy` is False between requests."""

    busy = False

    def send(self) -> None:
        self.busy = True
        super().send()

    def next(self) -> None:
        self.busy = False


def content_length(head: bytes | bytearray) -> int:
    at = head.lower().find(b"content-length:") + 15
    return int(head[at:].split(b"\r\n", 1)[0]) if at >= 15 else 0


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def request_of(body: bytes) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


async def connect(kind: type[AnyClient], port: int, count: int, body: bytes) -> list[AnyClient]:
    loop, request = asyncio.get_running_loop(), request_of(body)
    return [(await loop.create_connection(lambda: kind(request), "127.0.0.1", port))[1] for _ in range(count)]


async def wait_for(clients: Sequence[Client], seconds: float) -> float:
    """Wait `seconds` seconds, or until a client breaks; return the seconds that passed. Raises that client's error."""
    began = time.perf_counter()
    done, _ = await asyncio.wait([client.lost for client in clients], timeout=seconds, return_when="FIRST_COMPLETED")
    for lost in done:
        await lost
    return time.perf_counter() - began


async def load(port: int, connections: int, seconds: float, body: bytes) -> dict[str, float]:
    """Send the next request as soon as the answer arrives, on every connection; return medians in seconds."""
    streams = _STREAM.match(body, 1) is not None
    clients = await connect(StreamClient if streams else Client, port, connections, body)
    for client in clients:
        client.send()
    took = await wait_for(clients, seconds)
    while not any(client.seconds for client in clients):  # a slow proxy needs longer for its first answer
        took += await wait_for(clients, seconds)
    waits = [wait for client in clients for wait in client.seconds]
    found = {"answered": len(waits), "per_second": len(waits) / took, "p50": median(waits)}
    if streams:
        readers = [client for client in clients if isinstance(client, StreamClient)]
        first = [wait for client in readers for wait in client.first]
        later = [delay for client in readers for delay in client.delays]
        found |= {"events": len(first) + len(later), "first": median(first), "event": median(later)}
    return found


async def pace(port: int, per_second: float, seconds: float, body: bytes) -> dict[str, float]:
    """Send at a steady rate, independent of the answers. Requests without a free connection are counted as late."""
    clients = await connect(PacedClient, port, 64, body)
    began, late = time.perf_counter(), 0
    for number in range(round(per_second * seconds)):
        await asyncio.sleep(max(began + number / per_second - time.perf_counter(), 0))
        free = next((client for client in clients if not client.busy), None)
        clients.append(clients.pop(0))  # use the connections in turn: an idle connection is closed after some seconds
        if free is None:
            late += 1
        else:
            free.send()
    return {"answered": sum(len(client.seconds) for client in clients), "late": late}


async def pile(port: int, requests: int, body: bytes) -> None:
    """Send all requests at once, then wait (at most 600 s) until killed."""
    clients = await connect(Client, port, requests, body)
    for client in clients:
        client.send()
    await wait_for(clients, 600)


async def upstream(port: int, protocol: type[asyncio.Protocol] = Upstream) -> None:
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    match sys.argv[1:]:
        case ["upstream", port]:
            uvloop.run(upstream(int(port)))
        case ["silent", port]:
            uvloop.run(upstream(int(port), asyncio.Protocol))
        case ["load", port, connections, seconds]:
            found = uvloop.run(load(int(port), int(connections), float(seconds), sys.stdin.buffer.read()))
            print(json.dumps(found))
        case ["pace", port, per_second, seconds]:
            print(json.dumps(uvloop.run(pace(int(port), float(per_second), float(seconds), sys.stdin.buffer.read()))))
        case ["pile", port, requests]:
            uvloop.run(pile(int(port), int(requests), sys.stdin.buffer.read()))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
